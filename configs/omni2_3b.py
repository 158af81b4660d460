"""LLaMA-Omni2-3B: the speech side of every size around Qwen2.5-3B-Instruct.

omni2 convert --omni2 LLaMA-Omni2-3B --decoder cosy2_decoder --voice NAME=a.wav --out omni2-3b
"""

from omni2_jax.config import DecoderConfig, Omni2Config

config = Omni2Config(
    llm=DecoderConfig(
        vocabulary=151936, width=2048, layers=36, heads=16, kv_heads=2, hidden=11008, tied=True
    )
)
