"""A little model to train from nothing: it hears with Whisper tiny.en in windows of 10 s.

omni2 new --config nano --whisper WHISPER --text dialogues.jsonl --out nano

WHISPER is a file or directory of Whisper tiny.en; that of faster-whisper does, too. Parameters:
encoder 7.8 M, adapter 1.1 M, LLM 6.2 M, gate fusion 0.4 M, speech LM 6.8 M.
"""

from omni2_jax.config import AdapterConfig, DecoderConfig, Omni2Config, SpeechEncoderConfig
from omni2_jax.configs.voice import speech_tokenizer

config = Omni2Config(
    units=speech_tokenizer.units,  # of the one voice that speaks its replies
    speech_encoder=SpeechEncoderConfig(mels=80, frames=500, width=384, layers=4, heads=6),
    adapter=AdapterConfig(hidden=512),
    llm=DecoderConfig(
        vocabulary=1204, width=256, layers=6, heads=4, kv_heads=2, hidden=1024, max_positions=2048
    ),
    speech_lm=DecoderConfig(
        width=256, layers=6, heads=4, kv_heads=2, hidden=1024, max_positions=2048
    ),
    max_prompt=2048,
    no_speech_reply="I did not hear a question.",
).only("speech_encoder", "adapter", "llm", "fusion", "speech_lm")
