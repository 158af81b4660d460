"""Jobs: resumable, killed and interrupted, in shards, and the same bytes in the end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from omni2_jax.jobs import Item, Job, Result, Shard, Where
from omni2_jax.jobs.where import parse_shard
from tests.support.jobs import calls, items, job, write
from tests.support.paths import ROOT

COUNT = 60


def run(out, count=COUNT, where=None, changes=None, **settings):
    return job(out, **settings).run(items(count, **changes or {}), where or Where(), count)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> bytes:
    """The result of one worker."""
    out = tmp_path_factory.mktemp("expected")
    write(run(out, workers=1), out / "result.jsonl")
    return (out / "result.jsonl").read_bytes()


def test_results_are_those_of_the_function(tmp_path):
    results = run(tmp_path)
    assert [outcome.key for outcome in results] == [f"w{i}" for i in range(COUNT)]
    refused = [item for item in items(COUNT) if len(item.payload["text"]) % 7 == 0]
    assert results.refused == {"length": len(refused)} and 0 < len(refused) < COUNT
    for outcome, item in zip(results, items(COUNT), strict=True):
        if item in refused:
            assert outcome.reason == "length" and item.payload["text"] in outcome.message
        else:
            assert outcome.value == {"text": item.payload["text"][::-1]}
    assert len(list(results.accepted())) == COUNT - len(refused)
    first = refused[0].payload["text"]
    assert results.summary() == (
        f"{COUNT - len(refused)} words; {len(refused)} refused: {len(refused)} x length "
        f"(first: {refused[0].key}: {first!r} has {len(first)} letters)"
    )


@pytest.mark.parametrize("kind, workers", [("threads", 9), ("processes", 2)])
def test_the_same_bytes_with_any_workers(kind, workers, expected, tmp_path):
    write(run(tmp_path, kind=kind, workers=workers), tmp_path / "result.jsonl")
    assert (tmp_path / "result.jsonl").read_bytes() == expected
    assert set(calls(tmp_path).values()) == {1}


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_kill(kind, expected, tmp_path):
    """A killed process loses what was in flight, twice the workers; a torn line is dropped."""
    command = [sys.executable, "-m", "tests.support.jobs", tmp_path, COUNT, 0.06, kind]
    command = list(map(str, command))
    journal = tmp_path / "job" / "journal-0-of-1.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = journal.read_bytes()
    finished = done.count(b"\n") - 1
    assert 9 <= finished < COUNT
    with open(journal, "ab") as file:
        file.write(done.splitlines()[-1][:-5])
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "result.jsonl").read_bytes() == expected
    twice = [key for key, count in calls(tmp_path).items() if count > 1]
    assert len(calls(tmp_path)) == COUNT and len(twice) <= 8
    assert journal.read_bytes().startswith(done[: done.rindex(b"\n") + 1])


def test_an_interrupt_finishes_what_is_being_processed(expected, tmp_path):
    command = [sys.executable, "-m", "tests.support.jobs", str(tmp_path), str(COUNT), "0.05"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "calls").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert "finishing the items that are being processed" in errors and process.returncode
    begun = calls(tmp_path)
    assert 0 < len(begun) < COUNT
    write(run(tmp_path), tmp_path / "result.jsonl")
    assert (tmp_path / "result.jsonl").read_bytes() == expected
    assert set(calls(tmp_path).values()) == {1} and begun.keys() <= calls(tmp_path).keys()


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_an_error_ends_the_job_and_keeps_the_rest(kind, tmp_path):
    broken = {"w7": {"error": "no electricity"}}
    with pytest.raises(OSError, match="no electricity"):
        run(tmp_path, changes=broken, kind=kind, workers=2)
    assert 7 <= len(calls(tmp_path)) <= 7 + 1 + 2 * 2
    with pytest.raises(ValueError, match="other items: number 2, 'w2', has other content now"):
        run(tmp_path, changes={"w2": {"text": "other"}})
    assert len(run(tmp_path)) == COUNT
    assert {key for key, count in calls(tmp_path).items() if count > 1} == {"w7"}


def test_a_process_that_dies(tmp_path):
    with pytest.raises(RuntimeError, match="a worker process died"):
        run(tmp_path, changes={"w3": {"death": True}}, kind="processes", workers=1)
    assert len(run(tmp_path)) == COUNT


def test_a_damaged_source_keeps_what_was_read_before(tmp_path):
    def source():
        yield from items(5)
        raise ValueError("line 6 is damaged")

    with pytest.raises(ValueError, match="line 6"):
        job(tmp_path).run(source())
    assert len(calls(tmp_path)) == 5
    run(tmp_path)
    assert set(calls(tmp_path).values()) == {1}


# ---- shards ----


def test_shards(expected, tmp_path):
    for index in (2, 0):
        assert run(tmp_path, where=Where(shard=Shard(index, 3))) is None
    with pytest.raises(ValueError, match=r"20 words are missing in .*--shard 1/3"):
        run(tmp_path)
    assert run(tmp_path, where=Where(shard=Shard(1, 3))) is None
    write(run(tmp_path), tmp_path / "result.jsonl")
    assert (tmp_path / "result.jsonl").read_bytes() == expected
    assert set(calls(tmp_path).values()) == {1} and len(calls(tmp_path)) == COUNT
    with pytest.raises(ValueError, match="was begun with 3 shards, not 4"):
        run(tmp_path, where=Where(shard=Shard(0, 4)))


def test_more_shards_than_items(tmp_path):
    for index in range(5):
        run(tmp_path, 3, where=Where(shard=Shard(index, 5)))
    assert [outcome.key for outcome in run(tmp_path, 3)] == ["w0", "w1", "w2"]


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "0/0", "1/2/3"])
def test_a_shard_that_is_none(text):
    with pytest.raises(ValueError, match="is no shard; expected I/N"):
        parse_shard(text)
    assert parse_shard("3/4") == Shard(3, 4)


# ---- what is refused ----


def test_gpus_without_ray():
    with pytest.raises(ValueError, match=r"^--ray-gpus is for --ray"):
        Where(ray_gpus=1)
    assert Where(ray="auto", ray_gpus=1).ray_gpus == 1


def test_other_settings_are_named(tmp_path):
    run(tmp_path, settings={"seed": 1, "voice": ("a", "b")})
    assert run(tmp_path, settings={"seed": 1, "voice": ["a", "b"]}) is not None
    with pytest.raises(ValueError, match="was begun with seed 1, not 2"):
        run(tmp_path, settings={"seed": 2, "voice": ("a", "b")})
    with pytest.raises(ValueError, match="was begun with speed None, not 3"):
        run(tmp_path, settings={"seed": 1, "voice": ("a", "b"), "speed": 3})
    with pytest.raises(ValueError, match="was begun with job 'words', not 'clips'"):
        run(tmp_path, name="clips", settings={"seed": 1, "voice": ("a", "b")})


def test_a_damaged_journal(tmp_path):
    run(tmp_path)
    path = tmp_path / "job" / "journal-0-of-1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for number, text in ((3, b"{}\n"), (5, b"\0\0\n"), (0, b"7\n")):
        path.write_bytes(b"".join([*lines[:number], text, *lines[number + 1 :]]))
        with pytest.raises(ValueError, match=rf"damaged: line {number + 1}|no journal of a job"):
            run(tmp_path)
        assert len(path.read_bytes().splitlines()) == len(lines)  # nothing is lost


def test_one_process_at_a_time(tmp_path):
    with (
        job(tmp_path).journal(Shard(0, 1)),
        pytest.raises(ValueError, match="another process is working on it"),
    ):
        run(tmp_path)


def test_two_items_with_the_same_key(tmp_path):
    with pytest.raises(ValueError, match="the items 1 and 3 have the same key, 'w1'"):
        job(tmp_path).run([*items(3), *items(2)[1:]])


def test_nothing_is_left_of_a_job_without_outcomes(tmp_path):
    def fail():
        raise ValueError("no such voice")

    with pytest.raises(ValueError, match="no such voice"):
        Job("words", tmp_path / "a" / "b", {}, fail).run(items(3))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*file/b"):
        Job("words", tmp_path / "file" / "b", {}, fail).run(items(3))


def test_more_and_fewer_items(tmp_path):
    for count in (9, 20, 5):
        results = run(tmp_path, count)
        assert results is not None and len(results) == len(list(results)) == count
    assert set(calls(tmp_path).values()) == {1}


def test_no_items(tmp_path):
    results = job(tmp_path).run([])
    assert results is not None and list(results) == [] and results.summary() == "0 words"


def test_payloads_that_are_not_json(tmp_path):
    """They have a digest of their own."""
    results = Job("blobs", tmp_path, {}, lambda: lambda data: Result(len(data))).run(
        [Item("a", b"\0" * 3, digest="3"), Item("b", b"\0", digest="1")]
    )
    assert results is not None and [outcome.value for outcome in results] == [3, 1]
