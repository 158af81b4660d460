"""Flow matching against CosyVoice2's numbers, and what its masks promise."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import sources
from convert.engine import ConversionError, plan, unplan
from convert.tables import flow as tables
from omni2_jax.config import FlowConfig
from omni2_jax.flow.context import Chunks, Window
from omni2_jax.flow.matching import Flow, Prompt, cosine

GOLDENS = Path(__file__).parent / "goldens"
RELEASED = Chunks(50)
LENGTHS = (13, 47, 60, 113)
TINY = FlowConfig(
    width=64,
    heads=4,
    hidden=128,
    layers=2,
    channels=48,
    estimator_heads=4,
    estimator_head_size=16,
    blocks=1,
    mid_blocks=2,
    noise_frames=600,
)


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / "cosy2_decoder" / f"{name}.npz"))


def abstract(config: FlowConfig):
    graph, state = nnx.split(nnx.eval_shape(lambda: Flow(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


@functools.cache
def tiny_flow() -> Flow:
    """The tiny release, with the noise that its goldens were made with."""
    path = GOLDENS / "cosy2_decoder" / "flow.pt"
    graph, shapes = abstract(TINY)
    params = plan(tables.table(), sources.torch_file(path), shapes, path.name)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf.read()), params)
    return nnx.merge(graph, params | {"noise": jnp.asarray(golden("rand_noise")["rand_noise"][0].T)})


@pytest.fixture(scope="module")
def flow() -> Flow:
    return tiny_flow()


@functools.cache
def full_pass():
    """The whole flow, compiled once for each shape: (units, lengths, voice, final, prompt, chunks)."""
    return jax.jit(tiny_flow().__call__, static_argnums=5)


def padded(rows: list[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Rows of different lengths as one batch, and their lengths."""
    longest = max(map(len, rows))
    return jnp.stack([jnp.pad(jnp.asarray(row), (0, longest - len(row))) for row in rows]), jnp.array([len(row) for row in rows])


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x).swapaxes(-1, -2)


def windows(frames: int, lengths, chunks: Chunks = RELEASED) -> tuple[Window, Window]:
    lengths = jnp.asarray(lengths)
    return Window.whole(frames, lengths, chunks, 1), Window.whole(2 * frames, 2 * lengths, chunks, 2)


def close(ours, theirs, tolerance: float):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance)


# --- conversion


def test_table_fits_the_real_dimensions():
    keys = json.loads((GOLDENS / "manifests" / "flow.json").read_text())["keys"]
    planned = plan(tables.table(), sources.abstract(keys), abstract(FlowConfig())[1], "flow.json")
    assert planned["noise"].shape == (15000, 80)
    keys.pop("encoder.up_encoders.3.norm_ff.bias")
    with pytest.raises(ConversionError, match=r"missing encoder.up_encoders.3.norm_ff.bias"):
        plan(tables.table(), sources.abstract(keys), abstract(FlowConfig())[1], "flow.json")


def test_conversion_round_trips_and_draws_the_noise_once():
    source = sources.torch_file(GOLDENS / "cosy2_decoder" / "flow.pt")
    params = jax.tree.map(lambda leaf: leaf.read(), plan(tables.table(), source, abstract(TINY)[1], "flow.pt"))
    back = dict(unplan(tables.table(), params))
    assert back.keys() == source.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, source[name].read(), name)
    again = plan(tables.table(), source, abstract(TINY)[1], "flow.pt")["noise"].read()
    np.testing.assert_array_equal(params["noise"], again)
    assert abs(params["noise"].std() - 1) < 0.01 and abs(params["noise"].mean()) < 0.01


# --- parity


def test_encoder(flow):
    want = golden("encoder")
    units, lengths = padded([want[f"L{n}_token"] for n in LENGTHS])
    seen = windows(units.shape[1], lengths)
    h = jax.jit(lambda u: flow.encoder(flow.embed(u), *seen))(units)
    for row, n in zip(h, LENGTHS, strict=True):
        close(row[: 2 * n], want[f"L{n}_h"], 1e-4)


def test_encoder_stages(flow):
    want, encoder = golden("encoder"), flow.encoder
    x = encoder.embed(flow.embed(jnp.asarray(want["L13_token"])[None]))
    close(x[0], want["L0_embed"], 1e-4)
    close(encoder.look_ahead(x)[0], want["L0_prelook"], 1e-4)
    blocks = jnp.asarray(want["L0_after_blocks"])[None]
    close(encoder.upsample(jnp.repeat(blocks, 2, axis=1))[0], want["L0_after_upconv"], 1e-4)


def test_padding_of_a_reference_batch_reaches_its_last_units(flow):
    """In a batch, the reference masks units before the input layer, whose bias and norm make something of the zeros, and the
    look-ahead of the last three real units sees that. Letting padding through there gives its numbers; we do not let it through."""
    want = golden("encoder")
    units, (long, short) = jnp.asarray(want["B2_token"]), want["B2_len"]
    seen, frames = windows(units.shape[1], want["B2_len"])
    x = flow.embed(units) * seen.valid[..., None]
    leaky = flow.encoder(x, dataclasses.replace(seen, valid=jnp.ones_like(seen.valid)), frames)
    close(leaky[0, : 2 * long], want["B2_h"][0, : 2 * long], 1e-4)
    close(leaky[1, : 2 * short], want["B2_h"][1, : 2 * short], 1e-4)
    alone = flow.encoder(flow.embed(units[1:, :short]), *windows(short, [short]))[0]
    close(flow.encoder(x, seen, frames)[1, : 2 * short], alone, 1e-5)
    assert jnp.abs(alone - want["B2_h"][1, : 2 * short]).max() > 0.1


def test_estimator(flow):
    want = golden("estimator")
    lengths = jnp.asarray(want["mask"].sum((1, 2)), jnp.int32)
    frames = want["x"].shape[2]
    given = jnp.concatenate([want["mu"], np.repeat(want["spks"][:, :, None], frames, 2), want["cond"]], 1)
    t = jnp.asarray(want["t"])
    close(flow.estimator.time(t), want["time_emb"], 1e-4)
    seen = Window.whole(frames, lengths, RELEASED, 2)
    close(flow.estimator(channels_last(want["x"]), channels_last(given), t, seen), want["out"].swapaxes(1, 2), 1e-4)


def test_voice_and_mu(flow):
    want, units = golden("flow"), golden("encoder")["L13_token"]
    close(flow.voice(jnp.asarray(want["embedding"])[None])[0], want["spk_projected"], 1e-6)
    mu = flow.mu(jnp.asarray(units)[None], jnp.array([13]), RELEASED)
    close(mu[0], want["L13_noprompt_final_mu"].T, 1e-4)
    close(cosine(jnp.linspace(0, 1, TINY.steps + 1))[:-1], want["euler_t"], 1e-6)


@pytest.mark.parametrize("with_prompt", [False, True])
def test_mel_at_every_length_final_and_not_in_one_batch(flow, with_prompt):
    want, units = golden("flow"), golden("encoder")
    cases = [(n, end) for n in LENGTHS for end in ("final", "stream") if f"L{n}_{'' if with_prompt else 'no'}prompt_{end}_mel" in want]
    batch, lengths = padded([units[f"L{n}_token"] for n, _ in cases])
    prompt, rows = None, len(cases)
    if with_prompt:
        prompt = Prompt(jnp.tile(want["prompt_token"], (rows, 1)), jnp.tile(want["prompt_feat"], (rows, 1, 1)), jnp.full(rows, 20))
    voice = jnp.tile(flow.voice(jnp.asarray(want["embedding"])[None]), (rows, 1))
    mel, frames = full_pass()(batch, lengths, voice, jnp.array([end == "final" for _, end in cases]), prompt)
    assert mel.shape == (rows, 2 * batch.shape[1], 80)
    for row, count, (n, end) in zip(mel, frames, cases, strict=True):
        theirs = want[f"L{n}_{'' if with_prompt else 'no'}prompt_{end}_mel"].T
        assert count == len(theirs) == 2 * n - (0 if end == "final" else 6)
        close(row[:count], theirs, 5e-4)
        assert not row[count:].any()


def test_training_loss(flow):
    want = golden("cfm_loss")
    mel, mu, cond, z = (channels_last(want[name]) for name in ("x1", "mu", "cond", "z"))
    lengths = jnp.asarray(want["mask"].sum((1, 2)), jnp.int32)
    kept = jnp.asarray(want["cfg_uniform"]) > TINY.guidance_dropout
    t = jnp.asarray(want["t_uniform"][:, 0, 0])
    close(cosine(t), want["t_cosine"][:, 0, 0], 1e-6)
    close(flow.compute_loss(mel, lengths, mu, jnp.asarray(want["spks"]), cond, t, z, kept), want["loss"][0], 1e-4)


# --- properties


@pytest.mark.parametrize("chunks", [Chunks(5), Chunks(5, left=0), Chunks(4, left=2), Chunks(4, shift=3), Chunks(3, left=1, shift=2)])
def test_who_sees_whom(chunks):
    """Chunk by chunk, as one would draw it."""
    borders = [0, *range(chunks.size - chunks.shift, 40, chunks.size)]
    members = [range(a, b) for a, b in zip(borders, borders[1:], strict=False)]
    chunk = {unit: c for c, units in enumerate(members) for unit in units}
    index = jnp.arange(24)[None]
    drawn = chunks.sees(index, index, rate=2)[0]
    for i in range(24):
        for j in range(24):
            behind = chunk[i // 2] - chunk[j // 2]
            assert drawn[i, j] == (behind >= 0 and (chunks.left is None or behind <= chunks.left))
    assert not chunks.sees(index, jnp.full((1, 3), -1), rate=2).any()


def test_mel_depends_on_its_chunk_the_past_and_three_units_more(flow):
    """By gradient: chunk 1 of three (units 10 to 19) sees units 0 to 22."""

    def energy(x):
        units = jnp.full(1, 30)
        h = flow.encoder(x, *windows(30, units, chunks))
        mu = flow.project(h)
        window = Window.whole(60, 2 * units, chunks, 2)
        given = jnp.concatenate([mu, jnp.zeros_like(mu), jnp.zeros_like(mu)], -1)
        return jnp.square(flow.estimator(flow.noise[:60][None], given, jnp.array([0.5]), window)[:, 20:40]).sum()

    chunks = Chunks(10)
    x = flow.embed(jnp.arange(30)[None])
    reach = jnp.abs(jax.jit(jax.grad(energy))(x)).max((0, 2))
    assert (reach[:23] > 0).all() and not reach[23:].any()


def test_a_batch_equals_its_rows_and_compiles_once(flow):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, TINY.units, n) for n in (23, 9, 3, 1)]
    units, lengths = padded(rows)
    voice, final = jnp.asarray(rng.standard_normal((4, 80)), jnp.float32), jnp.array([True, False, True, False])
    chunks, run = Chunks(5, left=1), jax.jit(tiny_flow().__call__, static_argnums=5)
    together, frames = run(units, lengths, voice, final, None, chunks)
    np.testing.assert_array_equal(frames, [46, 12, 6, 0])
    for i in (1, 2):
        n = len(rows[i])
        alone, _ = tiny_flow()(units[i : i + 1, :n], lengths[i : i + 1], voice[i : i + 1], final[i : i + 1], None, chunks)
        close(together[i, : frames[i]], alone[0, : frames[i]], 1e-5)
    run(units, lengths - 1, voice, ~final, None, chunks)
    assert run._cache_size() == 1


def test_prompts_of_different_lengths(flow):
    """A prompt is units and mel in front: rows with 0, 4 and 6 of them in one batch equal the same rows alone."""
    rng = np.random.default_rng(1)
    prompt = Prompt(
        jnp.asarray(rng.integers(0, 99, (3, 6))), jnp.asarray(rng.standard_normal((3, 12, 80)), jnp.float32), jnp.array([0, 4, 6])
    )
    units, lengths = padded([rng.integers(0, 99, n) for n in (8, 5, 7)])
    voice = jnp.ones((3, 80))
    mel, frames = full_pass()(units, lengths, voice, True, prompt, Chunks(5))
    for i, p in enumerate((0, 4, 6)):
        row = slice(i, i + 1)
        own = Prompt(prompt.units[row, :p], prompt.mel[row, : 2 * p], prompt.lengths[row]) if p else None
        alone, _ = tiny_flow()(units[row, : lengths[i]], lengths[row], voice[row], True, own, Chunks(5))
        close(mel[i, : frames[i]], alone[0], 1e-5)


def test_more_units_than_noise_is_an_error(flow):
    with pytest.raises(ValueError, match="602 mel frames; the flow's noise has 600"):
        jax.eval_shape(flow, jnp.zeros((1, 301), jnp.int32), jnp.array([301]), jnp.zeros((1, 80)))
