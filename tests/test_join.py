"""`omni2 join`: parts of several checkpoints as one, and what it refuses."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from omni2_jax.checkpoint import info, parameters
from omni2_jax.config import Omni2Config
from omni2_jax.convert import new, write
from omni2_jax.convert.hugging_face import EMPTY_CONFIG
from omni2_jax.convert.release import Release
from tests.support import designs
from tests.support.commands import is_error_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints beside `new_checkpoint`: the same voice of another seed, and misfits."""
    work = tmp_path_factory.mktemp("join")
    path, _ = designs.write(work)
    design = new.Design.read(str(path))

    def make(name: str, design: new.Design, *parts: str, text: Path | None = None) -> None:
        release = new.make(design, Release(EMPTY_CONFIG), parts, text, seed=1)
        write.write(work / name, release, {})

    def replaced(**changes) -> new.Design:
        return dataclasses.replace(design, config=design.config.replace(**changes))

    make("voice", design, "flow", "vocoder", "speech_tokenizer")
    flow = design.config.flow
    make("units", replaced(units=243, flow=dataclasses.replace(flow, units=243)), "flow")
    make("mels", replaced(vocoder=dataclasses.replace(design.config.vocoder, mels=40)), "vocoder")
    (work / "other.txt").write_text(designs.text(seed=5).replace("the", "any"))
    make("spelling", design, "llm", "speech_lm", "fusion", text=work / "other.txt")
    return work


def leaves(directory: Path, part: str) -> dict[str, np.ndarray]:
    return {path: leaf.read() for path, leaf in parameters.stored(directory, part).items()}


def test_each_part_is_that_of_its_checkpoint(omni2, new_checkpoint, folder, tmp_path):
    """A named part wins over one that comes with a whole checkpoint."""
    out = tmp_path / "out"
    code, *_ = omni2("join", new_checkpoint, f"flow,vocoder={folder / 'voice'}", "--out", out)
    assert code == 0
    assert parameters.parts(out) == parameters.parts(new_checkpoint)
    for part in parameters.parts(out):
        source = folder / "voice" if part in ("flow", "vocoder") else new_checkpoint
        expected = leaves(source, part)
        for path, leaf in leaves(out, part).items():
            np.testing.assert_array_equal(leaf, expected[path])
            assert leaf.dtype == expected[path].dtype
    config = Omni2Config.load(out / "config.json")
    assert config == Omni2Config.load(new_checkpoint / "config.json")
    names = [path.name for path in sorted((out / "tokenizer").iterdir())]
    assert names == ["tokenizer.json", "tokenizer_config.json"]


def test_a_group_in_a_smaller_type(omni2, new_checkpoint, folder, tmp_path):
    """Files may be published: they hold no path of this machine."""
    out = tmp_path / "out"
    sources = [f"language={new_checkpoint}", f"flow={folder / 'voice'}"]
    code, *_ = omni2("join", *sources, "--dtype", "bfloat16", "--out", out)
    assert code == 0
    assert [part.name for part in info.parts(out)] == [*new.PARTS[:5], "flow"]
    for part in info.parts(out):
        assert part.dtype == "bfloat16" and part.checksums
    kernel = "layers.mlp.up.kernel"
    expected = leaves(new_checkpoint, "llm")[kernel].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(leaves(out, "llm")[kernel], expected)
    for file in filter(Path.is_file, out.rglob("*")):
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_a_speech_lm_that_reads_text_alone(omni2, new_checkpoint, tmp_path):
    """As stage 1b leaves it: its checkpoint has a fusion, which nothing has trained."""
    out = tmp_path / "out"
    assert omni2("join", new_checkpoint, "--no-fusion", "--out", out)[0] == 0
    kept = [part for part in parameters.parts(new_checkpoint) if part != "fusion"]
    assert parameters.parts(out) == kept
    config = Omni2Config.load(new_checkpoint / "config.json")
    assert config.mix == "gate"
    assert Omni2Config.load(out / "config.json") == config.replace(mix="text")
    line, *_ = omni2("join", f"flow={out}", "--no-fusion", "--out", tmp_path / "flow")
    assert is_error_line(line) and "speech_lm" in line


def test_a_speech_lm_that_starts_as_the_llm(omni2, new_checkpoint, tmp_path):
    """The same layers and text tokens; <sep> and the units are new rows, as large as the others."""
    out = tmp_path / "out"
    assert omni2("join", new_checkpoint, "--speech-lm-from-llm", "--out", out)[0] == 0
    config = Omni2Config.load(out / "config.json")
    assert config.mix == "text" and "fusion" not in parameters.parts(out)
    assert config.speech_lm is not None and config.llm is not None
    sep = config.tokens.sep
    assert config.speech_lm.vocabulary == sep + 1 + config.units
    llm, speech_lm = leaves(new_checkpoint, "llm"), leaves(out, "speech_lm")
    table = speech_lm.pop("embedding.table")
    text = llm.pop("embedding.table")[:sep]
    np.testing.assert_array_equal(table[:sep], text)
    np.testing.assert_allclose(table[sep:].std(0).mean(), text.std(0).mean(), rtol=0.2)
    assert llm.keys() == speech_lm.keys()
    for path, leaf in llm.items():
        np.testing.assert_array_equal(speech_lm[path], leaf)
    line, *_ = omni2(
        "join", f"flow={new_checkpoint}", "--speech-lm-from-llm", "--out", tmp_path / "flow"
    )
    assert is_error_line(line) and "no llm" in line and not (tmp_path / "flow").exists()


@pytest.mark.parametrize(
    "sources, words",
    [
        (["{new}", "{folder}/voice"], ["would come from", "name the right one"]),
        (["language={new}", "{folder}/units"], ["243 units", "speech_lm", "has 81"]),
        (["flow={new}", "{folder}/mels"], ["40 mel bands", "vocoder", "has 80"]),
        (["{new}", "{folder}/lost"], ["lost is not an omni2-jax checkpoint"]),
        (["flow={folder}/mels"], ["mels has no flow; it has vocoder"]),
        (["ear={new}"], ["ear is no part", "language, decoder"]),
        (["speech_lm,llm={new}"], ["no fusion"]),
        (["llm,fusion={new}"], ["fusion", "no place", "speech_lm"]),
        (["llm,adapter={new}"], ["adapter of", "no place", "speech_encoder"]),
        (["speech_lm,fusion={new}", "llm={folder}/spelling"], ["tokenizers", "differ"]),
    ],
)
def test_what_does_not_fit_is_refused(omni2, new_checkpoint, folder, tmp_path, sources, words):
    out = tmp_path / "out"
    given = [text.format(new=new_checkpoint, folder=folder) for text in sources]
    line, *_ = omni2("join", *given, "--out", out)
    assert is_error_line(line) and not out.exists()
    for word in words:
        assert word in line
