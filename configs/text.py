"""Stage "text": the LLM alone on dialogues as text, for a little LLM from `omni2 new`.

omni2 train --config text --set checkpoint=new --set data=dialogues.jsonl \
  --set validation=dialogues.jsonl --out runs/text

dialogues.jsonl is what `omni2 synthesize dialogues` writes: its split "seen" is trained on, the
others are for the validation. It reports the share of replies that greedy decoding gives exactly;
metrics.jsonl has it by topic and by split, too. A data set of `omni2 prepare` does as well.
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="text",
    batch=8,
    epochs=20,
    optimizer=OptimizerConfig(peak=1.5e-3),
    buckets=(Bucket(0, 256),),
)
