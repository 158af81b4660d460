"""XLA's settings in the processes of the tests. JAX reads them when it is imported, not here."""

import os

# By default LLVM optimizes what XLA compiles. That takes almost half of the time, and a tiny model
# gains little by it. The nightly tests run as optimized: they set XLA_FLAGS themselves.
QUICK = "--xla_backend_optimization_level=0"
DEVICES = "--xla_force_host_platform_device_count"


def flags(devices: int) -> str:
    """The value of XLA_FLAGS for a process with so many virtual devices."""
    given = os.environ.get("XLA_FLAGS", QUICK).split()
    kept = [flag for flag in given if not flag.startswith(DEVICES)]
    return " ".join([*kept, f"{DEVICES}={devices}"])
