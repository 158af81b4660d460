"""Jobs on a Ray cluster of two nodes on this machine, one of which is killed."""

import subprocess
import sys
import time

import pytest

from omni2_jax.jobs import Where
from omni2_jax.train.data import prepare
from tests.support.jobs import calls, items, job, processes, write
from tests.support.paths import EXAMPLES, ROOT

pytest.importorskip("ray")
from ray.cluster_utils import Cluster

COUNT = 60


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU each, without a driver."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster()
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
        yield cluster
        cluster.shutdown()


@pytest.mark.slow
def test_ray(cluster, tmp_path):
    """Refusals, an error of the function and one of its making; prepare; then a node is killed."""

    def broken():
        raise OSError("no such voice")

    where = Where(ray=cluster.address)
    with pytest.raises(OSError, match="no such voice"):
        job(tmp_path / "made", make=broken).run(items(3), where)
    with pytest.raises(OSError, match="no electricity"):
        job(tmp_path / "called").run(items(9, w3={"error": "no electricity"}), where)
    assert len(job(tmp_path / "called").run(items(9)) or ()) == 9  # it goes on without Ray
    assert {key for key, count in calls(tmp_path / "called").items() if count > 1} == {"w3"}
    for name, place in (("here", Where()), ("ray", where)):
        prepare.prepare(EXAMPLES / "training", tmp_path / name / "data", batch=1, where=place)
    for path in (tmp_path / "here" / "data").iterdir():
        assert (tmp_path / "ray" / "data" / path.name).read_bytes() == path.read_bytes()

    expected, out = tmp_path / "expected", tmp_path / "out"
    write(job(expected).run(items(COUNT)), expected / "result.jsonl")
    command = ["-m", "tests.support.jobs", out, COUNT, 0.1, "threads", cluster.address]
    driver = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    journal = out / "job" / "journal-0-of-1.jsonl"
    while len(processes(out)) < 2 or journal.read_bytes().count(b"\n") < 12:
        assert driver.poll() is None
        time.sleep(0.02)
    finished = [line.split(b'"')[5].decode() for line in journal.read_bytes().splitlines()[1:]]
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    assert driver.wait() == 0 and len(finished) < COUNT
    assert (out / "result.jsonl").read_bytes() == (expected / "result.jsonl").read_bytes()
    counts = calls(out)
    assert len(counts) == COUNT and {counts[key] for key in finished} == {1}
    assert sum(counts.values()) <= COUNT + 1  # at most the item of the node that died


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere.invalid:1", "127.0.0.1:99999", "x"])
def test_no_cluster(address, tmp_path):
    with pytest.raises(ValueError, match=f"no Ray cluster at '{address}': "):
        job(tmp_path).run(items(3), Where(ray=address))
    assert list(tmp_path.iterdir()) == []
