"""Stage "vocoder" for one small voice, from nothing: HiFT of 0.7M parameters.

omni2 train --config voice_vocoder --set checkpoint=voice --set data=recordings --out runs/vocoder

The F0 predictor first, then 0.4 s of four recordings a step by their spectra, with a learning rate
that falls to its least; from step 24,000 on with discriminators as well, at a lower rate: at the
high one their gradients make the spectra worse. On one core a step takes 0.1 s, with discriminators
0.3 s, with the settings for glibc in recipes/environment.sh.
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig, VocoderTraining

config = TrainConfig(
    stage="vocoder",
    batch=4,
    steps=34_000,
    optimizer=OptimizerConfig(peak=2e-3, final=0.02, warmup=0.005, beta1=0.8, ema=0.999),
    buckets=(Bucket(0, 0, 128),),  # recordings of 5 s at most
    vocoder=VocoderTraining(
        segment=20,
        f0_steps=1_500,
        gan_from=24_000,
        f0_peak=2e-3,
        discriminator_peak=2e-4,
        gan_peak=2e-4,
        width=12,
    ),
    dtype="float32",
    workers=2,
    validate_every=2_000,
)
