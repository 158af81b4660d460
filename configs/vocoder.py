"""Stage "vocoder": fine-tune the released HiFT, against discriminators from the first step on.

omni2 train --config vocoder --set checkpoint=omni2-7b --set data=recordings --out runs/vocoder

The learning rate is constant after the warm-up, as in the training of CosyVoice2. For a small
vocoder from nothing see voice_vocoder.py.
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig, VocoderTraining

config = TrainConfig(
    stage="vocoder",
    batch=16,
    epochs=100,
    optimizer=OptimizerConfig(peak=2e-4, final=1.0, beta1=0.8, beta2=0.99, ema=0.999),
    buckets=(Bucket(0, 0, 256), Bucket(0, 0, 768)),
    vocoder=VocoderTraining(segment=50, gan_from=0),
    dtype="float32",
)
