"""Stage "flow": fine-tune flow matching for a new voice, on recordings of one speaker.

omni2 train --config flow --set checkpoint=omni2-7b --set data=recordings --out runs/flow

The recordings are the assistant turns of the data set; their units are needed, too. As in the
training of CosyVoice2, the learning rate is constant after the warm-up, and the chunk masks are
those of 50 units or of the whole reply.
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
