"""Stage 1a, speech to text: the adapter and all of the LLM (paper section 4.1).

omni2 train --config stage1a --set checkpoint=start --set data=dialogues --out runs/1a

`start` comes from

omni2 convert --whisper large-v3.pt --llm Qwen2.5-7B-Instruct --speech-lm Qwen2.5-0.5B --out start

With --set rank=16 low-rank updates are trained instead of the LLM itself.
"""

from omni2_jax.train.settings import Bucket, OptimizerConfig, TrainConfig

config = TrainConfig(
    stage="1a",
    batch=32,
    epochs=3,
    optimizer=OptimizerConfig(peak=5e-5),
    buckets=(Bucket(1, 512), Bucket(2, 1024), Bucket(3, 1536), Bucket(5, 2560), Bucket(8, 4096)),
)
