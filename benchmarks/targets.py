"""The devices that `benchmarks.aot` compiles for: TPU slices and H100 machines, without having any.

Compilers need no device. libtpu knows every slice by its name; what XLA asks a real GPU for is
written down in H100 (values: openxla/xla, xla/backends/gpu/target_config/specs).
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import topologies

from omni2_jax import files
from omni2_jax.devices import Device

# Names of slices that were tried.
KNOWN_SLICES = (
    "v5e:1x1, v5e:2x2, v5e:2x4, v5e:4x4, v5e:4x8, v5e:8x8, v5e:16x16, v4:2x2x1, v5p:2x2x1, "
    "v5p:4x4x4, v6e:2x4 and tpu7x:2x2x1"
)
GPUS = {"h100": "1x1x1", "h100x8": "1x1x8"}  # partitions x hosts x devices of a host
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices(topology: str) -> Sequence[Device]:
    """The devices of a TPU slice, as "v5e:4x4", or of a machine with GPUs, as "h100x8".

    Raises ValueError if there is no such topology, or if its compiler is not installed.
    """
    if topology.startswith("h100"):
        return gpus(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "compiling for TPUs needs libtpu, which is not installed: "
            "pip install 'omni2-jax[tpu-aot]'"
        )
    alone = {"chips_per_host_bounds": (1, 1, 1)} if re.fullmatch(r"\w+:1x1(x1)?", topology) else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **alone).devices
    except Exception as error:  # libtpu raises errors of many classes
        reason = files.first_line(error)
        raise ValueError(
            f"topology {topology!r} does not exist ({reason}); names that work are {KNOWN_SLICES}, "
            f"and for GPUs {', '.join(GPUS)}"
        ) from None


def gpus(topology: str) -> Sequence[Device]:
    """The devices of a machine with GPUs, by its name in GPUS; raises as `devices` does."""
    if topology not in GPUS:
        raise ValueError(
            f"topology {topology!r} does not exist; names of GPUs that work are {', '.join(GPUS)}"
        )
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise ValueError(
            "compiling for GPUs needs JAX's CUDA plugin, which is not installed: "
            "pip install 'omni2-jax[gpu-aot]'"
        )
    # XLA assembles kernels with ptxas, which lies in a package and not on the PATH.
    packages = importlib.util.find_spec("nvidia")
    places = (packages and packages.submodule_search_locations) or ()
    programs = [str(Path(place) / "cu13" / "bin") for place in places]
    os.environ["PATH"] = os.pathsep.join([*programs, os.environ["PATH"]])
    from jaxlib import xla_client

    jax.devices()  # finds the plugins; with JAX_PLATFORMS=cpu it starts none but the CPU's
    if not xla_client.pjrt_plugin_initialized("cuda"):
        xla_client.initialize_pjrt_plugin("cuda")
    return topologies.get_topology_desc(
        topology, platform="cuda", target_config=H100, topology=GPUS[topology]
    ).devices
