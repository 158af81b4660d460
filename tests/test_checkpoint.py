"""Checkpoints that are damaged, of an older version, or hold what does not belong there."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from omni2_jax.checkpoint import checksums, info, parameters, tokenizer, verify, voices
from omni2_jax.config import Omni2Config
from omni2_jax.train import hidden_states
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.data.writer import Shards
from omni2_jax.train.hidden_states import HiddenStates
from omni2_jax.train.saved_states import SavedStates
from omni2_jax.train.settings import TrainConfig
from omni2_jax.train.step import State
from omni2_jax.train.stored_arrays import identity
from tests.support.releases import linked, replace

RANDOM = np.random.default_rng(0)
LEAVES = {
    "layers": {"kernel": RANDOM.standard_normal((30, 200)).astype(np.float32)},
    "half": RANDOM.standard_normal((3, 40, 7)).astype(jnp.bfloat16),
    "small": np.arange(5, dtype=np.float32),
}
SHAPES = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), LEAVES)


def flips(directory: Path, count: int) -> Iterator[Path]:
    """Flip one bit at a time, at `count` places of each file below `directory`; yields the file."""
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = path.read_bytes()
        bits = 8 * len(content)
        for bit in range(0, bits, max(1, bits // count)):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            yield path
        path.write_bytes(content)


def undetected(directory: Path, read: Callable[[], dict], count: int) -> tuple[int, list[str]]:
    """How many flips `read` refused, and the files whose flips changed the values that it returned.

    A flip of bytes that are not in use changes nothing, and need not be refused.
    """
    refused, silent = 0, []
    before = jax.tree.leaves(read())
    for path in flips(directory, count):
        try:
            after = jax.tree.leaves(read())
        except ValueError as error:
            assert str(directory) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            if not all(map(np.array_equal, before, after)):
                silent.append(path.name)
    return refused, silent


@pytest.mark.filterwarnings("ignore")
def test_no_flipped_bit_of_a_part_changes_its_parameters(tmp_path, capfd):
    parameters.save_part(tmp_path, "llm", LEAVES)

    def read() -> dict:
        return parameters.load_part(tmp_path, "llm", SHAPES)

    assert all(map(np.array_equal, jax.tree.leaves(read()), jax.tree.leaves(LEAVES)))
    refused, silent = undetected(tmp_path / "params" / "llm", read, 24)
    assert refused > 60 and silent == []
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_parameter_is_named(tmp_path):
    parameters.save_part(tmp_path, "llm", LEAVES)
    largest = max((tmp_path / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    where = f"{tmp_path / 'params' / 'llm'} is damaged: its parameter layers.kernel cannot be read"
    with pytest.raises(ValueError, match=f"^{where}: .*(Digest mismatch|decompress).*$"):
        parameters.load_part(tmp_path, "llm", SHAPES)
    stored = parameters.stored(tmp_path, "llm")
    with pytest.raises(ValueError, match=f"^{where}"):
        stored["layers.kernel"].read()
    assert np.array_equal(stored["small"].read(), LEAVES["small"])


@pytest.mark.filterwarnings("ignore")
def test_no_flipped_bit_of_a_run_state_changes_it(tmp_path):
    """Sharded arrays, which Orbax writes in the background."""
    mesh = jax.make_mesh((4,), ("data",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = State(
        step=jax.device_put(jnp.int32(7), whole),
        params={"kernel": jax.device_put(LEAVES["layers"]["kernel"], cut)},
        opt={"mu": jax.device_put(LEAVES["half"], whole)},
        ema=None,
    )
    states = SavedStates(tmp_path, keep=1)
    states.save(state, 7)
    states.manager.wait_until_finished()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def read() -> dict:
        return vars(states.restore(7, shapes, shardings))

    assert all(map(np.array_equal, jax.tree.leaves(read()), jax.tree.leaves(vars(state))))
    refused, silent = undetected(tmp_path / "steps" / "7", read, 8)
    states.manager.close()
    assert refused > 20 and silent == []


def test_parameters_without_checksums_are_loaded_and_noted(omni2, tmp_path, checkpoint_dir):
    """Version 0.1 wrote Zarr 2."""
    directory = tmp_path / "old"
    shutil.copytree(checkpoint_dir, directory)
    leaves = {path: leaf.read() for path, leaf in parameters.stored(directory, "adapter").items()}
    shutil.rmtree(directory / "params" / "adapter")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(directory / "params" / "adapter", args=ocp.args.PyTreeSave(leaves))
    assert {part.name: part.checksums for part in info.parts(directory)} == {
        part: part != "adapter" for part in parameters.parts(directory)
    }
    for path, leaf in parameters.stored(directory, "adapter").items():
        assert np.array_equal(leaf.read(), leaves[path])
    assert "no checksums (written by version 0.1): adapter\n" in omni2("info", directory)[1]
    code, out, _ = omni2("info", directory, "--verify")
    assert code == 0 and "are sound; no checksums to compare with: adapter\n" in out


def test_info_tells_a_built_in_voice_and_the_kind_of_fusion(checkpoint_dir, tmp_path):
    config = Omni2Config.load(checkpoint_dir / "config.json")
    assert config.flow and config.llm and config.speech_lm
    widths = f"{config.llm.width} -> {config.speech_lm.width}"
    for mix, name in (("gate", "gate"), ("sum", "sum"), ("hidden", "hidden"), ("text", "unused")):
        described = info.dimensions(checkpoint_dir, config.replace(mix=mix), "fusion")
        assert described == f"{name}, {widths}"
    one_voice = dataclasses.replace(config.flow, speaker=1)
    config.replace(flow=one_voice, speaker=None).save(tmp_path / "config.json")
    assert info.facts(tmp_path)["voices"] == "one, without a name"
    config.save(tmp_path / "config.json")
    assert info.facts(tmp_path)["voices"] == "none"


def test_verify_names_everything_that_is_damaged(omni2, tmp_path, checkpoint_dir):
    directory = tmp_path / "ti[/x]ny"
    shutil.copytree(checkpoint_dir, directory)
    code, out, _ = omni2("info", directory, "--verify")
    assert code == 0 and out.endswith("are sound\n") and str(directory) in out
    for part in ("llm", "flow"):
        files = (directory / "params" / part).rglob("*")
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 16
        largest.write_bytes(content)
    (directory / "params" / "adapter" / "_METADATA").write_text("{}")
    (directory / "voices" / "espeak.npy").write_bytes(b"?")
    (directory / "tts_tokenizer" / "tokenizer.json").write_text("?")
    code, out, err = omni2("info", directory, "--verify")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and out == "" and len(lines) == 5
    for words in (
        ("params/llm is damaged: its parameter",),
        ("params/flow is damaged: its parameter",),
        ("params/adapter", "_METADATA"),
        ("voices/espeak.npy is not an x-vector",),
        ("tts_tokenizer is not a readable tokenizer",),
    ):
        assert sum(all(word in line for word in words) for line in lines) == 1, words


def test_verify_names_what_would_not_be_loaded(checkpoint_dir, tmp_path):
    """And nothing that a checkpoint may lack: here it has no LLM, so no chat template either."""
    directory = linked(checkpoint_dir, tmp_path / "ckpt")
    assert list(verify.damaged_files(directory)) == []
    for part in ("fusion", "vocoder"):
        shutil.rmtree(directory / "params" / part)
    replace(directory / "generation_config.json", '{"top_k": -1}')
    path = directory / "tokenizer" / "tokenizer_config.json"
    replace(path, json.dumps(json.loads(path.read_text()) | {"chat_template": "{% if %}"}))
    parts, generation, template = verify.damaged_files(directory)
    assert parts == (
        f"{directory} lacks the parameters of fusion, vocoder, which its config.json describes"
    )
    assert generation.startswith(f"{directory / 'generation_config.json'}: top_k is -1, expected")
    assert template.startswith(f"the chat template of {directory / 'tokenizer'} cannot be used: ")
    (directory / "generation_config.json").unlink()
    config = Omni2Config.load(directory / "config.json").only("speaker", "speech_lm", "flow")
    (directory / "config.json").unlink()
    config.save(directory / "config.json")
    for part in ("speech_encoder", "adapter", "llm"):
        shutil.rmtree(directory / "params" / part)
    assert list(verify.damaged_files(directory)) == []
    shutil.rmtree(directory / "tokenizer")
    assert list(verify.damaged_files(directory)) == []


def npy_header(descr: str, shape: str) -> bytes:
    """A .npy file that ends behind its header."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


BAD_VOICES = {
    "another size": (np.ones(191, np.float32), "shape [191]"),
    "a scalar": (np.float32(1), "shape []"),
    "strings": (np.full(192, "a"), "type <U1"),
    "complex": (np.ones(192, complex), "type complex128"),
    "not finite": (np.full(192, np.nan), "NaN"),
    "empty": (b"", "holds"),
    "no magic": (b"?" * 500, "holds"),
    "a huge array": (npy_header("<f4", "(100000000000,)"), "shape [100000000000]"),
    "too short": (npy_header("<f4", "(192,)") + bytes(100), "holds"),
    "objects": (npy_header("|O", "(192,)"), "type object"),
    "no header": (b"\x93NUMPY\x01\x00\xff\xff{'", "holds"),
    "a deep header": (npy_header("<f4", "(" * 90), "holds"),
    "a future version": (b"\x93NUMPY\x09\x00" + bytes(100), "holds"),
}


@pytest.mark.parametrize("name", BAD_VOICES)
def test_a_voice_that_is_none_is_one_line(tmp_path, name):
    content, words = BAD_VOICES[name]
    (tmp_path / "voices").mkdir()
    path = tmp_path / "voices" / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    expected = f"{path} is not an x-vector of 192 finite numbers"
    for voice in ("x", str(path)):
        with pytest.raises(ValueError) as error:
            voices.resolve(tmp_path, Omni2Config(), voice)
        assert str(error.value).startswith(expected) and words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_voice_may_have_two_axes(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(192.0)[None])
    x_vector = voices.load(tmp_path / "x.npy", Omni2Config())
    assert x_vector.dtype == np.float32 and np.array_equal(x_vector, np.arange(192))


BAD_TEMPLATES = {
    "empty": "",
    "a number": 5,
    "a list": ["x"],
    "does not parse": "{% for %}",
    "raises": "{{ raise_exception('no\nroles') }}",
    "divides by zero": "{{ 1 // 0 }}",
    "names what there is not": "{{ nothing.at.all }}",
    "leaves out the turns": "hello",
    "repeats the turns": "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
    "leaves out the questions": "{{ messages[1].content }}",
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_chat_template_that_cannot_be_used_is_one_line(tmp_path, checkpoint_dir, name):
    directory = tmp_path / "ckpt"
    for folder in ("tokenizer", "tts_tokenizer"):
        shutil.copytree(checkpoint_dir / folder, directory / folder)
    path = directory / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": BAD_TEMPLATES[name]}
    path.write_text(json.dumps(settings))
    config = Omni2Config.load(checkpoint_dir / "config.json")
    with pytest.raises(ValueError) as error:
        tokenizer.Tokenizer(directory, config, 300)
    assert str(directory / "tokenizer") in str(error.value) and "\n" not in str(error.value)


def test_orbax_writes_the_checksum_codec(tmp_path):
    """Orbax has no option for it: `checksums` replaces one of its functions."""
    parameters.save_part(tmp_path, "llm", LEAVES)
    with ocp.Checkpointer(checksums.tree_handler()) as checkpointer:
        checkpointer.save(tmp_path / "sharded", args=ocp.args.PyTreeSave({"a": jnp.ones(3)}))
    for directory in (tmp_path / "params" / "llm", tmp_path / "sharded"):
        content = b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())
        assert len(content) > 0
        tree = checksums.tree_handler().metadata(directory).tree
        assert all(checksums.has_checksums(array) for array in tree.values())


def written_states(
    folder: Path, data: Dataset, width: int = 64, **origin: object
) -> tuple[list[np.ndarray], dict]:
    """Hidden states in a folder, and the content of its hidden.json."""
    folder.mkdir(parents=True, exist_ok=True)
    states = [np.full((3, width), number, np.float32) for number in range(len(data))]
    shards = Shards(folder, "states", 2**20)
    places = [shards.add(array.tobytes()) for array in states]
    shards.close()
    metadata = {"data": identity(data), "width": width, "dtype": "float32", "places": places}
    (folder / "hidden.json").write_text(json.dumps(metadata | origin))
    return states, metadata


def test_hidden_states_belong_to_a_checkpoint(checkpoint_dir, talks, tmp_path):
    """To its adapter, LLM and speech encoder; large arrays of the last two are not read."""
    other, data = linked(checkpoint_dir, tmp_path / "other"), Dataset(talks)
    config = Omni2Config.load(other / "config.json")
    assert config.llm is not None
    train = TrainConfig("2", checkpoint=str(other), hidden=str(tmp_path / "hidden"))
    folder, origin = tmp_path / "hidden" / "data", hidden_states.origin(train)
    written_states(folder, data, config.llm.width, **origin)
    assert HiddenStates.of(train, config, data, "data")
    for part in ("speech_lm", "adapter"):
        leaves = {path: leaf.read() for path, leaf in parameters.stored(other, part).items()}
        before, shapes = (parameters.fingerprint(other, part, size) for size in (math.inf, 0))
        shutil.rmtree(other / "params" / part)
        parameters.save_part(other, part, {path: leaf + 1 for path, leaf in leaves.items()})
        assert parameters.fingerprint(other, part) != before
        assert parameters.fingerprint(other, part, 0) == shapes
        if part == "speech_lm":
            assert HiddenStates.of(train, config, data, "data")
    with pytest.raises(ValueError, match=r"or by another adapter, LLM or speech encoder$"):
        HiddenStates.of(train, config, data, "data")
    shutil.rmtree(other / "params" / "llm")
    assert hidden_states.origin(train)["llm"] is None


def test_no_flipped_bit_of_hidden_states_changes_them(tmp_path, talks):
    """ArrayRecord has hashes of its own."""
    data = Dataset(talks)
    states, metadata = written_states(tmp_path, data)

    def read() -> dict:
        hidden = HiddenStates(tmp_path, data, 64)
        return {"states": [hidden.read(number, 3).copy() for number in range(len(data))]}

    assert np.array_equal(read()["states"], states)
    refused, silent = undetected(tmp_path, read, 40)
    assert refused > 20 and silent == []
    (tmp_path / "hidden.json").write_text(json.dumps(metadata | {"places": [1, 1]}))
    with pytest.raises(ValueError, match="does not name each record once"):
        read()
