"""Speech encoder, adapter, both language models, gate fusion and the read/write rules against the
released PyTorch code.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.convert import read
from omni2_jax.generate import read_write
from omni2_jax.generate.options import Options
from omni2_jax.generate.read_write_state import IDLE, ReadWriteState, Request
from omni2_jax.models.model import SPEECH, abstract_model
from omni2_jax.models.stacks import scan
from tests.support.networks import compiled

CASES = "ABCDE"
INSIDE = "AB"  # cases whose inner states are kept, a single turn and a conversation
CLOSE = {"atol": 1e-4, "rtol": 0}
LOGITS = {"atol": 5e-4, "rtol": 0}


@pytest.fixture(scope="module")
def cases(goldens):
    return json.loads((goldens / "omni2" / "cases.json").read_text())["cases"]


@pytest.fixture(scope="module")
def arrays(goldens):
    return {name: np.load(goldens / "omni2" / f"case_{name}.npz") for name in CASES}


@pytest.fixture(scope="module")
def features(model, goldens):
    """Speech features of every clip, from the wav on."""
    return {
        clip: np.asarray(model.hear(goldens / "audio" / f"{clip}.wav")[0])
        for clip in ("speech_a", "speech_b", "synth_c")
    }


def prompt(case, golden, features):
    """Expanded ids [T] and features [F, D] of a case."""
    ids = np.concatenate([[SPEECH] * 300 if i == SPEECH else [i] for i in golden["input_ids"]])
    return ids, np.concatenate(
        [features[turn["clip"]] for turn in case["conversation"] if "clip" in turn]
    )


@functools.cache
def programs(model):
    """The compiled prefill and read/write step."""
    merge = functools.partial(nnx.merge, model.graph)
    prefill = jax.jit(
        lambda params, state, **turn: read_write.prefill(merge(params), state, **turn),
        donate_argnums=1,
    )
    step = jax.jit(
        lambda params, state, units_only: read_write.read_write(merge(params), state, units_only),
        donate_argnums=1,
        static_argnums=2,
    )
    return prefill, step


def generate(model, prompts, requests):
    """Greedy generation of several prompts in one batch -> per slot (text ids, speech ids)."""
    slots, longest = len(prompts), max(len(ids) for ids, _ in prompts)
    longest += -longest % 256  # for few compilations
    ids, features = (
        np.zeros((slots, longest), np.int32),
        np.zeros((slots, 600, prompts[0][1].shape[1]), np.float32),
    )
    for row, (row_ids, row_features) in enumerate(prompts):
        ids[row, : len(row_ids)], features[row, : len(row_features)] = row_ids, row_features
    prefill, step = programs(model)
    state = ReadWriteState.empty(model.config, slots, 1024, 1024)
    lengths = jnp.array([len(row_ids) for row_ids, _ in prompts])
    state = prefill(
        model.params,
        state,
        ids=jnp.asarray(ids),
        lengths=lengths,
        features=jnp.asarray(features),
        request=requests,
    )
    text, speech = [[] for _ in prompts], [[] for _ in prompts]
    for _ in range(100):
        state, output = step(model.params, state, False)
        for row in range(slots):
            text[row] += [int(t) for t in output.text_tokens[row] if t >= 0]
            speech[row] += [int(t) for t in output.speech_tokens[row] if t >= 0]
        if np.all(np.asarray(state.phase) == IDLE):
            return list(zip(text, speech, strict=True))
    raise AssertionError("generation does not end")


def request(model, case, slots=1):
    settings = dict(case["generate_kwargs"])
    text_eos = settings.pop("eos_token_id", None)
    options = Options(unit_temperature=0.0, max_flush_units=case["flush_cap"], **settings)
    return Request.of(model.config, options, text_eos=text_eos, batch=slots)


def test_speech_features(features, cases, arrays):
    for name in INSIDE:
        first = next(turn["clip"] for turn in cases[name]["conversation"] if "clip" in turn)
        np.testing.assert_allclose(features[first], arrays[name]["speech_features_0"], **CLOSE)


def test_encoder_inside(goldens):
    """An OpenAI Whisper file alone: after the convolutions, after every block, and after the last
    norm.
    """
    pytest.importorskip("torch")
    release = read.read_whisper(goldens / "whisper" / "tiny.pt")
    graph, _ = abstract_model(release.config)
    encoder = nnx.merge(
        graph, jax.tree.map(lambda leaf: jnp.asarray(leaf.read(), jnp.float32), release.params)
    ).speech_encoder
    golden = np.load(goldens / "whisper" / "speech_a.npz")
    mel = np.load(goldens / "audio" / "speech_a.npz")["logmel_pad30"].T

    @jax.jit
    def run(mel):
        x = encoder.embed(mel[None])
        _, blocks = scan(encoder.blocks, lambda block, x, _: (block(x), block(x)), x)
        return x, blocks, encoder.norm(blocks[-1])

    x, blocks, normed = run(jnp.asarray(mel))
    np.testing.assert_allclose(x[0][golden["rows"]], golden["conv_plus_pos"], **CLOSE)
    for i, block in enumerate(blocks):
        np.testing.assert_allclose(block[0][golden["rows"]], golden[f"block{i}"], **CLOSE)
    np.testing.assert_allclose(normed[0][golden["rows"]], golden["encoder_out"], **CLOSE)


@pytest.mark.parametrize("name", INSIDE)
def test_prefill(name, model, cases, arrays, features):
    golden = arrays[name]

    def run(parts, ids, speech):
        hidden, _ = parts.llm(parts.embed_prompt(ids, speech), jnp.arange(ids.shape[1])[None])
        return hidden[0], parts.llm.logits(hidden[0, -1])

    ids, speech = prompt(cases[name], golden, features)
    hidden, logits = compiled(model, run, ids[None], speech[None])
    np.testing.assert_allclose(hidden[-1], golden["prefill_hidden_last"], **CLOSE)
    np.testing.assert_allclose(hidden[-40:], golden["prefill_hidden_rows"], **CLOSE)
    np.testing.assert_allclose(logits, golden["prefill_logits"], **LOGITS)


@pytest.mark.parametrize("name", INSIDE)
def test_teacher_forced_hidden_states_and_fusion(name, model, arrays, features, cases):
    """The released step-by-step hidden states, logits, gates and fused rows, from one pass over
    prompt and answer.
    """
    golden = arrays[name]
    ids, speech = prompt(cases[name], golden, features)
    text = golden["text_ids"]

    def run(parts, embedded, speech, text):
        embeds = parts.embed_prompt(embedded, speech)
        hidden = parts.llm(embeds, jnp.arange(embeds.shape[1])[None])[0][
            0, len(ids) - 1 : -1
        ]  # the state that produced each token
        projected = parts.fusion.project(hidden)
        return {
            "hidden": hidden,
            "logits": parts.llm.logits(hidden),
            "fused": parts.fuse(hidden, text),
            "proj": projected,
            "gate": parts.fusion.gate_values(projected, parts.speech_lm.embed(text)),
        }

    found = compiled(model, run, np.concatenate([ids, text])[None], speech[None], text)
    np.testing.assert_allclose(found["hidden"], golden["step_hidden"], **CLOSE)
    np.testing.assert_allclose(found["logits"], golden["step_logits"], **LOGITS)
    for what in ("fused", "proj", "gate"):
        np.testing.assert_allclose(found[what], collect(golden, what), **CLOSE)


def steps(golden) -> int:
    """How many read/write steps a case has."""
    return len([key for key in golden.files if key.endswith("_fused")])


def collect(golden, what):
    """An array of every read/write step, joined."""
    return np.concatenate([golden[f"step{i}_{what}"] for i in range(steps(golden))])


@pytest.mark.parametrize("name", INSIDE)
def test_speech_logits(name, arrays, model):
    """The speech LM's first logits of every write, from one pass over its whole context."""

    def run(parts, context):
        hidden, _ = parts.speech_lm(context, jnp.arange(context.shape[1])[None])
        return parts.speech_lm.logits(hidden[0])

    golden = arrays[name]
    logits = compiled(model, run, golden["tts_inputs_final"][None])
    before, reads = 0, [len(golden[f"step{i}_fused"]) for i in range(steps(golden))]
    for i, rows in enumerate(reads):
        first = before + rows + (i == len(reads) - 1)  # <sep> follows the rows of the last read
        if f"step{i}_first_logits" in golden.files:
            np.testing.assert_allclose(logits[first - 1], golden[f"step{i}_first_logits"], **LOGITS)
        before = first + len(golden[f"step{i}_gen_ids"])


@pytest.mark.parametrize("name", CASES)
def test_greedy_sequences(name, model, cases, arrays, features):
    case, golden = cases[name], arrays[name]
    ((text, speech),) = generate(model, [prompt(case, golden, features)], request(model, case))
    assert text == golden["text_ids"].tolist()
    assert model.tokenizer.unit_text(speech) == case["prediction_units"]
    assert model.tokenizer.decode(text) == case["text"].strip()


def test_batch_of_different_lengths_equals_one_by_one(model, cases, arrays, features):
    """All five cases at once, each with its own prompt length, end token, caps and penalty."""
    prompts = [prompt(cases[name], arrays[name], features) for name in CASES]
    requests = [request(model, cases[name]) for name in CASES]
    together = generate(
        model, prompts, jax.tree.map(lambda *rows: jnp.concatenate(rows), *requests)
    )
    for name, (text, speech) in zip(CASES, together, strict=True):
        assert text == arrays[name]["text_ids"].tolist(), name
        assert model.tokenizer.unit_text(speech) == cases[name]["prediction_units"], name


@pytest.mark.slow
def test_sampling_does_not_depend_on_the_batch(model, cases, arrays, features):
    """The same key and prompt give the same answer alone and next to another slot."""
    prompts = [prompt(cases[name], arrays[name], features) for name in "CE"]
    options = Options(
        temperature=0.8, top_p=0.9, top_k=20, max_new_tokens=12, max_flush_units=20, seed=3
    )
    requests = Request.of(model.config, options, batch=2)
    together = generate(model, prompts, requests)
    for row in range(2):
        alone = generate(
            model,
            prompts[row : row + 1],
            jax.tree.map(lambda leaf: leaf[row : row + 1], requests),  # noqa: B023
        )
        assert alone == together[row : row + 1]


@pytest.mark.slow
def test_units_only_samples_nothing_else(model, cases, arrays, features):
    ids, speech = prompt(cases["A"], arrays["A"], features)
    options = Options(max_new_tokens=30, max_flush_units=50)
    prefill, step = programs(model)
    state = ReadWriteState.empty(model.config, 1, 1024, 1024)
    state = prefill(
        model.params,
        state,
        ids=jnp.asarray(ids)[None],
        lengths=jnp.array([len(ids)]),
        features=jnp.asarray(speech)[None],
        request=Request.of(model.config, options),
    )
    tokens, sampled = model.config.tokens, set()
    while int(state.phase[0]) != IDLE:
        state, output = step(model.params, state, True)
        sampled |= set(np.asarray(output.speech_tokens).ravel().tolist())
    assert len(sampled) > 50
    assert all(
        t in (-1, tokens.unit_eos) or tokens.sep < t <= tokens.sep + model.config.units
        for t in sampled
    )
