"""The meshes of eight devices that the tests use: (replica, fsdp, tensor)."""

import pytest

QUICK = "2x2x2"  # all three axes
MESHES = {
    "8x1": (1, 8, 1),
    "1x8": (1, 1, 8),
    "2x4": (1, 2, 4),
    QUICK: (2, 2, 2),
}
# For parametrize: the quick tests run on one mesh.
MESH_PARAMS = [
    pytest.param(mesh, id=name, marks=[] if name == QUICK else [pytest.mark.slow])
    for name, mesh in MESHES.items()
]
