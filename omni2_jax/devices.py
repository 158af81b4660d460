"""Peak compute rate and memory of accelerators, from the vendors' data sheets.

The keys of the tables are the beginnings of a device's `device_kind`.
"""

from collections.abc import Mapping
from typing import Any

Device = Any  # jax.Device is a variable, which type checkers do not accept as a type

# Dense bfloat16 FLOPs per second of one device. The first key that fits counts.
PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}
# GiB of one device; a chip of v4 and of TPU7x has two.
MEMORY_GIB = {
    "NVIDIA H100": 80,
    "NVIDIA H200": 141,
    "TPU v4": 16,
    "TPU v5 lite": 16,
    "TPU v5": 95,
    "TPU v6 lite": 32,
    "TPU7x": 96,
}


def peak_flops(device: Device) -> float | None:
    """Dense bfloat16 FLOPs per second, None for a device that is not in the table."""
    return lookup(PEAK_FLOPS, device)


def memory_gib(device: Device) -> float | None:
    """GiB of memory, None for a device that is not in the table."""
    return lookup(MEMORY_GIB, device)


def lookup(table: Mapping[str, float], device: Device) -> float | None:
    """The value of the first key that the device's kind begins with."""
    return next(
        (value for kind, value in table.items() if device.device_kind.startswith(kind)), None
    )
