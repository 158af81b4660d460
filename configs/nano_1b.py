"""Nano learns to speak its replies: stage 1b on sentences of the one voice.

omni2 train --config nano_1b --set checkpoint=runs/1a/final --set data=sentences/train \
  --set validation=sentences/test --out runs/1b

A reply of three seconds is 75 units and about 15 text tokens.
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="1b",
    batch=32,
    steps=10000,
    optimizer=OptimizerConfig(peak=1e-3, beta2=0.99, decay=0.05),
    unit_noise=0.15,  # otherwise it learns some thousand sentences by heart
    buckets=(Bucket(0, 0, 96), Bucket(0, 0, 160), Bucket(0, 0, 320), Bucket(0, 0, 640)),
    dtype="float32",
    remat="none",
    loss_block=2048,
    save_every=250,
    validate_every=1000,
    samples=0,
)
