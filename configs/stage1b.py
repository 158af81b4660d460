"""Stage I(b), text to speech: the speech LM on single replies, text embeddings only, in the read/write layout (paper section 4.1).

python -m train --config configs/stage1b.py --set checkpoint=runs/1a/final --set data=dialogues --out runs/1b

--set layout=offline trains the paper's offline TTS; --set reset="('speech_lm',)" begins from scratch (table 3).
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="1b",
    batch=32,
    epochs=5,
    optimizer=OptimizerConfig(peak=5e-4),
    buckets=(Bucket(0, 0, 256), Bucket(0, 0, 512), Bucket(0, 0, 1024), Bucket(0, 0, 2048)),
)
