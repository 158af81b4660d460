"""benchmarks.aot: what is counted, on the devices of the tests, and what cannot be compiled."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import aot
from benchmarks.hlo import collectives
from benchmarks.sizes import SIZES
from omni2_jax.models.model import language_dtype
from omni2_jax.sharding import make_mesh

PROGRAM = """HloModule jit_f, entry_computation_layout={(bf16[4,8]{1,0})->bf16[4,8]{1,0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %gathered = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, dimensions={0}
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %gathered)
}

%to_seven (p: (s32[], bf16[4,8])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%i, %seven), direction=LT
}

%twice (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  ROOT %inner = (s32[], bf16[4,8]{1,0:T(8,128)}) while(%p), condition=%to_seven, body=%body
}

%reducing (p: (s32[], f32[])) -> (s32[], f32[]) {
  %sum = f32[] all-reduce(%x), channel_id=2, to_apply=%add
}

%whenever (p: (s32[], f32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%some (p: f32[16]) -> f32[16] {
  ROOT %some.1 = f32[16] collective-permute(%p), channel_id=3
}

%more (p: f32[16]) -> f32[32] {
  ROOT %more.1 = (f32[16]{0}, f32[16]{0}) all-to-all(%p, %p), channel_id=4
}

%step (p: f32[16]) -> f32[4] {
  %piece = f32[4]{0} reduce-scatter(%p), channel_id=5, to_apply=%add
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %outer = (s32[], bf16[4,8]{1,0}) while(%a), condition=%c, body=%twice, backend_config={KNOWN}
  %open = (s32[], f32[]) while(%b), condition=%whenever, body=%reducing
  %either = f32[16] conditional(%flag, %b, %b), branch_computations={%some, %more}
  %begun = f32[4] fusion(%b), kind=kCustom, calls=%step
  %done = f32[4] fusion(%begun), kind=kCustom, calls=%step
  %start = (pred[8]{0}, pred[64]{0}) all-gather-start(%flags), channel_id=6, dimensions={0}
  ROOT %end = pred[64]{0} all-gather-done(%start)
}
""".replace("{KNOWN}", '{"known_trip_count":{"n":"2"}}')


def test_collectives_are_counted_as_often_as_they_run():
    found = collectives(PROGRAM)
    assert found.bytes == {
        "all-gather": 2 * 7 * 64 + 64,
        "all-reduce": 4,
        "all-to-all": 128,
        "reduce-scatter": 16,
    }
    assert found.open_loops == 1


@pytest.mark.parametrize(
    ("job", "kind"),
    [
        ("train", "parameters, trained"),
        ("train2", "optimizer"),
        ("prefill", "caches"),
        ("step", "flow and vocoder"),
    ],
)
def test_shares(job, kind):
    """On a mesh of 8, a device holds an eighth of what is sharded. Every argument has a kind."""
    shares = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(fsdp=4, tensor=2)):
        made = aot.job_of(job, SIZES["tiny"], mesh, 8, [])
        shares.append({kind: aot.share(tree) for kind, tree in made.kinds.items()})
        whole = sum(shares[-1].values())
        assert (
            whole <= aot.share((made.arguments, made.keywords)) <= whole + 64
        )  # counters of steps besides
    alone, cut = shares
    assert alone.keys() == cut.keys() and all(cut[name] <= alone[name] for name in cut)
    assert alone[kind] / 8 <= cut[kind] < alone[kind] / 2 * 1.2


@pytest.mark.slow
def test_compiled_for_eight():
    """The arguments of the compiled program are as large as their shapes and shardings say."""
    mesh = make_mesh(fsdp=4, tensor=2)
    found = aot.compiled(aot.job_of("train", SIZES["tiny"], mesh, 8, ["dtype=float32"]), mesh)
    np.testing.assert_allclose(found["arguments"], sum(found["bytes"].values()), rtol=1e-3)
    assert found["peak"] >= found["arguments"] and found["temporaries"] > 0 and found["flops"] > 0
    assert (
        found["collectives"]["all-gather"] > found["bytes"]["parameters, trained"]
    )  # each is gathered, forwards and backwards


def test_what_a_device_holds():
    mesh = make_mesh(fsdp=4, tensor=2)
    made = aot.job_of("step", SIZES["tiny"], mesh, 8, ["llm_capacity=512"])
    params, state = made.arguments
    assert (
        language_dtype(params) == jnp.bfloat16
        and params["flow"]["embed"]["table"].dtype == jnp.float32
    )
    pairs = state.language.llm.pairs[0]
    assert pairs.shape == (2, 8, 2, 512, 16)
    assert pairs.sharding.shard_shape(pairs.shape) == (2, 2, 1, 512, 16)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.29G of 15.75G hbm. "
            "Exceeded hbm capacity by 17.54G.",
            33.29,
        ),
        (
            "the total memory required for HLO temporaries (16.01G) exceeds available HBM "
            "(15.75G).",
            16.01,
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_what_xla_says_that_does_not_fit(message, gib):
    assert aot.required_bytes(message) == (gib and gib * 2**30)


# --- what cannot be


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"libtpu, which is not installed: pip install 'omni2-jax\[tpu-aot\]'"
    ):
        aot.devices("v5e:2x4")


@pytest.mark.parametrize(
    ("job", "batch", "changes", "message"),
    [
        (
            "train",
            6,
            [],
            r"6 rows \(batch 6 in 1 microbatches\) cannot be cut over the 4 devices .*; "
            r"a batch of 8 can",
        ),
        ("train", 8, ["microbatches=4"], "2 rows .* a batch of 16 can"),
        ("train2", 8, ["remta=full"], "there is no 'remta'; did you mean remat"),
        ("step", 8, ["chnk=10"], "EngineConfig has no 'chnk'; did you mean flow_chunk"),
    ],
)
def test_bad_jobs(job, batch, changes, message):
    with pytest.raises(ValueError, match=message):
        aot.job_of(job, SIZES["tiny"], make_mesh(fsdp=4, tensor=2), batch, changes)


def command(*given: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", *given],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_compiled_for_tpus(tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "found.json"
    done = command(
        "--topology", "v5e:2x2", "--size", "tiny", "--job", "prefill", "--json", str(out)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["fits"] and found["hbm"] == 16 * 2**30
    assert (
        found["arguments"] > 0 and found["temporaries"] < found["peak"]
    )  # (what a job does not read is no argument of it)


@pytest.mark.parametrize(
    ("topology", "mesh", "message"),
    [
        ("v5e:3x3", "fsdp=1", "topology 'v5e:3x3' does not exist"),
        (
            "v5e:2x2",
            "tensor=3",
            "mesh 1 x -1 x 3 (replica x fsdp x tensor) does not fit the 4 devices there are",
        ),
    ],
)
def test_slices_that_cannot_be(topology, mesh, message):
    pytest.importorskip("libtpu")
    done = command("--topology", topology, "--size", "tiny", "--job", "prefill", "--mesh", mesh)
    assert (
        done.returncode == 1
        and f"error: {message}" in done.stderr
        and "Traceback" not in done.stderr
    )
