"""benchmarks.kernels and least: programs that XLA compiled for an H100, counted by hand."""

import importlib.util
from pathlib import Path

import jax
import pytest

from benchmarks import aot, kernels, least, targets
from benchmarks.kernels import Traffic
from benchmarks.sizes import SIZES
from omni2_jax.sharding import make_mesh

TEXTS = Path(__file__).parent / "hlo_texts"


def layer(op_name: str) -> str | None:
    return "layer" if "/layer/" in op_name else None


def counted(name: str, **how) -> dict[str, Traffic]:
    text = (TEXTS / f"{name}.hlo").read_text()
    return kernels.by_part(kernels.events(text, layer, **how))


def test_a_matmul_whose_partial_sums_are_written_out():
    """bf16 [64, 256] x [256, 512]: XLA adds up four parts, each float32 [64, 512]."""
    x, w, partial, y = 64 * 256 * 2, 256 * 512 * 2, 4 * 64 * 512 * 4, 64 * 512 * 2
    assert counted("matmul") == {"other": Traffic(2, (x + w + partial) + (partial + y))}


def test_slices_of_a_stack_in_a_loop():
    """Seven layers bf16 [256, 256] of x [64, 256]: each layer's weights are sliced out first."""
    w, x, partial = 256 * 256 * 2, 64 * 256 * 2, 8 * 64 * 256 * 4
    found = counted("stack")
    assert found["layer"] == Traffic(7 * 2, 7 * ((x + w + partial) + (partial + x)))
    # In each iteration the slice, by a number of 4 bytes, and the counter; and its comparison.
    iteration = (w + 4 + w) + (4 + 4) + (4 + 1)
    before = 2 * x + 2 * 4  # copies of what the loop changes
    assert found["other"] == Traffic(7 * 3 + 2, 7 * iteration + before)


def test_what_has_no_name_in_a_loop():
    """XLA does not say where the parts of a split matmul come from: the loop has one part only."""
    lines = (TEXTS / "stack.hlo").read_text().splitlines()
    unnamed = [line.split(", metadata")[0] if "dot" in line else line for line in lines]
    assert sum("/layer/" in line for line in unnamed) < sum("/layer/" in line for line in lines)
    found = kernels.by_part(kernels.events("\n".join(unnamed), layer))
    assert found == counted("stack")


def test_an_update_in_place():
    """A row of 64 numbers into [1000, 64]: the row and its index are read, the row is written."""
    assert counted("update") == {"other": Traffic(1, 64 * 4 + 4 + 64 * 4)}


def test_a_conditional():
    """Sort [1000, 64] and count its places, or add 1 to it: the costlier one, or a chosen one."""
    x = 1000 * 64 * 4
    assert counted("cond") == {"other": Traffic(1, x + 2 * x, waits=1)}
    add = counted("cond", choose=lambda name, branches: branches - 1)
    assert add == {"other": Traffic(1, x + x, waits=1)}


@pytest.mark.parametrize(("named", "counts"), [("one", "two"), ("two/sort", "two/sort")])
def test_a_branch_of_two_conditionals(named, counts):
    """XLA has merged it into one, which names the part of the other conditional."""
    text, x = (TEXTS / "cond.hlo").read_text(), 1000 * 64 * 4
    found = kernels.by_part(
        kernels.events(text, lambda op_name: named if "branch_1" in op_name else "two")
    )
    assert found.pop(counts).bytes == x + 2 * x
    assert not sum(traffic.bytes for traffic in found.values())


def test_what_moves_most():
    text = (TEXTS / "stack.hlo").read_text()
    (part, what, traffic), *_ = kernels.largest(kernels.events(text, layer), 3)
    assert part == "layer" and what.startswith("f32[8,64,256] gemm_fusion_dot jit(stack)")
    assert traffic.kernels == 7


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(step)/while/body/text_token/dot_general", "text_token"),
        ("jit(step)/while/body/text_token/sampling/cond/add", "text_token/sampling"),
        ("jit(step)/fused_rows/while/body/unit/mul", "unit"),
        ("jit(step)/cond/flow_10/while/body/euler_step/mul", "flow_10/euler_step"),
        ("jit(step)/cond/flow_10/sub", "flow_10"),
        ("jit(step)/sub", None),
    ],
)
def test_parts_by_scope(op_name, part):
    assert least.label(op_name) == part


def test_the_least_of_a_step():
    """By hand, for the tiny model: 2 layers, width 64, 2 kv heads of 16, vocabulary 512."""
    job = aot.job_of("step", SIZES["tiny"], make_mesh(devices=jax.devices()[:1]), 4, [], live=100)
    attention = 64 * (64 + 2 * 32) + (64 + 2 * 32) + 64 * 64
    weights = 2 * (attention + 3 * 64 * 128 + 2 * 64) + 512 * 64
    keys_and_values = 2 * 2 * 2 * 16 * 4
    part = job.parts["text_token"]
    assert part.least == 2 * (weights + keys_and_values * (100 + 1)) + 4 * 512 * 4
    assert part.passes == 3 and job.parts["unit"].passes == 9
    assert job.parts["flow_10/euler_step"].passes == 10 and job.parts["flow_3"].passes == 0
    rows = aot.traffic((TEXTS / "update.hlo").read_text(), job)
    assert rows["other"]["bytes"] == 516 and rows["text_token"]["bytes"] == 0


# --- what cannot be


def test_an_unknown_gpu():
    with pytest.raises(ValueError, match=r"'h100x3' does not exist; .* h100, h100x8"):
        targets.devices("h100x3")


def test_without_the_plugin(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"plugin, .*: pip install 'omni2-jax\[gpu-aot\]'"):
        targets.devices("h100")
