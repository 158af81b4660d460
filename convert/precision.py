"""The type in which a checkpoint stores its parameters."""

import dataclasses
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from omni2_jax.checkpoint.lazy import LazyArray
from omni2_jax.convert.release import Release

StoredType = Literal["float32", "bfloat16"]


def stored_as(release: Release, dtype: StoredType) -> Release:
    """The release with all floating parameters in `dtype`. Integers stay what they are."""
    params = jax.tree.map(partial(cast, dtype=np.dtype(jnp.dtype(dtype))), release.params)
    return dataclasses.replace(release, params=params)


def cast(leaf: LazyArray, dtype: np.dtype) -> LazyArray:
    """A floating parameter in another type, converted when it is read."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == dtype:
        return leaf
    return LazyArray(leaf.shape, dtype, lambda: leaf.read().astype(dtype))
