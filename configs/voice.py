"""One voice from nothing: a speech tokenizer of 2187 units, to be trained on an hour of recordings.

omni2 new --config voice --parts speech_tokenizer --out start
"""

from omni2_jax.config import Omni2Config, SpeechTokenizerConfig

speech_tokenizer = SpeechTokenizerConfig(mels=80, width=128, layers=2, heads=4, digits=7)
config = Omni2Config(units=speech_tokenizer.units).only()
