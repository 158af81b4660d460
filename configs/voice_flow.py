"""Stage "flow" for one small voice, from nothing, on recordings with units.

omni2 train --config voice_flow --set checkpoint=voice --set data=recordings --out runs/flow

The encoder learns the mel alone first, as the estimator learns nothing from a mu that is noise.
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="flow",
    one_voice=True,
    mu_steps=2_000,
    batch=8,
    steps=15_000,
    # beta2 is low because the estimator's moments are still zero when its first step comes.
    optimizer=OptimizerConfig(peak=2e-3, final=0.02, beta2=0.99, clip=5.0, ema=0.999),
    buckets=(Bucket(0, 0, 64), Bucket(0, 0, 128)),
    chunks=(50, 0),
    dtype="float32",
    remat="none",
    workers=2,
    validate_every=1_000,
)
