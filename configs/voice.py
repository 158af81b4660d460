"""One voice from nothing: a speech tokenizer of 2187 units (0.5M parameters), a flow (2.6M) and a
vocoder (0.7M). An hour of recordings is enough for all but the flow, which stops improving early
with so few; examples/joe/README.md has its figures with nine hours.

omni2 new --config voice --parts speech_tokenizer --out start
omni2 new --config voice --parts flow,vocoder --out voice
"""

from omni2_jax.config import FlowConfig, HiftConfig, Omni2Config, SpeechTokenizerConfig

speech_tokenizer = SpeechTokenizerConfig(mels=80, width=128, layers=2, heads=4, digits=7)
flow = FlowConfig(
    units=speech_tokenizer.units,
    width=128,
    heads=4,
    hidden=256,
    layers=2,
    up_layers=1,
    speaker=1,
    mel_mean=-4.6,
    mel_std=2.7,
    channels=96,  # more than the mel's bins: the estimator has to tell their noise apart
    estimator_heads=4,
    estimator_head_size=24,
    blocks=1,
    mid_blocks=3,
    steps=6,  # with 10, a recogniser hears no more of the answers
    noise_frames=1500,  # 30 s
)
vocoder = HiftConfig(
    channels=128,
    random_phases=False,
    f0_channels=96,
    resblock_kernels=(3, 7),
    resblock_dilations=((1, 3), (1, 3)),
    source_dilations=((1,), (1,), (1,)),
)
config = Omni2Config(units=speech_tokenizer.units, flow=flow, vocoder=vocoder).only(
    "flow", "vocoder"
)
