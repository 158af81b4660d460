"""Hidden states of the LLM on disk. n text tokens of a dialogue's replies, D LLM width."""

from omni2_jax.train.stored_arrays import StoredArrays


class HiddenStates(StoredArrays):
    """The states [n, D] behind the text tokens of a dialogue's replies."""

    name, records = "hidden", "states"
    content, command = "hidden states", "omni2 hidden"
    other = "or by an LLM of another width than {width}"
