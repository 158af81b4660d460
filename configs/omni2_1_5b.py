"""LLaMA-Omni2-1.5B: the speech side of every size around Qwen2.5-1.5B-Instruct.

omni2 convert --omni2 LLaMA-Omni2-1.5B --decoder cosy2_decoder --voice NAME=a.wav --out omni2-1_5b
"""

from omni2_jax.config import DecoderConfig, Omni2Config

config = Omni2Config(
    llm=DecoderConfig(
        vocabulary=151936, width=1536, layers=28, heads=12, kv_heads=2, hidden=8960, tied=True
    )
)
