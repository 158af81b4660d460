"""int8 weights: what is written, what is read, how close it stays, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.quantized import Comparison, Reader, summary
from omni2_jax.checkpoint import info, parameters
from omni2_jax.config import Omni2Config
from omni2_jax.convert import precision
from omni2_jax.convert.join import Source, join
from omni2_jax.convert.write import write
from omni2_jax.models.forms import Form, for_serving, form_of
from omni2_jax.models.layers import Linear
from tests.support.commands import is_error_line
from tests.support.conversations import GREEDY, clip

LANGUAGE = ("speech_encoder", "llm", "speech_lm")


@pytest.fixture(scope="module")
def quantized(checkpoint_dir, tmp_path_factory):
    """The tiny release with int8 weights, beside it as it is."""
    out = tmp_path_factory.mktemp("int8") / "ckpt"
    write(out, precision.quantized(join([Source(checkpoint_dir)])), {})
    return out


def load(directory):
    config = Omni2Config.load(directory / "config.json").only(*LANGUAGE)
    graph, params = parameters.load(directory, config, jnp.float32)
    return nnx.merge(graph, params)


def dequantized(stored: dict, path: str) -> np.ndarray:
    """A stored matrix, each integer times the scale of its output."""
    matrix, scale = (stored[name].read().astype(np.float32) for name in (path, f"{path}_scale"))
    if path.endswith("table"):  # its rows are the outputs
        return matrix * scale[:, None]
    first = int(path.startswith(("layers", "blocks")))  # stacked on the first axis
    inputs = range(first, first + matrix.ndim - scale.ndim)
    return matrix * np.expand_dims(scale, tuple(inputs))


def load_dequantized(directory, original):
    """The original's model with the weights that the integers stand for."""
    graph, state = nnx.split(load(original))
    params = nnx.to_pure_dict(state)
    for part in LANGUAGE:
        stored = parameters.stored(directory, part)
        leaves = {
            path: dequantized(stored, path) if f"{path}_scale" in stored else leaf
            for path, leaf in parameters.flatten(params[part]).items()
        }
        params[part] = parameters.unflatten(params[part], leaves)
    return nnx.merge(graph, params)


def test_matrices_are_int8_and_half_as_large_as_bfloat16(checkpoint_dir, quantized):
    before = {part.name: part for part in info.parts(checkpoint_dir)}
    for part in info.parts(quantized):
        assert part.checksums
        if part.name not in LANGUAGE:
            assert part == before[part.name]
            continue
        assert "int8" in part.dtype
        stored = parameters.stored(quantized, part.name)
        for path, leaf in parameters.stored(checkpoint_dir, part.name).items():
            if stored[path].dtype != np.int8:
                np.testing.assert_array_equal(stored[path].read(), leaf.read())
                continue
            error = np.abs(dequantized(stored, path) - leaf.read().astype(np.float32))
            # Of an output's scale, which is its largest weight / 127: half of it by rounding, and
            # a quarter where the largest weight is cut.
            assert error.max() <= 0.75 / 127 * np.abs(leaf.read().astype(np.float32)).max()
    leaves = parameters.stored(quantized, "llm").values()
    matrices = sum(leaf.nbytes for leaf in leaves if leaf.dtype == np.int8)
    assert matrices > 0.9 * sum(leaf.nbytes for leaf in leaves)


@pytest.mark.slow
def test_logits_are_those_of_the_weights_that_the_integers_stand_for(checkpoint_dir, quantized):
    """And close to the original's: of both language models, and the frames of the encoder."""
    original, exact = load(checkpoint_dir), load_dequantized(quantized, checkpoint_dir)
    random = np.random.default_rng(0)
    ids = jnp.asarray(random.integers(0, 400, (2, 40)))
    positions = jnp.broadcast_to(jnp.arange(40), ids.shape)
    encoder = original.config.speech_encoder
    mel = jnp.asarray(random.standard_normal((1, 2 * encoder.frames, encoder.mels)), jnp.float32)

    @jax.jit
    def run(model):
        llm, _ = model.llm(model.llm.embed(ids), positions)
        speech, _ = model.speech_lm(model.speech_lm.embed(ids), positions)
        return model.llm.logits(llm), model.speech_lm.logits(speech), model.speech_encoder(mel)

    def distance(first, second) -> float:
        return float(jnp.linalg.norm(first - second) / jnp.linalg.norm(second))

    closest, figures = run(exact), run(load(quantized))
    for number, (before, after) in enumerate(zip(run(original), figures, strict=True)):
        assert distance(after, closest[number]) < 1e-5
        # Random weights of a width of 64: wide models, whose errors average out, lose less.
        assert 0 < distance(after, before) < 0.1
        if number < 2:
            assert (before.argmax(-1) == after.argmax(-1)).mean() > 0.85


def test_the_scale_follows_the_matmul(quantized):
    """The program multiplies by integers: no scaled copy of a matrix is made."""
    linear = Linear(nnx.Rngs(0), (8, 16), (None, None), weights="int8", bias=False)
    program = str(jax.make_jaxpr(lambda x: linear(x))(jnp.ones((2, 8), jnp.bfloat16)))
    lines = [line for line in program.splitlines() if " mul " in line]
    assert len(lines) == 1 and "bf16[2,16]" in lines[0]


def test_an_answer(quantized, checkpoint_dir):
    """Tied rows of units have their scales; a CPU gets the weights that the integers stand for."""
    config = Omni2Config.load(quantized / "config.json").only(*LANGUAGE)
    graph, params = parameters.load(quantized, config, jnp.bfloat16)
    scale = params["llm"]["embedding"]["table_scale"]
    assert scale.dtype == jnp.bfloat16 and params["llm"]["embedding"]["table"].dtype == jnp.int8
    ids = jnp.asarray([5, 6, 7, 2])
    integers, floats = (
        nnx.merge(*for_serving(graph, params, form_of(backend))).speech_lm
        for backend in ("tpu", "cpu")
    )
    rows, scales = integers.head_rows(5, 3, 2)
    np.testing.assert_array_equal(rows * scales[:, None], integers.embedding(ids))
    rows, scales = floats.head_rows(5, 3, 2)
    assert scales is None and rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, integers.embedding(ids))
    for _, module in nnx.iter_modules(floats):
        assert getattr(module, "kernel_scale", None) is None


def test_joined_matrices_keep_the_scales_of_their_outputs(quantized):
    """Queries, keys and values, gate and up, as GPUs serve them: the same numbers."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 64)), jnp.float32)
    config = Omni2Config.load(quantized / "config.json").only("llm")
    stored = parameters.load(quantized, config, jnp.float32)
    apart, joined = (
        nnx.merge(*for_serving(*stored, form)).llm.layers[1]
        for form in (Form(unrolled=True), form_of("gpu"))
    )
    for name in ("attention", "mlp"):
        module = getattr(joined, name)
        assert module.fused.kernel.dtype == jnp.int8
        assert module.fused.kernel_scale.shape == module.fused.kernel.shape[:-1]  # [out, in]
        expected = getattr(apart, name).same_inputs(x)
        for ours, other in zip(module.same_inputs(x), expected, strict=True):
            np.testing.assert_allclose(ours, other, atol=1e-6, rtol=0)


def test_refused(omni2, quantized, tmp_path):
    out = tmp_path / "out"
    line, *_ = omni2("join", quantized, "--quantize", "int8", "--out", out)
    assert is_error_line(line) and "int8 already" in line
    line, *_ = omni2("convert", "--to-torch", quantized, "--out", out)
    assert is_error_line(line) and "int8 weights" in line
    line, *_ = omni2("convert", "--to-torch", quantized, "--quantize", "int8", "--out", out)
    assert is_error_line(line) and "nothing else" in line
    assert not out.exists()


def test_it_becomes_float_again_and_can_be_trained(omni2, quantized, tmp_path, toy):
    """The numbers are those that the integers stand for; the rest stays as it is."""
    from omni2_jax.train.loop import Run

    out = tmp_path / "out"
    line, *_ = omni2("join", quantized, "--dequantize", "--quantize", "int8", "--out", out)
    assert is_error_line(line) and "exclude each other" in line
    assert omni2("join", quantized, "--dequantize", "--out", out)[0] == 0
    config = Omni2Config.load(out / "config.json")
    assert not precision.quantized_parts(config)
    assert precision.with_int8(config, LANGUAGE) == Omni2Config.load(quantized / "config.json")
    for part in parameters.parts(quantized):
        before, after = parameters.stored(quantized, part), parameters.stored(out, part)
        assert after.keys() == {path for path in before if not path.endswith("_scale")}
        for path, leaf in after.items():
            is_int8 = f"{path}_scale" in before
            expected = dequantized(before, path) if is_int8 else before[path].read()
            np.testing.assert_array_equal(leaf.read(), expected)
    line, *_ = omni2("join", out, "--dequantize", "--out", tmp_path / "again")
    assert is_error_line(line) and "nothing to dequantize" in line
    Run(dataclasses.replace(toy(), checkpoint=str(out), batch=8), tmp_path / "run")


def test_it_is_not_trained(toy, quantized, tmp_path):
    from omni2_jax.train.loop import Run

    with pytest.raises(ValueError, match=r"speech_lm has int8 weights.* --dequantize"):
        Run(dataclasses.replace(toy(), checkpoint=str(quantized)), tmp_path / "run")


def test_the_benchmark_reads_what_a_model_has_generated(text_model, text_engine):
    """The most likely token after those before is the one that a greedy answer has."""
    (stream,) = text_model.streams([clip("short_d")], options=GREEDY, slots=3)
    tokens = [token for reply in stream for token in reply.text_tokens]
    chances = Reader(text_model).log_probabilities(clip("short_d"), tokens)
    np.testing.assert_array_equal(chances.argmax(-1), tokens)
    np.testing.assert_allclose(np.exp(chances).sum(-1), 1, rtol=1e-4)


def test_the_figures_of_the_benchmark():
    one = Comparison(10, 9, (5.0, 6.0), units=8, equal_units=6, first_units=4)
    figures = summary([one, dataclasses.replace(one, tokens=30, equal_tokens=30, units=12)])
    assert figures["equal tokens"] == 39 / 40 and figures["equal units"] == 12 / 20
    assert figures["units before the first difference"] == 8 / 20
    assert figures["perplexity ratio"] == pytest.approx(np.exp(2 / 40))
