"""The meshes of eight devices that the tests use: (replica, fsdp, tensor)."""

import pytest

MESHES = {
    "2x2x2": (2, 2, 2),
    "2x4": (1, 2, 4),
    "8x1": (1, 8, 1),
    "1x8": (1, 1, 8),
}
# The first mesh has all three axes. On the second, `tensor` does not divide the key/value heads;
# tests/test_training_mesh.py moves a run to it. The others have only one of these axes.
MESH_PARAMS = [
    pytest.param(mesh, id=name, marks=() if name == "2x2x2" else pytest.mark.nightly)
    for name, mesh in MESHES.items()
]
