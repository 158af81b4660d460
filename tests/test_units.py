"""Stage "units": its losses and measurements by hand, and training on a few short recordings."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from omni2_jax.checkpoint import parameters
from omni2_jax.config import Omni2Config, SpeechTokenizerConfig
from omni2_jax.configs import voice_units
from omni2_jax.models import speech_tokenizer
from omni2_jax.models.layers import Conv1d, DepthwiseConv1d
from omni2_jax.models.speech_tokenizer import SpeechTokenizer, bounded, straight_through
from omni2_jax.sharding import make_mesh
from omni2_jax.train import weights
from omni2_jax.train.data import prepare
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.loop import Run
from omni2_jax.train.settings import Bucket, MeshConfig, OptimizerConfig, TrainConfig
from omni2_jax.train.stages import stage_of
from omni2_jax.train.stages.units import ctc_losses, spread
from omni2_jax.train.unit_heads import edit_distance, greedy, labels_of
from tests.support.compare import tree_equal
from tests.support.paths import EXAMPLES
from tests.support.runs import reported, toy_config

SMALL = SpeechTokenizerConfig(mels=80, width=32, layers=1, heads=2, digits=8, fsmn_taps=7)


# ---- the quantizer and the network ----


def test_straight_through():
    """Rounded digits; the gradient is that of the continuous path, to the bit."""
    x = jnp.array([-3.0, -0.6, -0.5, 0.0, 0.54, 0.56, 2.0])
    np.testing.assert_allclose(straight_through(x), [-1, -1, 0, 0, 0, 1, 1], rtol=0, atol=1e-6)
    slopes = jax.vmap(jax.grad(straight_through))(x)
    np.testing.assert_array_equal(slopes, jax.vmap(jax.grad(bounded))(x))
    assert np.all(slopes > 0)


def test_units_of_digits():
    """They are what `quantize` makes of the same hidden states."""
    tokenizer = SpeechTokenizer(SMALL, nnx.Rngs(0))
    hidden = jax.random.normal(jax.random.key(1), (2, 5, SMALL.width))
    digits = straight_through(tokenizer.project(hidden))
    units = speech_tokenizer.units_of_digits(digits)
    np.testing.assert_array_equal(units, tokenizer.quantize(hidden))
    assert len(np.unique(units)) > 5


def test_depthwise_convolution():
    """A sum of shifted inputs is the convolution, and so are its gradients."""
    shape, options = (7, 1, 6), {"padding": (2, 3), "groups": 6, "bias": False}
    split = [nnx.split(kind(nnx.Rngs(0), shape, **options)) for kind in (DepthwiseConv1d, Conv1d)]
    x = jax.random.normal(jax.random.key(0), (2, 11, 6))

    def gradients(graph, params):
        def value(params, x):
            return jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))

        return jax.tree.leaves(jax.value_and_grad(value, (0, 1))(params, x))

    for ours, plain in zip(*(gradients(*pair) for pair in split), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)


# ---- losses and measurements ----


def test_ctc_by_hand():
    """Against the sum over all paths; rows differ in length, and one is empty."""
    logits = jax.random.normal(jax.random.key(0), (3, 4, 3))
    lengths, labels = jnp.array([4, 3, 0]), jnp.array([[1, 1], [2, -1], [-1, -1]])
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))

    def expected(row: int, label: list[int]) -> float:
        total = 0.0
        for path in itertools.product(range(3), repeat=int(lengths[row])):
            if [s for s, _ in itertools.groupby(path) if s] == label:
                total += np.exp(sum(log_probabilities[row, t, s] for t, s in enumerate(path)))
        return -np.log(total)

    np.testing.assert_allclose(
        jax.jit(ctc_losses)(logits, lengths, labels),
        [expected(0, [1, 1]), expected(1, [2]), 0],
        rtol=1e-5,
    )


def test_spread_by_hand():
    """Mean 1 and variance 4 of one digit, 0 and 1 of the other; padding is ignored."""
    digits = jnp.array([[[-1.0, 1.0], [3.0, -1.0], [50.0, 50.0]]])
    valid = jnp.array([[True, True, False]])
    np.testing.assert_allclose(spread(digits, valid), ((1 + 9) + 0) / 2, rtol=1e-6)


def test_text_as_labels():
    assert bytes(labels_of("It's  FIVE, o'clock - no. 7!").tolist()) == b"its five oclock no 7"
    assert bytes(labels_of("Größe").tolist()).decode() == "grösse"
    assert not len(labels_of("... - !"))


def test_greedy_symbols():
    symbols = jnp.array([[1, 1, 0, 1, 2, 2], [0, 3, 3, 3, 4, 4]])
    chosen, counts = greedy(jax.nn.one_hot(symbols, 5), jnp.array([6, 4]))
    found = [row[kept].tolist() for row, kept in zip(np.asarray(chosen), counts, strict=True)]
    assert found == [[1, 1, 2], [3]]


def test_edit_distance():
    """Against the textbook's recursion, on random sequences and an empty one."""
    random = np.random.default_rng(0)
    symbols, labels = random.integers(1, 4, (6, 9)), random.integers(1, 4, (6, 7))
    counts, lengths = random.random((6, 9)) < 0.7, np.array([7, 5, 3, 1, 0, 6])
    counts[3] = False

    def distance(a: list, b: list) -> int:
        if not a or not b:
            return len(a) + len(b)
        rest = distance(a[1:], b[1:]) + (a[0] != b[0])
        return min(rest, distance(a[1:], b) + 1, distance(a, b[1:]) + 1)

    expected = [
        distance(symbols[i][counts[i]].tolist(), labels[i][: lengths[i]].tolist()) for i in range(6)
    ]
    assert edit_distance(symbols, counts, labels, lengths).tolist() == expected


# ---- training ----


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """The replies of the example dialogues as recordings with their text."""
    folder = tmp_path_factory.mktemp("voice")
    dialogues = (EXAMPLES / "training" / "data.jsonl").read_text().splitlines()
    turns = [turn for line in dialogues for turn in json.loads(line)["turns"][1::2]]
    lines = [
        {"audio": str(EXAMPLES / "training" / turn["audio"]), "text": turn["text"]}
        for turn in turns
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare.prepare(folder, folder / "data")
    return folder / "data"


def with_tokenizer(checkpoint: Path, out: Path, config: SpeechTokenizerConfig) -> Path:
    """A copy of a checkpoint, with a new speech tokenizer."""
    shutil.copytree(checkpoint, out)
    params = nnx.to_pure_dict(nnx.state(SpeechTokenizer(config, nnx.Rngs(0))))
    parameters.save_part(out, "speech_tokenizer", params)
    speech_tokenizer.save_config(out, config)
    return out


@pytest.fixture(scope="module")
def start(checkpoint_dir, tmp_path_factory) -> Path:
    return with_tokenizer(checkpoint_dir, tmp_path_factory.mktemp("start") / "ckpt", SMALL)


@pytest.fixture(scope="module")
def settings(start, recordings) -> TrainConfig:
    return toy_config(
        voice_units.config,
        start,
        recordings,
        batch=5,
        steps=120,
        validation=str(recordings),
        validate_every=60,
        save_every=60,
        optimizer=OptimizerConfig(peak=1e-2),
    )


def run(settings: TrainConfig, out: Path) -> None:
    Run(settings, out, jax.devices()[:1]).go()


@pytest.fixture(scope="module")
def trained(settings, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("units") / "run"
    run(settings, out)
    return out


@pytest.mark.slow
def test_stage_learns(trained):
    """The loss falls to a tenth; letters are recognised; every value of a digit is in use."""
    values = list(reported(trained).values())
    assert np.mean(values[-5:]) < values[0] / 10
    measured = {
        name: list(reported(trained, name).values())
        for name in (
            "character_error_rate",
            "mel_error",
            "units_used",
            "perplexity",
            "rarest_digit",
        )
    }
    assert measured["character_error_rate"][-1] < 0.2
    assert measured["mel_error"][-1] < measured["mel_error"][0]
    assert measured["rarest_digit"][-1] > 0.05
    assert 50 < measured["perplexity"][-1] <= measured["units_used"][-1]


@pytest.mark.slow
def test_the_result_makes_units(trained, recordings, tmp_path):
    """The exported part lacks the heads, and `omni2 prepare` makes units with it."""
    final = trained / "final"
    assert not (final / "params" / "heads").exists()
    prepare.prepare(recordings.parent / "metadata.jsonl", tmp_path / "data", speech_tokenizer=final)
    data = Dataset(tmp_path / "data")
    for index in range(len(data)):
        (turn,) = data.dialogue(index).turns
        assert abs(len(turn.units) - turn.samples / 960) <= 1 and len(np.unique(turn.units)) > 5


@pytest.mark.slow
def test_other_parts_do_not_change_by_a_bit(trained, start):
    def files(directory: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(directory)): path.read_bytes()
            for path in directory.rglob("*")
            if path.is_file() and "params/speech_tokenizer" not in str(path)
        }

    before = files(start)
    assert any(name.startswith("params/llm/") for name in before)
    assert files(trained / "final") == before


@pytest.mark.nightly  # tests/test_flow_stage.py and test_vocoder_stage.py resume runs, too
def test_resumed(trained, settings, tmp_path):
    """A run that was killed before its second save goes on from the first, bit for bit."""
    cut = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("final"))
    shutil.rmtree(cut / "steps" / "120")
    run(settings, cut)
    for name in ("loss", "validation_loss", "perplexity"):
        assert reported(tmp_path / "run", name) == reported(trained, name)
    ours, expected = (
        {
            path: leaf.read()
            for path, leaf in parameters.stored(out / "final", "speech_tokenizer").items()
        }
        for out in (tmp_path / "run", trained)
    )
    assert tree_equal(ours, expected)


@pytest.mark.nightly  # .ci/run trains stage 1b on meshes
def test_on_a_mesh(trained, settings, tmp_path):
    """The first losses are those of one device."""
    changes = {"batch": 4, "steps": 3, "validation": None}
    for name, mesh in (("alone", MeshConfig()), ("mesh", MeshConfig(1, 2, 2))):
        devices = jax.devices()[: 1 if name == "alone" else 4]
        train = dataclasses.replace(settings, mesh=mesh, **changes)
        Run(train, tmp_path / name, devices).go()
    meshed, alone = (list(reported(tmp_path / name).values()) for name in ("mesh", "alone"))
    np.testing.assert_allclose(meshed, alone, rtol=0, atol=1e-3)


def test_too_many_units_for_a_data_set(checkpoint_dir, tmp_path):
    """Units are stored in 16 bits, and data sets hold the released tokenizer's 6561."""
    nine = with_tokenizer(checkpoint_dir, tmp_path / "nine", dataclasses.replace(SMALL, digits=9))
    with pytest.raises(ValueError, match="nine makes 19683 different units; a data set holds 6561"):
        prepare.prepare(EXAMPLES / "training", tmp_path / "data", speech_tokenizer=nine)
    assert not (tmp_path / "data").exists()


# ---- a Whisper encoder to start from ----


def test_start_from_a_whisper_encoder(checkpoint_dir, recordings, tmp_path):
    """Matrices of the blocks are the encoder's; digits and FSMN memory stay."""
    encoder = Omni2Config.load(checkpoint_dir / "config.json").speech_encoder
    config = dataclasses.replace(
        SMALL, mels=encoder.mels, width=encoder.width, heads=encoder.heads, layers=1
    )
    start = with_tokenizer(checkpoint_dir, tmp_path / "ckpt", config)
    train = toy_config(voice_units.config, start, recordings, whisper=str(checkpoint_dir))
    ours = weights.load(stage_of(train), start, make_mesh(devices=jax.devices()[:1]))[1]
    whisper = parameters.stored(checkpoint_dir, "speech_encoder")
    before = parameters.stored(start, "speech_tokenizer")
    for name in ("blocks.up.kernel", "blocks.query.kernel", "conv1.kernel"):
        expected = whisper[name].read().astype(np.float32)
        expected = expected[:1] if name.startswith("blocks") else expected
        np.testing.assert_array_equal(ours[f"speech_tokenizer.{name}"], expected)
    for name in ("project.kernel", "blocks.memory.kernel"):
        np.testing.assert_array_equal(ours[f"speech_tokenizer.{name}"], before[name].read())


# ---- bad input, before anything is compiled ----


def test_bad_settings(settings, start, checkpoint_dir, tmp_path):
    seven = with_tokenizer(checkpoint_dir, tmp_path / "seven", dataclasses.replace(SMALL, digits=7))
    cases = {
        "lacks speech_tokenizer, which stage units needs": {"checkpoint": str(checkpoint_dir)},
        r"7 digits, 2187 units, but units \(of the speech LM\) is 6561$": {
            "checkpoint": str(seven)
        },
        "a bucket has 751 tokens, expected at most 750 units": {"buckets": (Bucket(0, 0, 751),)},
        "the speech encoder has a width of .*expected the speech tokenizer's width of 32": {
            "whisper": str(checkpoint_dir)
        },
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            Run(dataclasses.replace(settings, **changes), tmp_path / "run")
    with pytest.raises(ValueError, match="whisper is for stage units; stage flow does not use it"):
        TrainConfig("flow", whisper="x")
    assert not (tmp_path / "run").exists()


def test_bad_recordings(settings, recordings, tmp_path):
    """A recording that cannot hold its text, and one whose text has no letter."""
    audio = str(EXAMPLES / "training" / "tea-1-a.wav")
    lines = [{"audio": audio, "text": text} for text in ("a" * 2000, "?!")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare.prepare(tmp_path, tmp_path / "data")
    message = (
        "has nothing to train stage units on: .*its text is too long for its recording .2000 bytes"
        ".*the text '\\?!' has no letter and no digit"
    )
    with pytest.raises(ValueError, match=message):
        Run(dataclasses.replace(settings, data=str(tmp_path / "data")), tmp_path / "run")
