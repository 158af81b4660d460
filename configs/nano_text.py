"""Nano's LLM learns its replies as text, before it hears any question (stage "text").

omni2 train --config nano_text --set checkpoint=new --set data=dialogues.jsonl \
  --set validation=dialogues.jsonl --out runs/text

Rows are short and updates many: a little model learns sums only by seeing each of them often.
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="text",
    batch=16,
    steps=10000,
    optimizer=OptimizerConfig(peak=1.2e-3, beta2=0.99, decay=0.05),
    buckets=(Bucket(0, 256),),
    dtype="float32",  # of CPUs; nothing has to be recomputed in rows so small
    remat="none",
    loss_block=1024,
    save_every=250,
    validate_every=1000,
    samples=0,
)
