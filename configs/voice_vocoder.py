"""Stage "vocoder" for one small voice, from nothing: HiFT of 0.7M parameters.

omni2 train --config voice_vocoder --set checkpoint=voice --set data=recordings --out runs/vocoder

The F0 predictor first, then 0.4 s of four recordings a step by their spectra and the phases of
their harmonics, with a learning rate that falls to its least. On one core a step takes 0.14 s, with
the settings for glibc in recipes/environment.sh. Discriminators (`--set vocoder.gan_from=STEP`, see
vocoder.py) have not made this vocoder better, see examples/joe/README.md.
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
        harmonic_phases=20.0,
        f0_steps=1_500,
        f0_peak=2e-3,
        width=12,  # of discriminators, where gan_from is set
    ),
    dtype="float32",
    workers=2,
    validate_every=2_000,
)
