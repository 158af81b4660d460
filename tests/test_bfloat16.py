"""bfloat16, the precision of accelerators, against float32, on the language side's own numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.audio import features, recordings
from omni2_jax.generate.omni2 import Omni2
from omni2_jax.generate.prompts import load_segments
from tests.support.conversations import CASES, GREEDY, clip

# Bounds of the mean and of the maximum of |bfloat16 - float32|, in units of the standard deviation
# of the float32 numbers. They are about twice what was measured on a CPU, which stands behind them.
BOUNDS = {
    "speech features": (0.014, 0.08),  # 0.0068, 0.038
    "LLM hidden states": (0.043, 0.42),  # 0.0212, 0.209
    "LLM logits": (0.043, 0.60),  # 0.0215, 0.292
    "speech LM hidden states": (0.09, 0.91),  # 0.0444, 0.452
    "speech LM logits": (0.09, 1.52),  # 0.0442, 0.757
}


@pytest.fixture(scope="module")
def half(checkpoint_dir) -> Omni2:
    """The language side in bfloat16."""
    return Omni2.load(checkpoint_dir, dtype=jnp.bfloat16, decoder=False)


def teacher_forced(model: Omni2) -> dict[str, np.ndarray]:
    """The numbers of one turn whose answer is given: case A's text, then 40 units."""
    (samples,) = load_segments(clip("speech_a"), "refuse", recordings.TURN_SAMPLES)
    padded, _ = recordings.pad([samples], recordings.TURN_SAMPLES)
    prompt = model.tokenizer.prompt([1])
    text = model.tokenizer.text.encode(CASES["A"]["text"].strip(), add_special_tokens=False)
    units = np.random.default_rng(0).integers(0, model.config.units, 40)

    @jax.jit
    def run(params: dict) -> dict[str, jax.Array]:
        parts = nnx.merge(model.graph, params)
        mel = features.log_mel(padded, mels=model.config.speech_encoder.mels)
        speech = parts.encode_speech(mel.astype(model.dtype))
        embeds = parts.embed_prompt(jnp.array([prompt + text]), speech)
        hidden, _ = parts.llm(embeds, jnp.arange(embeds.shape[1])[None])
        fused = parts.fuse(hidden[:, len(prompt) - 1 : -1], jnp.array([text]))
        written = parts.speech_lm.embed(jnp.array([units + model.config.tokens.sep + 1]))
        rows = jnp.concatenate([fused, written.astype(fused.dtype)], axis=1)
        speech_hidden, _ = parts.speech_lm(rows, jnp.arange(rows.shape[1])[None])
        return {
            "speech features": speech,
            "LLM hidden states": hidden,
            "LLM logits": parts.llm.logits(hidden),
            "speech LM hidden states": speech_hidden,
            "speech LM logits": parts.speech_lm.logits(speech_hidden),
        }

    return {name: np.asarray(x, np.float32) for name, x in run(model.params).items()}


@pytest.mark.slow
def test_against_float32(text_model, half):
    exact, rounded = teacher_forced(text_model), teacher_forced(half)
    for name, bounds in BOUNDS.items():
        error = np.abs(rounded[name] - exact[name]) / exact[name].std()
        assert error.mean() > 0  # it is computed in bfloat16
        assert error.mean() < bounds[0] and error.max() < bounds[1], name


@pytest.mark.slow
def test_decode_state(checkpoint_dir, half):
    """The caches of the language models are bfloat16, flow and vocoder stay float32."""
    model = Omni2.load(checkpoint_dir, dtype=jnp.bfloat16)
    engine = model.engine(GREEDY, 1000)
    language = engine.state.language
    caches = jax.tree.leaves((language.llm, language.speech))
    assert caches and all(leaf.dtype == jnp.bfloat16 for leaf in caches)
    assert language.hidden.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves((engine.state.flow, engine.state.vocoder)):
        assert leaf.dtype != jnp.bfloat16
    after, _ = jax.eval_shape(engine.programs.step, engine.params, engine.state)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), x) for x in (after, engine.state)]
    assert shapes[0] == shapes[1]
