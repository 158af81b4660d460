"""LLaMA-Omni2-14B: the speech side of every size around Qwen2.5-14B-Instruct.

omni2 convert --omni2 LLaMA-Omni2-14B --decoder cosy2_decoder --voice NAME=a.wav --out omni2-14b
"""

from omni2_jax.config import DecoderConfig, Omni2Config

config = Omni2Config(
    llm=DecoderConfig(
        vocabulary=152064, width=5120, layers=48, heads=40, kv_heads=8, hidden=13824, tied=False
    )
)
