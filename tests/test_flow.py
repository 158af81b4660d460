"""Flow matching against CosyVoice2's numbers, and what its masks promise."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni2_jax.checkpoint.parameters import flatten
from omni2_jax.config import FlowConfig
from omni2_jax.convert import formats
from omni2_jax.convert.plan import ConversionError, plan, unplan
from omni2_jax.convert.tables import flow as tables
from omni2_jax.models.flow.mask import Chunks, Window
from omni2_jax.models.flow.matching import Flow, Prompt, cosine
from tests.support.compare import close
from tests.support.networks import TINY_FLOW as TINY
from tests.support.networks import abstract_model, full_pass, tiny_flow
from tests.support.networks import decoder_golden as golden
from tests.support.paths import DECODER, GOLDENS

RELEASED = Chunks(50)
LENGTHS = (13, 47, 60, 113)


@pytest.fixture(scope="module")
def flow() -> Flow:
    return tiny_flow()


def padded(rows: list[np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Rows of different lengths as one batch, and their lengths."""
    longest = max(map(len, rows))
    return jnp.stack(
        [jnp.pad(jnp.asarray(row), (0, longest - len(row))) for row in rows]
    ), jnp.array([len(row) for row in rows])


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x).swapaxes(-1, -2)


def windows(frames: int, lengths, chunks: Chunks = RELEASED) -> tuple[Window, Window]:
    lengths = jnp.asarray(lengths)
    return Window.whole(frames, lengths, chunks, 1), Window.whole(
        2 * frames, 2 * lengths, chunks, 2
    )


# --- conversion


def test_table_fits_the_real_dimensions():
    keys = json.loads((GOLDENS / "manifests" / "flow.json").read_text())["keys"]
    planned = plan(
        tables.table(), formats.abstract(keys), abstract_model(Flow, FlowConfig())[1], "flow.json"
    )
    assert planned["noise"].shape == (15000, 80)
    keys.pop("encoder.up_encoders.3.norm_ff.bias")
    with pytest.raises(ConversionError, match=r"missing encoder.up_encoders.3.norm_ff.bias"):
        plan(
            tables.table(),
            formats.abstract(keys),
            abstract_model(Flow, FlowConfig())[1],
            "flow.json",
        )


def test_conversion_round_trips_and_draws_the_noise_once():
    pytest.importorskip("torch")
    source = formats.torch_file(DECODER / "flow.pt")
    params = jax.tree.map(
        lambda leaf: leaf.read(),
        plan(tables.table(), source, abstract_model(Flow, TINY)[1], "flow.pt"),
    )
    back = dict(unplan(tables.table(), flatten(params).__getitem__))
    assert back.keys() == source.keys()
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, source[name].read(), name)
    again = plan(tables.table(), source, abstract_model(Flow, TINY)[1], "flow.pt")["noise"].read()
    np.testing.assert_array_equal(params["noise"], again)
    assert abs(params["noise"].std() - 1) < 0.01 and abs(params["noise"].mean()) < 0.01


# --- parity


def test_encoder(flow):
    want = golden("encoder")
    units, lengths = padded([want[f"L{n}_token"] for n in LENGTHS])
    seen = windows(units.shape[1], lengths)
    h = jax.jit(lambda u: flow.encoder(flow.embed(u), *seen, None)[0])(units)
    for row, n in zip(h, LENGTHS, strict=True):
        close(row[: 2 * n], want[f"L{n}_h"], 1e-4)


def test_encoder_stages(flow):
    want, encoder = golden("encoder"), flow.encoder
    x = encoder.embed(flow.embed(jnp.asarray(want["L13_token"])[None]))
    close(x[0], want["L0_embed"], 1e-4)
    close(encoder.look_ahead(x, windows(13, [13])[0], None)[0][0], want["L0_prelook"], 1e-4)
    blocks = jnp.asarray(want["L0_after_blocks"])[None]
    close(
        encoder.upsample(jnp.repeat(blocks, 2, axis=1), windows(13, [13])[1], None)[0][0],
        want["L0_after_upconv"],
        1e-4,
    )


def test_padding_of_a_reference_batch_reaches_its_last_units(flow):
    """The reference masks the units of a batch before its input layer, not after it.

    The layer's bias and norm make nonzero numbers of the padding, which the look-ahead of the last
    three real units then mixes in. With padding marked as valid our numbers equal the reference's;
    ours are those of the row alone.
    """
    want = golden("encoder")
    units, (long, short) = jnp.asarray(want["B2_token"]), want["B2_len"]
    encode = jax.jit(lambda x, seen, frames: flow.encoder(x, seen, frames, None)[0])
    seen, frames = windows(units.shape[1], want["B2_len"])
    x = flow.embed(units) * seen.valid[..., None]
    leaky = encode(x, dataclasses.replace(seen, valid=jnp.ones_like(seen.valid)), frames)
    close(leaky[0, : 2 * long], want["B2_h"][0, : 2 * long], 1e-4)
    close(leaky[1, : 2 * short], want["B2_h"][1, : 2 * short], 1e-4)
    alone = encode(flow.embed(units[1:, :short]), *windows(short, [short]))[0]
    close(encode(x, seen, frames)[1, : 2 * short], alone, 1e-5)
    assert jnp.abs(alone - want["B2_h"][1, : 2 * short]).max() > 0.1


def test_estimator(flow):
    want = golden("estimator")
    lengths = jnp.asarray(want["mask"].sum((1, 2)), jnp.int32)
    frames = want["x"].shape[2]
    given = jnp.concatenate(
        [want["mu"], np.repeat(want["spks"][:, :, None], frames, 2), want["cond"]], 1
    )
    t = jnp.asarray(want["t"])
    close(flow.estimator.time(t), want["time_emb"], 1e-4)
    seen = Window.whole(frames, lengths, RELEASED, 2)
    velocity, _ = jax.jit(flow.estimator)(
        channels_last(want["x"]), channels_last(given), t, seen, None
    )
    close(velocity, want["out"].swapaxes(1, 2), 1e-4)


def test_voice_and_mu(flow):
    want, units = golden("flow"), golden("encoder")["L13_token"]
    close(flow.voice(jnp.asarray(want["embedding"])[None])[0], want["spk_projected"], 1e-6)
    mu = jax.jit(flow.mu, static_argnums=2)(jnp.asarray(units)[None], jnp.array([13]), RELEASED)
    close(mu[0], want["L13_noprompt_final_mu"].T, 1e-4)
    close(cosine(jnp.linspace(0, 1, TINY.steps + 1))[:-1], want["euler_t"], 1e-6)


@pytest.mark.slow
def test_mel_of_every_golden_in_one_batch(flow):
    """All lengths, with and without a prompt, final and not. The reference ran each one alone."""
    want, units = golden("flow"), golden("encoder")
    names = [name for name in want if name.endswith("_mel")]
    batch, lengths = padded([units[name.split("_")[0] + "_token"] for name in names])
    prompted, final, rows = (
        np.array(["_prompt_" in name for name in names]),
        np.array(["final" in name for name in names]),
        len(names),
    )
    prompt = Prompt(
        jnp.tile(want["prompt_token"], (rows, 1)),
        jnp.tile(want["prompt_feat"], (rows, 1, 1)),
        jnp.where(prompted, 20, 0),
    )
    voice = jnp.tile(flow.voice(jnp.asarray(want["embedding"])[None]), (rows, 1))
    mel, frames = full_pass()(batch, lengths, voice, final, prompt)
    assert mel.shape == (rows, 2 * batch.shape[1], 80) and len(names) == 12
    for row, count, name in zip(mel, frames, names, strict=True):
        assert count == want[name].shape[1]
        close(row[:count].T, want[name], 5e-4)
        assert not row[count:].any()


def test_training_loss(flow):
    want = golden("cfm_loss")
    mel, mu, cond, z = (channels_last(want[name]) for name in ("x1", "mu", "cond", "z"))
    lengths = jnp.asarray(want["mask"].sum((1, 2)), jnp.int32)
    kept = jnp.asarray(want["cfg_uniform"]) > TINY.guidance_dropout
    t = jnp.asarray(want["t_uniform"][:, 0, 0])
    close(cosine(t), want["t_cosine"][:, 0, 0], 1e-6)
    total, terms = jax.jit(flow.compute_loss)(
        mel, lengths, mu, jnp.asarray(want["spks"]), cond, t, z, kept
    )
    close(total / terms, want["loss"][0], 1e-4)


# --- properties


@pytest.mark.parametrize(
    "chunks",
    [
        Chunks(5),
        Chunks(5, left=0),
        Chunks(4, left=2),
        Chunks(4, shift=3),
        Chunks(3, left=1, shift=2),
    ],
)
def test_visible_frames(chunks):
    """The mask against one that is built chunk by chunk."""
    borders = [0, *range(chunks.size - chunks.shift, 40, chunks.size)]
    members = [range(a, b) for a, b in itertools.pairwise(borders)]
    chunk = {unit: c for c, units in enumerate(members) for unit in units}
    index = jnp.arange(24)[None]
    drawn = chunks.visible(index, index, rate=2)[0]
    for i in range(24):
        for j in range(24):
            behind = chunk[i // 2] - chunk[j // 2]
            assert drawn[i, j] == (behind >= 0 and (chunks.left is None or behind <= chunks.left))
    assert not chunks.visible(index, jnp.full((1, 3), -1), rate=2).any()


CHUNKS = Chunks(10)  # with 30 units in 4 rows: one compilation for the three tests that follow


def test_mel_depends_on_its_chunk_the_past_and_three_units_more():
    """Mel frames 20 to 39 (chunk 1: units 10 to 19) see units 0 to 22."""
    units = np.tile(np.arange(30), (4, 1))
    for row, changed in enumerate((0, 22, 23), start=1):
        units[row, changed] = 500
    mel, _ = full_pass()(
        jnp.asarray(units), jnp.full(4, 30), jnp.ones((4, 80)), jnp.full(4, True), None, CHUNKS
    )
    first, last, behind = np.abs(mel[1:, 20:40] - mel[0, 20:40]).max((1, 2))
    assert min(first, last) > 1e-3 and behind == 0
    assert (np.abs(mel[3, 40:] - mel[0, 40:]).max(1) > 0).all()


@pytest.mark.nightly  # the goldens that test_mel_of_every_golden_in_one_batch has were made alone
def test_a_batch_equals_its_rows():
    rng = np.random.default_rng(0)
    units, lengths = jnp.asarray(rng.integers(0, TINY.units, (4, 30))), jnp.array([30, 17, 3, 1])
    voice, final = (
        jnp.asarray(rng.standard_normal((4, 80)), jnp.float32),
        jnp.array([True, False, True, False]),
    )
    together, frames = full_pass()(units, lengths, voice, final, None, CHUNKS)
    np.testing.assert_array_equal(frames, [60, 28, 6, 0])
    alone, _ = full_pass()(units[1:2, :17], lengths[1:2], voice[1:2], final[1:2], None, CHUNKS)
    close(together[1, :28], alone[0, :28], 1e-5)


def test_one_compilation_serves_all_lengths():
    given = jnp.zeros((4, 30), jnp.int32), jnp.zeros((4, 80))
    before = full_pass().func._cache_size()
    for lengths, final in (((1, 2, 3, 4), True), ((30, 20, 10, 5), False)):
        full_pass()(given[0], jnp.array(lengths), given[1], jnp.full(4, final), None, CHUNKS)
    assert full_pass().func._cache_size() - before <= 1


def test_more_units_than_noise_is_an_error(flow):
    with pytest.raises(ValueError, match="602 mel frames; the flow's noise has 600"):
        jax.eval_shape(flow, jnp.zeros((1, 301), jnp.int32), jnp.array([301]), jnp.zeros((1, 80)))
