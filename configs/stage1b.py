"""Stage 1b, text to speech: the speech LM on single replies, without the LLM (paper section 4.1).

omni2 train --config stage1b --set checkpoint=runs/1a/final --set data=dialogues --out runs/1b

--set layout=offline trains offline text to speech (table 3; with stage 2 in this layout: table 4).
--set reset=speech_lm initialises the speech LM at random (table 3, "scratch").
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="1b",
    batch=32,
    epochs=5,
    optimizer=OptimizerConfig(peak=5e-4),
    buckets=(Bucket(0, 0, 256), Bucket(0, 0, 512), Bucket(0, 0, 1024), Bucket(0, 0, 2048)),
)
