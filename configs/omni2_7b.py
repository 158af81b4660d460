"""LLaMA-Omni2-7B: the speech side of every size around Qwen2.5-7B-Instruct.

omni2 convert --omni2 LLaMA-Omni2-7B --decoder cosy2_decoder --voice NAME=a.wav --out omni2-7b
"""

from omni2_jax.config import DecoderConfig, Omni2Config

config = Omni2Config(
    llm=DecoderConfig(
        vocabulary=152064, width=3584, layers=28, heads=28, kv_heads=4, hidden=18944, tied=False
    )
)
