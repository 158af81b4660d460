"""Checkpoints, data sets and runs in gs://, with gcsfs and tensorstore against a stand-in of the
service."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from omni2_jax import files, remote
from omni2_jax.checkpoint import info, parameters, voices
from omni2_jax.config import Omni2Config
from omni2_jax.generate.omni2 import Omni2
from omni2_jax.jobs import Shard, Where
from omni2_jax.train.data import prepare
from omni2_jax.train.data.dataset import Dataset
from omni2_jax.train.hidden_states import HiddenStates
from omni2_jax.train.loop import Run
from omni2_jax.train.reporter import Reporter
from omni2_jax.train.settings import TrainConfig
from tests.support.bucket import Bucket, serve
from tests.support.commands import process
from tests.support.jobs import calls, items, job, write
from tests.support.paths import EXAMPLES
from tests.support.runs import losses, reported, toy_run


@pytest.fixture(scope="module")
def bucket(tmp_path_factory) -> Iterator[Bucket]:
    """The service, for this process and those that it starts."""
    with pytest.MonkeyPatch.context() as patch, serve() as (bucket, environment):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("OMNI2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield bucket


@contextlib.contextmanager
def killed_while_copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process is killed after the first file of a directory with a marker: none cleans up."""
    copy_directory = remote.copy_directory

    def copy(source: Path, target: Path) -> None:
        if not any((source / name).exists() for name in remote.MARKERS):
            return copy_directory(source, target)
        unmarked = (path for path in remote.files(source) if path.name not in remote.MARKERS)
        remote.copy_files(source, target, [next(unmarked)])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(remote, "copy_directory", copy)
        patch.setattr(remote, "remove", lambda directory: None)
        yield


@pytest.fixture(scope="module")
def tiny(bucket, checkpoint_dir, talks) -> Path:
    """The tiny checkpoint and a data set in a bucket: ckpt, data."""
    directory = remote.as_path("gs://speech/tiny")
    remote.copy_directory(checkpoint_dir, directory / "ckpt")
    remote.copy_directory(talks, directory / "data")
    return directory


def test_paths(bucket):
    assert remote.as_path("a/b") == Path("a/b") and not remote.is_remote(Path("a/b"))
    path = remote.as_path("gs://speech/a/b")
    assert str(path) == "gs://speech/a/b" and str(path.parent / "c") == "gs://speech/a/c"
    assert remote.is_remote(path) and remote.absolute(path) == path
    for text in ("s3://speech/a", "http://x/y", "gs://", "gs:///a"):
        line = f"^{text}: expected a local path or gs://BUCKET/DIRECTORY$"
        with pytest.raises(ValueError, match=line):
            remote.as_path(text)


def test_a_file_appears_when_it_is_complete(bucket):
    path = remote.as_path("gs://speech/files/a.json")
    with pytest.raises(KeyError), files.atomic_write(path) as file:
        file.write("half")
        raise KeyError
    assert bucket.names("speech/files") == []
    with files.atomic_write(path) as file:
        file.write("é")
    assert path.read_text() == "é" and bucket.names("speech/files") == ["speech/files/a.json"]


@pytest.mark.parametrize("marker", remote.MARKERS)
def test_a_directory_has_its_marker_last(bucket, marker):
    out = remote.as_path(f"gs://speech/{marker}/out")
    with pytest.raises(KeyError), files.atomic_directory(out) as work:
        (work / marker).write_text("{}")
        raise KeyError
    assert bucket.names(f"speech/{marker}") == []
    with files.atomic_directory(out) as work:
        (work / marker).write_text("{}")
        (work / "z").mkdir()
        (work / "z" / "last").write_text("1")
    names = [f"speech/{marker}/out/{marker}", f"speech/{marker}/out/z/last"]
    assert bucket.names(f"speech/{marker}") == names
    generation = {name: bucket.objects[tuple(name.split("/", 1))][1] for name in names}
    assert max(names, key=generation.__getitem__) == names[0]
    with pytest.raises(ValueError, match="exists already"), files.atomic_directory(out):
        pass


def test_what_a_killed_command_leaves_is_replaced(bucket, monkeypatch):
    """But not a directory of other content, and not a complete one."""
    out = remote.as_path("gs://speech/killed/out")
    with killed_while_copying(monkeypatch), files.atomic_directory(out) as work:
        for name in ("config.json", "old", "z"):
            (work / name).write_text("{}")
    names = [f"speech/killed/out/{name}" for name in (remote.UNFINISHED, "old")]
    assert bucket.names("speech/killed") == names and not files.exists(out)
    with files.atomic_directory(out) as work:
        (work / "config.json").write_text("{}")
    assert [path.name for path in remote.files(out)] == ["config.json"]
    (out / remote.UNFINISHED).write_text("")  # killed after the last file
    mine = remote.as_path("gs://speech/mine")
    (mine / "notes.txt").write_text("1")
    for path in (out, mine):
        assert files.exists(path)
        with pytest.raises(ValueError, match="exists already"), files.atomic_directory(path):
            pass
    assert (mine / "notes.txt").exists() and (out / "config.json").exists()


def test_a_copy_is_made_once_and_follows_changes(bucket):
    source = remote.as_path("gs://speech/copied")
    (source / "a").write_text("1")
    copy = remote.local_copy(source)
    assert (copy / "a").read_text() == "1"
    before = len(bucket.requests)
    assert remote.local_copy(source) == copy
    assert not any("alt=media" in request for request in bucket.requests[before:])
    (source / "a").write_text("2")
    assert (remote.local_copy(source) / "a").read_text() == "2"
    assert remote.local_copy(copy) == copy


def test_what_was_fetched_is_not_copied_back(bucket):
    """Unless it has changed: another process may have written a newer one in the meantime."""
    directory = remote.as_path("gs://speech/mirrored")
    (directory / "old").write_text("1")
    mirror = remote.Mirror(directory, ["old", "missing"])
    (mirror.local / "new").write_text("2")
    (directory / "old").write_text("3")
    mirror.push()
    assert (directory / "old").read_text() == "3" and (directory / "new").read_text() == "2"
    (mirror.local / "old").write_text("12")
    mirror.push()
    assert (directory / "old").read_text() == "12"


def test_only_the_first_process_mirrors_the_metrics(bucket, monkeypatch):
    directory = remote.as_path("gs://speech/processes")
    (directory / "metrics.jsonl").write_text('{"step": 0}\n')
    stage = SimpleNamespace(train=TrainConfig("1b"))
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    other = Reporter(stage, directory, SimpleNamespace(batches=[]), None, 1)
    assert list(other.out.iterdir()) == []
    (other.out / "bad-batch-1-1.npz").write_bytes(b"1")
    other.push()
    names = ["speech/processes/bad-batch-1-1.npz", "speech/processes/metrics.jsonl"]
    assert bucket.names("speech/processes") == names
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    first = Reporter(stage, directory, SimpleNamespace(batches=[]), None, 1)
    assert (first.out / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_a_checkpoint_is_read_from_a_bucket(tiny, checkpoint_dir, text_model):
    directory = tiny / "ckpt"
    assert info.parts(directory) == info.parts(checkpoint_dir)
    assert voices.names(directory) == ["espeak"]
    config = Omni2Config.load(directory / "config.json")
    x_vector = voices.resolve(directory, config, "espeak")
    assert np.array_equal(x_vector, voices.resolve(checkpoint_dir, config, "espeak"))
    model = Omni2.load(str(directory), decoder=False)
    ours, theirs = (parameters.flatten(m.params) for m in (model, text_model))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)
    assert model.tokenizer.prompt([1]) == text_model.tokenizer.prompt([1])


@pytest.mark.slow
def test_info_of_a_bucket(omni2, tiny, bucket):
    result = process("info", tiny / "ckpt", "--verify")  # which the environment tells the service
    assert result.returncode == 0 and b"are sound\n" in result.stdout, result.stderr.decode()
    names = bucket.names("speech/tiny/ckpt/params/llm")
    name = max(names, key=lambda name: len(content(bucket, name)))
    key, damaged = tuple(name.split("/", 1)), bytearray(content(bucket, name))
    damaged[len(damaged) // 2] ^= 1
    sound, bucket.objects[key] = bucket.objects[key], (bytes(damaged), 10**6)
    code, _, err = omni2("info", tiny / "ckpt", "--verify")
    bucket.objects[key] = sound
    assert code == 1
    assert "error: gs://speech/tiny/ckpt/params/llm is damaged: its parameter" in err
    line = "error: gs://speech/nowhere is not an omni2-jax checkpoint: it has no config.json"
    assert omni2("info", "gs://speech/nowhere")[0] == line


def content(bucket: Bucket, name: str) -> bytes:
    return bucket.objects[tuple(name.split("/", 1))][0]


@pytest.mark.slow
def test_a_run_in_a_bucket_is_resumed_and_exported(
    tiny, bucket, checkpoint_dir, talks, tmp_path, monkeypatch
):
    """Interrupted after its third step, with a state saved after the second."""
    devices = jax.devices()[:2]
    Run(toy_run(checkpoint_dir, talks), tmp_path / "run", devices).go()
    train = toy_run(str(tiny / "ckpt"), str(tiny / "data"))
    out = remote.as_path("gs://speech/runs/1b")
    interrupted = Run(train, out, devices)
    take_steps = interrupted.steps_from

    def fail(first, state, saved):
        step, taken = interrupted.take_step, []

        def take_step(*arguments):
            if len(taken) == 3:
                raise KeyboardInterrupt
            taken.append(1)
            return step(*arguments)

        interrupted.take_step = take_step
        return take_steps(first, state, saved)

    monkeypatch.setattr(interrupted, "steps_from", fail)
    with pytest.raises(KeyboardInterrupt):
        interrupted.go()
    assert not (out / "final").exists() and (out / "steps" / "2").exists()
    Run(train, out, devices).go()
    assert reported(out) == reported(tmp_path / "run")
    assert len(losses(out)) == 4
    assert any("tensorboard/events" in name for name in bucket.names("speech/runs/1b"))
    final, local = out / "final", tmp_path / "run" / "final"
    assert parameters.parts(final) == parameters.parts(local)
    assert json.loads((final / "config.json").read_text()) == json.loads(
        (local / "config.json").read_text()
    )
    for part in parameters.parts(local):
        stored = parameters.stored(final, part)
        for path, leaf in parameters.stored(local, part).items():
            assert np.array_equal(stored[path].read(), leaf.read())
    Omni2.load(final, decoder=False)


def test_a_data_set_is_read_from_a_bucket(tiny, talks):
    ours, theirs = Dataset(str(tiny / "data")), Dataset(talks)
    assert len(ours) == len(theirs)
    assert ours.dialogue(1).id == theirs.dialogue(1).id
    assert np.array_equal(ours.clip(0), theirs.clip(0))
    with pytest.raises(ValueError, match="holds no hidden states"):
        HiddenStates(tiny / "data", ours, 64)


def test_a_bucket_that_cannot_be_read(bucket, monkeypatch):
    remote.check_bucket.cache_clear()
    monkeypatch.setattr("fsspec.filesystem", lambda _: (_ for _ in ()).throw(OSError("no access")))
    with pytest.raises(ValueError, match=r"^gs://speech cannot be read: no access$"):
        remote.as_path("gs://speech/a")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'omni2-jax\[gcs\]'"):
        remote.as_path("gs://speech/a")


# ---- jobs ----


def test_a_job_goes_on(bucket, tmp_path):
    """Its journal is a folder of objects. The machine, with all local files, may be another one."""
    here = job(tmp_path / "here")
    write(here.run(items(30)), tmp_path / "here.jsonl")
    there = job(tmp_path / "there", directory=remote.as_path("gs://speech/job"))
    with pytest.raises(OSError, match="no electricity"):
        there.run(items(30, w9={"error": "no electricity"}))
    names = bucket.names("speech/job/journal-0-of-1.jsonl/")
    assert len(names) > 1 and bucket.names("speech/job/text/")
    results = there.run(items(30))
    write(results, tmp_path / "there.jsonl")
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert {key for key, count in calls(tmp_path / "there").items() if count > 1} == {"w9"}
    with pytest.raises(ValueError, match=r"gs://speech/job/.* was begun with seed 1, not 2"):
        job(tmp_path / "there", directory=there.directory, settings={"seed": 2}).run(items(30))
    with pytest.raises(ZeroDivisionError):
        nowhere = remote.as_path("gs://speech/none")
        job(tmp_path, directory=nowhere, make=lambda: 1 / 0).run(items(3))
    assert bucket.names("speech/none") == []


def test_prepare_in_shards(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "GROUP_BATCHES", 1)
    source, out = EXAMPLES / "training", remote.as_path("gs://speech/prepared")
    prepare.prepare(source, tmp_path / "data", batch=1)
    for index in (1, 0):
        prepare.prepare(source, out, batch=1, where=Where(shard=Shard(index, 2)))
        assert not out.exists()
    assert bucket.names("speech/prepared.work/journal-1-of-2.jsonl/")
    prepare.prepare(source, out, batch=1)
    assert not bucket.names("speech/prepared.work")
    for path in (tmp_path / "data").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_prepare_goes_on_after_an_upload_that_was_killed(bucket, tmp_path, monkeypatch):
    source, out = EXAMPLES / "training", remote.as_path("gs://speech/uploaded")
    with killed_while_copying(monkeypatch):
        prepare.prepare(source, out)
    assert out.exists() and bucket.names("speech/uploaded.work/journal")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "GroupWorker", lambda *_: pytest.fail("made again"))
        prepare.prepare(source, out)
    assert len(Dataset(str(out))) == 4 and not bucket.names("speech/uploaded.work")
    assert not (out / remote.UNFINISHED).exists()
