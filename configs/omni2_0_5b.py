"""LLaMA-Omni2-0.5B: the speech side of every size around Qwen2.5-0.5B-Instruct.

omni2 convert --omni2 LLaMA-Omni2-0.5B --decoder cosy2_decoder --voice NAME=a.wav --out omni2-0_5b
"""

from omni2_jax.config import DecoderConfig, Omni2Config

config = Omni2Config(
    llm=DecoderConfig(
        vocabulary=151936, width=896, layers=24, heads=14, kv_heads=2, hidden=4864, tied=True
    )
)
