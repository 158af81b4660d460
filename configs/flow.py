"""Fine-tune the flow for a voice of one's own: recordings of one speaker and their units.

python -m train --config configs/flow.py --set checkpoint=omni2-7b --set data=recordings --out runs/flow

The dialogues' assistant turns are the recordings. Rate, constant after its warm-up, and chunk masks as CosyVoice2 trains it.
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="flow",
    batch=16,
    epochs=20,
    optimizer=OptimizerConfig(peak=1e-5, final=1.0, clip=5.0),
    buckets=(Bucket(0, 0, 128), Bucket(0, 0, 256), Bucket(0, 0, 512)),
    chunks=(50, 0),
    dtype="float32",
)
