"""`omni2 new`: a checkpoint from nothing, of any dimensions, deterministic and ready to load."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import rich.progress

from omni2_jax.checkpoint import parameters
from omni2_jax.checkpoint.tokenizer import SPEECH_TEXT, Tokenizer
from omni2_jax.config import Omni2Config, SpeechEncoderConfig
from omni2_jax.convert import export, new, new_tokenizer, read, write
from omni2_jax.convert.hugging_face import EMPTY_CONFIG
from omni2_jax.convert.plan import ConversionError
from omni2_jax.convert.release import Release, combine
from omni2_jax.models.model import SPEECH, abstract_model
from tests.support import designs

NOTHING = Release(EMPTY_CONFIG)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("design")
    designs.write(folder)
    return folder


@pytest.fixture(scope="module")
def design(files) -> new.Design:
    return new.Design.read(str(files / "design.py"))


def leaves(release: Release, part: str) -> dict[str, np.ndarray]:
    return {path: leaf.read() for path, leaf in parameters.flatten(release.params[part]).items()}


def test_every_part_is_there_and_fits(new_checkpoint, design):
    config = Omni2Config.load(new_checkpoint / "config.json")
    assert parameters.parts(new_checkpoint) == list(new.ALL_PARTS)
    for part, shapes in abstract_model(config)[1].items():
        parameters.check(new_checkpoint, part, parameters.flatten(shapes))
    assert config.speech_lm and config.speech_lm.vocabulary == 319 + 1 + 81
    assert config.llm == design.config.llm and config.flow == design.config.flow


def test_the_tokenizer_knows_turns_and_units(new_checkpoint):
    config = Omni2Config.load(new_checkpoint / "config.json")
    tokenizer = Tokenizer(new_checkpoint, config, 20)
    ids = tokenizer.text.get_vocab()
    assert len(ids) == 320 and ids[SPEECH_TEXT] == config.tokens.speech == 319
    assert config.tokens.text_eos == (ids["<|im_end|>"],)
    assert config.tokens.unit_eos == ids["<|endoftext|>"]
    prompt = tokenizer.prompt([1, "It is 12.", 1])
    assert prompt.count(SPEECH) == 40
    assert tokenizer.decode([i for i in prompt if i != SPEECH]).count("It is 12.") == 1
    text = "Straße, 漢字 and 1234"
    encoded = tokenizer.text.encode(text)
    assert tokenizer.decode(encoded) == text
    digits = [ids[digit] for digit in "1234"]
    assert encoded[-4:] == digits  # also "12" and "34" of the text above stay apart
    sep = config.tokens.sep
    assert tokenizer.unit_text([sep, sep + 1, *digits, sep + 81]) == "<0>1234<80>"
    listed = sum(file.stat().st_size for file in (new_checkpoint / "tokenizer").iterdir())
    assert listed < 10_000 and not (new_checkpoint / "tts_tokenizer").exists()


def test_units_are_spelled_as_a_listed_tokenizer_spells_them(checkpoint_dir):
    config = Omni2Config.load(checkpoint_dir / "config.json")
    tokenizer = Tokenizer(checkpoint_dir, config, 20)
    sep = config.tokens.sep
    tokens = [5, sep + 13, sep + 6561, 40, 41, sep, sep + 1, config.tokens.unit_eos]
    listed = tokenizer.unit_text(tokens)
    tokenizer.speech = None
    assert tokenizer.unit_text(tokens) == listed and "<12><6560>" in listed


def test_parameters_follow_from_seed_and_name(design, files):
    def make(*parts: str, seed: int = 0) -> Release:
        return new.make(design, NOTHING, parts, files / "text.txt", seed=seed)

    both, alone, other = make("llm", "speech_lm"), make("llm"), make("llm", seed=1)
    for path, leaf in leaves(both, "llm").items():
        np.testing.assert_array_equal(leaf, leaves(alone, "llm")[path])
    kernel = "layers.attention.query.kernel"
    assert not np.array_equal(leaves(alone, "llm")[kernel], leaves(other, "llm")[kernel])
    assert alone.files == both.files  # the tokenizer is learnt the same way every time


def test_parameters_have_the_scales_that_training_starts_from(design):
    release = new.make(design, NOTHING, ["flow", "vocoder", "speech_tokenizer"])

    def deviation(part: str, path: str) -> float:
        leaf = leaves(release, part)[path]
        return float(leaf.std() * np.prod(leaf.shape[:-1]) ** 0.5)

    assert deviation("flow", "estimator.out.kernel") == pytest.approx(0.1, rel=0.2)
    assert deviation("vocoder", "conv_out.kernel") == pytest.approx(0.1, rel=0.2)
    assert deviation("speech_tokenizer", "project.kernel") == pytest.approx(0.5, rel=0.3)
    vocoder = leaves(release, "vocoder")
    np.testing.assert_array_equal(vocoder["conv_out.bias"], [-3.0] * 9 + [0.0] * 9)
    np.testing.assert_array_equal(vocoder["stages.0.blocks.0.units.0.snake1.alpha"], np.ones(8))


def encoder(design: new.Design, frames: int) -> Release:
    """A speech encoder that is given, of another size than the design's."""
    config = SpeechEncoderConfig(mels=80, frames=frames, width=8, layers=2, heads=2)
    other = dataclasses.replace(
        design, config=EMPTY_CONFIG.replace(speech_encoder=config), speech_tokenizer=None
    )
    return new.make(other, NOTHING)


def test_a_given_encoder_is_cut_to_the_window(design, files):
    given = encoder(design, 150)
    release = new.make(design, given, text=files / "text.txt")
    assert release.config.speech_encoder == SpeechEncoderConfig(
        mels=80, frames=100, width=8, layers=2, heads=2
    )
    before, after = leaves(given, "speech_encoder"), leaves(release, "speech_encoder")
    np.testing.assert_array_equal(after.pop("positions"), before.pop("positions")[:100])
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[path])
    assert leaves(release, "adapter")["up.kernel"].shape == (5 * 8, 32)
    with pytest.raises(ValueError, match="frames is 100, but the encoder that is given has 50"):
        new.make(design, encoder(design, 50), text=files / "text.txt")


def test_what_cannot_be_made_is_one_line(design, files, tmp_path):
    def fault(parts=(), text=files / "text.txt", of=design) -> str:
        with pytest.raises(ValueError) as caught:
            new.make(of, NOTHING, parts, text)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "describes no lm" in fault(["lm"])
    assert "a new adapter needs speech_encoder, llm" in fault(["adapter"], None)
    assert "give --text FILE" in fault(["llm"], None)
    assert "--text is for a new tokenizer" in fault(["flow"])
    assert "none.txt: No such file" in fault(text=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Straße".encode("latin-1"))
    assert "no text in UTF-8" in fault(text=tmp_path / "latin.txt")
    (tmp_path / "small.txt").write_text("one two three\none two three\n")
    assert "too small for llm.vocabulary, which is 320: it gives 2" in fault(
        text=tmp_path / "small.txt"
    )
    tokenizer = dataclasses.replace(design.speech_tokenizer, digits=5)
    wrong = dataclasses.replace(design, speech_tokenizer=tokenizer)
    assert "digits is 5, which makes 243 units; expected units, which is 81" in fault(of=wrong)
    with pytest.raises(ValueError, match=r"llm\.vocabulary is 200, expected at least 260"):
        new_tokenizer.learn(["text"], 200, tmp_path)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match="defines no `config` of type Omni2Config"):
        new.Design.read(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match="config omni2_7 does not exist; did you mean omni2_7b"):
        new.Design.read("omni2_7")


def test_it_goes_to_the_released_layout_and_back(design, files, tmp_path):
    """What a release can hold: four up layers, chunks of 50 units, and no fresh speaker encoder."""
    flow = dataclasses.replace(design.config.flow, up_layers=4)
    config = design.config.replace(flow=flow, speaker=None)
    made = new.make(dataclasses.replace(design, config=config), NOTHING, (), files / "text.txt")
    write.write(tmp_path / "new", made, {})
    with rich.progress.Progress(disable=True) as progress:
        export.write(tmp_path / "new", tmp_path / "release", progress)
    back = combine(
        [
            read.read_omni2(tmp_path / "release" / "LLaMA-Omni2"),
            read.read_decoder(tmp_path / "release" / "cosy2_decoder"),
        ]
    )
    released = dataclasses.replace(flow, noise_frames=15000)  # no release holds the noise
    assert back.config == made.config.replace(flow=released)
    assert set(back.params) == set(made.params) - {"speech_tokenizer"}
    for part in back.params:
        ours, theirs = leaves(made, part), leaves(back, part)
        for path in ours.keys() - {"noise"}:
            # Weight norm rounds the vocoder's kernels.
            np.testing.assert_allclose(theirs[path], ours[path], rtol=1e-6 * (part == "vocoder"))
    write.write(tmp_path / "back", back, {})
    first, second = (Tokenizer(tmp_path / name, back.config, 20) for name in ("new", "back"))
    assert first.prompt([1, "It is.", 1]) == second.prompt([1, "It is.", 1])
    tokens = [320, 400, 7, 319, 399]
    assert first.unit_text(tokens) == second.unit_text(tokens)
    wrong = design.config.replace(speaker=None)
    made = new.make(dataclasses.replace(design, config=wrong), NOTHING, (), files / "text.txt")
    write.write(tmp_path / "wrong", made, {})
    with (
        rich.progress.Progress(disable=True) as progress,
        pytest.raises(ConversionError, match=r"flow.up_layers is 1, but the released layout holds"),
    ):
        export.write(tmp_path / "wrong", tmp_path / "nothing", progress)
    assert not (tmp_path / "nothing").exists()


def test_a_tokenizer_learns_from_dialogues(tmp_path):
    line = {"id": "a", "split": "seen", "topic": "x"}
    line["turns"] = [{"question": "zebra zebra", "reply": "zebra"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps(line) + "\n")
    assert list(new.texts(tmp_path / "talk.jsonl")) == ["zebra zebra", "zebra"]
    (tmp_path / "talk.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"talk.jsonl, line 1: .*id is missing"):
        list(new.texts(tmp_path / "talk.jsonl"))
