"""LLaMA-Omni2-32B-Bilingual, the only release of this size: the speech side of every size around
Qwen2.5-32B-Instruct.

omni2 convert --omni2 LLaMA-Omni2-32B-Bilingual --decoder cosy2_decoder --voice A=a.wav \
  --out omni2-32b
"""

from omni2_jax.config import DecoderConfig, Omni2Config

config = Omni2Config(
    llm=DecoderConfig(
        vocabulary=152064, width=5120, layers=64, heads=40, kv_heads=8, hidden=27648, tied=False
    )
)
