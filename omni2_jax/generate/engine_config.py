"""Static settings of an engine: buffer sizes and options that its programs are compiled for."""

from dataclasses import dataclass

from omni2_jax.config import Omni2Config

CACHE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class EngineConfig:
    """Static settings of the compiled programs. No request can change them.

    A position is one entry of a language model's KV cache; a unit is a speech unit (40 ms).
    """

    slots: int = 1  # requests that are answered at the same time (the batch size)
    # Prompt positions in one call of `prefill`; longer prompts take several calls.
    prefill_size: int = 384
    llm_capacity: int = 2048  # LLM positions of a conversation, prompt and answer
    speech_capacity: int = 2560  # positions of the speech LM in one answer
    max_units: int = 1536  # units of one answer; only used where flow_left_chunks is None
    flow_chunk: int | None = None  # units in a flow chunk; None = the checkpoint's
    flow_left_chunks: int | None = None  # chunks that the flow sees before its own; None = all
    # The flow's KV cache is the largest part of a slot. float32, or bfloat16, which halves it; the
    # mel changes by less than 0.1 (tests/test_flow_streaming.py). On a GPU the keys and values of
    # the flow's estimator are always bfloat16 (`Form.flow_matmuls`); there this changes the flow
    # encoder's cache and the cached inputs of convolutions only.
    flow_cache_dtype: str = "float32"
    units_only: bool = True  # mask all speech-LM tokens but units and the end token
    # Join the waveforms of two steps without the small jumps that the released code makes.
    seamless: bool = True

    def __post_init__(self):
        if self.flow_cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"flow_cache_dtype is {self.flow_cache_dtype!r}, expected float32 or bfloat16"
            )

    def check(self, config: Omni2Config, prompt: int, max_text: int, max_flush: int) -> None:
        """Raise ValueError if an answer does not fit the buffers.

        prompt: positions in the LLM's cache before the answer. max_text: text tokens of the
        answer. max_flush: speech tokens after the end of the text.
        """
        units, speech = longest_answer(config, max_text, max_flush)
        needs = {"llm_capacity": prompt + max_text, "speech_capacity": speech}
        if config.flow and self.flow_left_chunks is None:
            needs["max_units"] = units
        for name, size in needs.items():
            if size > getattr(self, name):
                raise ValueError(
                    f"prompt and answer may need {size} positions, but the engine's {name} is "
                    f"{getattr(self, name)}"
                )


def longest_answer(config: Omni2Config, max_text: int, max_flush: int) -> tuple[int, int]:
    """The largest number of units, and of speech-LM positions, that one answer can take.

    max_text: text tokens of the answer. max_flush: speech tokens after the end of the text.
    """
    units = config.write * -(-max_text // config.read) + max_flush
    return units, max_text + 1 + units  # fused text, <sep>, units
