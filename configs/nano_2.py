"""Nano's gate fusion and speech LM on whole dialogues: stage 2, with what it hears computed once.

omni2 hidden --config nano_2 --set checkpoint=runs/1b/final --set data=dialogues/train \
  --set validation=dialogues/validation --out hidden
omni2 train --config nano_2 --set checkpoint=runs/1b/final --set data=dialogues/train \
  --set validation=dialogues/validation --set hidden=hidden --out runs/2
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="2",
    batch=8,
    steps=4000,
    optimizer=OptimizerConfig(peak=5e-4, beta2=0.99),
    unit_noise=0.15,
    # Most replies have fewer than 96 tokens, text and units.
    buckets=(
        *(Bucket(1, 144, tokens) for tokens in (96, 160, 640)),
        *(Bucket(2, 320, tokens) for tokens in (96, 160, 640)),
    ),
    dtype="float32",
    remat="none",
    loss_block=2048,
    save_every=250,
    validate_every=1000,
    samples=0,
)
