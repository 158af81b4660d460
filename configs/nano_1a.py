"""Nano learns to hear: stage 1a with its text replayed, and a CTC loss of what the adapter hears.

omni2 frames --config nano_1a --set checkpoint=runs/text/final --set data=spoken/train \
  --set validation=spoken/validation --out frames
omni2 train --config nano_1a --set checkpoint=runs/text/final --set data=spoken/train \
  --set validation=spoken/validation --set frames=frames --set replay_data=dialogues.jsonl \
  --out runs/1a

A question is one window of the speech encoder, 100 positions of the LLM. On a GPU, where the speech
encoder takes little time, hide parts of what it hears instead of reading its frames: leave out
`frames`, and add --set mel_masks=2 --set batch=32 --set steps=12000 --set optimizer.decay=0.02
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="1a",
    batch=8,
    steps=20000,
    optimizer=OptimizerConfig(peak=1e-3, beta2=0.99),
    # Text that is replayed takes the first ones, a question or two the others.
    buckets=(Bucket(0, 64), Bucket(0, 128), Bucket(1, 144), Bucket(2, 320)),
    replay=0.4,
    ctc=0.3,
    ctc_steps=2000,
    dtype="float32",
    remat="none",
    loss_block=2048,
    save_every=250,
    validate_every=1000,
    samples=0,
)
