"""Hugging Face ids as sources of `omni2 convert`, against a local stand-in of the hub."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from omni2_jax import hub
from omni2_jax.checkpoint import parameters, tokenizer
from tests.support.commands import process
from tests.support.hub import COMMIT, Hub, serve
from tests.support.paths import DECODER, GOLDENS

UNUSED = ("pytorch_model.bin", "flax_model.msgpack", "onnx/model.onnx", "model.fp32.safetensors")


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository that holds its weights in more formats than one."""
    directory = tmp_path_factory.mktemp("repository")
    needed = ("config.json", "model.safetensors", "tokenizer.json", "tts_tokenizer/vocab.json")
    for name in (*needed, *UNUSED, "README.md", "original/model.safetensors"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(name.encode() * 20_000)
    return directory


@pytest.fixture
def server(repository, tmp_path, monkeypatch) -> Iterator[Hub]:
    """The hub of this process, its cache empty."""
    with serve({"ORG/Tiny": repository, "ORG/cosy2_decoder": DECODER}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        # A piece that arrives in part is thrown away; the default is 10 MB.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**14)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        yield server


def refusal(name: str, source: hub.Source = hub.OMNI2) -> str:
    with pytest.raises(ValueError) as error:
        hub.local_path(name, source)
    assert "\n" not in str(error.value)
    return str(error.value)


def names(directory: Path) -> set[str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)) for path in files}


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_only_the_needed_files_are_fetched(server, repository, revision):
    directory = hub.local_path(f"ORG/Tiny{revision}", hub.OMNI2)
    assert directory is not None
    files = {"config.json", "model.safetensors", "tokenizer.json", "tts_tokenizer/vocab.json"}
    assert names(directory) == files
    assert all(
        (directory / name).read_bytes() == (repository / name).read_bytes() for name in files
    )
    assert server.files == {Path(name).name for name in files}


def test_each_kind_of_source_has_its_files(server):
    whisper = hub.local_path("ORG/Tiny", hub.WHISPER)
    assert whisper is not None and names(whisper) == {"config.json", "model.safetensors"}
    decoder = hub.local_path("ORG/cosy2_decoder", hub.DECODER)
    assert decoder is not None
    wanted = {"cosyvoice.yaml", "flow.pt", "hift.pt", "campplus.onnx", "spk2info.pt"}
    assert names(decoder) == wanted
    assert "holds no speech_tokenizer_v2.onnx" in refusal("ORG/Tiny", hub.SPEECH_TOKENIZER)


def test_a_speech_tokenizer_is_one_file_of_its_repository(server, tmp_path):
    (tmp_path / "repo").mkdir()
    for name in ("speech_tokenizer_v2.onnx", "llm.pt"):
        (tmp_path / "repo" / name).write_bytes(b"onnx")
    server.repositories["FunAudioLLM/CosyVoice2-0.5B"] = tmp_path / "repo"
    path = hub.local_path("FunAudioLLM/CosyVoice2-0.5B", hub.SPEECH_TOKENIZER)
    assert path is not None and path.read_bytes() == b"onnx"
    assert server.files == {"speech_tokenizer_v2.onnx"}


def test_a_local_path_wins(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ORG" / "Tiny").mkdir(parents=True)
    assert hub.local_path("ORG/Tiny", hub.OMNI2) == Path("ORG/Tiny")
    assert server.downloads == []
    assert hub.local_path(None, hub.OMNI2) is None


@pytest.mark.parametrize(
    "name",
    ["", "Tiny", "a/b/c", "/no/such", "./a/b", "ORG/", "ORG/Tiny@", "ORG/Ti ny", "ORG/ä@b@c"],
)
def test_what_is_neither_a_path_nor_an_id(server, name):
    line = f"{name} does not exist, and it is no Hugging Face id (ORG/NAME or ORG/NAME@REVISION)"
    assert refusal(name) == line


def test_what_the_hub_refuses(server):
    prefix = "ORG/{} does not exist on this machine, and"
    line = f"{prefix.format('No')} {server.url} has no such repository, or it is private"
    assert refusal("ORG/No").startswith(line)
    line = f"{prefix.format('Tiny')} its repository has no revision v2"
    assert refusal("ORG/Tiny@v2") == line
    server.gated.add("ORG/Tiny")
    line = f"{prefix.format('Tiny')} its repository is gated: accept its terms at {server.url}"
    assert refusal("ORG/Tiny").startswith(line)
    assert "HF_TOKEN" in refusal("ORG/Tiny")
    assert "ORG/a--b does not exist on this machine, and" in refusal(
        "ORG/a--b"
    )  # an id that the library refuses


def test_a_connection_that_breaks_is_taken_up_again(server, repository):
    size = (repository / "model.safetensors").stat().st_size
    server.cut["model.safetensors"] = size // 2
    directory = hub.local_path("ORG/Tiny", hub.OMNI2)
    assert directory is not None
    content = (directory / "model.safetensors").read_bytes()
    assert content == (repository / "model.safetensors").read_bytes()
    starts = [start for name, start in server.downloads if name == "model.safetensors"]
    assert starts[0] == 0 and len(starts) > 1 and all(0 < start < size for start in starts[1:])


def test_a_connection_that_never_holds_is_one_line(server, repository):
    server.cut["model.safetensors"] = 100
    line = "its download failed, repeat the command to go on with it: "
    assert line in refusal("ORG/Tiny")
    server.downloads.clear()
    server.cut.clear()
    directory = hub.local_path("ORG/Tiny", hub.OMNI2)
    assert directory is not None and (directory / "model.safetensors").exists()
    assert server.files == {"model.safetensors"}  # the others are in the cache


def test_offline(server, monkeypatch):
    directory = hub.local_path("ORG/Tiny", hub.WHISPER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.downloads.clear()
    assert hub.local_path("ORG/Tiny@main", hub.WHISPER) == directory
    assert server.downloads == []
    line = (
        "ORG/cosy2_decoder does not exist on this machine, and its files are not all in the cache"
    )
    assert refusal("ORG/cosy2_decoder").startswith(line)


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nothing listens here
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        assert f"{url} cannot be reached: " in refusal("ORG/Tiny")


@pytest.mark.slow
def test_convert_from_the_hub(tmp_path, monkeypatch, checkpoint_dir):
    """The whole command, told of the hub by the environment."""
    pytest.importorskip("torch")
    with serve({"ORG/Tiny": GOLDENS / "omni2"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        result = process("convert", "--omni2", "ORG/Tiny@v1", "--out", tmp_path / "ckpt")
    assert result.returncode == 0, result.stderr.decode()
    assert not any(name.endswith(".npz") for name in server.files)
    converted = parameters.stored(tmp_path / "ckpt", "llm")
    for path, leaf in parameters.stored(checkpoint_dir, "llm").items():
        assert (converted[path].read() == leaf.read()).all()
    for name in tokenizer.FILES:
        path = checkpoint_dir / "tts_tokenizer" / name
        assert path.exists() == (tmp_path / "ckpt" / "tts_tokenizer" / name).exists()
