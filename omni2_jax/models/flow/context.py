"""What a stretch of frames sees: its own chunk, chunks before it, and what causal layers keep of those.

B rows, T frames of the stretch, S frames that can be seen, N heads, H head size, C channels, L layers.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from omni2_jax.models.layers import Conv1d, scan
from omni2_jax.sharding import constrain

Array = jax.Array

UNSEEN = -1e30  # finite: a padded frame may see nothing at all, and must not turn into nan


@dataclass(frozen=True)
class Chunks:
    """A unit sees its own chunk of `size` units and `left` chunks before it (None: all of them).

    The first chunk is `shift` units shorter. With shift = look-ahead, units that arrive `size` at a time complete
    exactly one chunk each time. `size` may be a traced number: training draws it.
    """

    size: int | Array
    left: int | None = None
    shift: int = 0

    def __post_init__(self):
        if isinstance(self.size, int) and (
            self.size < 1 or not 0 <= self.shift < self.size or (self.left or 0) < 0
        ):
            raise ValueError(
                f"{self}: expected size >= 1, left >= 0 or None, and shift from 0 to size - 1"
            )

    def end(self, unit: Array) -> Array:
        """The first unit behind the chunk of `unit`."""
        return ((unit + self.shift) // self.size + 1) * self.size - self.shift

    def sees(self, query: Array, key: Array, rate: int) -> Array:
        """Whether frames `query` [B, T] see frames `key` [B, S], `rate` frames to a unit, -1 = no such frame: bool [B, T, S]."""
        own, other = (self.end(index // rate) for index in (query[:, :, None], key[:, None, :]))
        seen = (other <= own) & (key >= 0)[:, None, :]
        return seen if self.left is None else seen & (other >= own - self.left * self.size)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """The stretch of frames that a call computes. A whole utterance has no past: its keys are its own frames."""

    valid: Array  # [B, T] bool: the frame exists
    query: Array  # [B, T] its index
    key: Array  # [B, S] the index of each key
    bias: Array  # [B, 1, T, S] float32, 0 where a frame sees a key
    used: Array  # [B] keys before which all lie that are seen
    slot: Array | None = None  # [B] where in the memory the window's keys go
    kept: Array | None = None  # [B] how many of the window's frames are past for the next call
    extents: tuple[int, ...] = field(
        default=(), metadata={"static": True}
    )  # attention reads the least of these that holds `used`

    @classmethod
    def over(
        cls, query: Array, key: Array, length: Array, chunks: Chunks, rate: int, **memory
    ) -> "Window":
        """Frames `query` [B, T] among keys `key` [B, S] of utterances of `length` [B] frames, `rate` frames to a unit."""
        seen = chunks.sees(query, key, rate) & (key < length[:, None])[:, None]
        used = jnp.max(jnp.where(seen.any(1), jnp.arange(1, key.shape[1] + 1), 0), 1)
        return cls(
            query < length[:, None],
            query,
            key,
            jnp.where(seen, 0.0, UNSEEN)[:, None],
            used,
            **memory,
        )

    @classmethod
    def whole(cls, frames: int, length: Array, chunks: Chunks, rate: int) -> "Window":
        """All frames of right-padded utterances."""
        index = jnp.broadcast_to(jnp.arange(frames), (length.shape[0], frames))
        return cls.over(index, index, length, chunks, rate)

    def first(self, frames: int) -> "Window":
        """Its first frames alone."""
        return dataclasses.replace(
            self,
            valid=self.valid[:, :frames],
            query=self.query[:, :frames],
            bias=self.bias[:, :, :frames],
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """Keys and values of frames that may be seen again. Where a frame lies in S is the caller's business.

    They lie side by side in one array, since a TPU pads the last axis to 128: keys of 64 alone would take twice the room, or be
    kept in another order between two calls and copied in each.
    """

    axes: ClassVar = ("batch", "heads", None, None)  # of each layer
    pairs: Array  # [L, B, N, S, 2H]

    @classmethod
    def empty(
        cls, layers: int, batch: int, capacity: int, heads: int, head_size: int, dtype
    ) -> "Memory":
        return cls(jnp.zeros((layers, batch, heads, capacity, 2 * head_size), dtype))

    def write(self, layer: Array, slot: Array, k: Array, v: Array) -> "Memory":
        """Put k and v [B, T, N, H] of one layer at slots slot[b], slot[b] + 1, ...; nothing of rows that would leave the memory."""
        rows, pairs = (
            jnp.arange(len(slot)),
            jnp.concatenate([k, v], -1).swapaxes(1, 2).astype(self.pairs.dtype),
        )
        stretch = jax.lax.ScatterDimensionNumbers(
            (1, 2, 3), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 3)
        )
        where = jnp.stack([jnp.full_like(slot, layer), rows, slot], -1)
        # Whole stretches: frame by frame, heads would have to lie behind time, where no attention wants them.
        drop = jax.lax.GatherScatterMode.FILL_OR_DROP
        return Memory(
            jax.lax.scatter(self.pairs, where, pairs, stretch, unique_indices=True, mode=drop)
        )

    def read(self, layer: Array, size: int, dtype) -> tuple[Array, Array]:
        """The first `size` slots of a layer's keys and values, [B, N, size, H]."""
        batch, heads, _, width = self.pairs.shape[1:]
        part = lambda first: jax.lax.dynamic_slice(
            self.pairs, (layer, 0, 0, 0, first), (1, batch, heads, size, width // 2)
        )  # noqa: E731
        return part(0)[0].astype(dtype), part(width // 2)[0].astype(dtype)


def attend(
    q: Array, k: Array, v: Array, bias: Array, window: Window, memory: Memory | None, layer: Array
) -> tuple[Array, Memory | None]:
    """Softmax attention of scaled q over k and v, all [B, T, N, H], and over the memory, in which they are left -> [B, T, N, H].

    bias broadcasts to [B, N, T, S]. Heads go before time: keys and values that are read often lie head by head.
    """

    def over(keys: Array, values: Array) -> Array:
        weights = jax.nn.softmax(
            jnp.einsum("BTNH,BNSH->BNTS", q, keys) + bias[..., : keys.shape[2]], -1
        )
        # Time comes before heads only at the end: as an einsum's output it would double the time on a CPU.
        return jnp.einsum("BNTS,BNSH->BNTH", weights, values).swapaxes(1, 2)

    if memory is None:
        return over(k.swapaxes(1, 2), v.swapaxes(1, 2)), None
    memory = memory.write(layer, window.slot, k, v)
    least = jnp.sum(window.used.max() > jnp.array(window.extents[:-1]))
    return jax.lax.switch(
        least,
        [lambda size=size: over(*memory.read(layer, size, q.dtype)) for size in window.extents],
    ), memory


def run_blocks(
    blocks: nnx.Module, x: Array, window: Window, memory: Memory | None, layers: Array
) -> tuple[Array, Memory | None]:
    """x [B, T, C] through stacked transformer blocks, whose places in the memory are `layers`."""

    def body(block, carry, layer):
        x, memory = block(carry[0], window, carry[1], layer)
        return (constrain(x, "batch", None, None), memory), None

    # Training has no memory. What it would keep of every attention, 115 GB of 16 replies of 20 s, is computed again instead.
    return scan(blocks, body, (x, memory), layers, "full" if memory is None else "none")[0]


class CausalConv(Conv1d):
    """A convolution over each frame and the K - 1 frames before it, [B, T, C] -> [B, T, C']."""

    def __init__(self, rngs: nnx.Rngs, size: int, c_in: int, c_out: int):
        super().__init__(rngs, (size, c_in, c_out), axes=(None, None, "embed"))

    def tail(self, batch: int, dtype) -> Array:
        """An empty tail (of each layer, where layers are stacked): the inputs [B, K - 1, C] before a window."""
        *layers, size, channels, _ = self.kernel.shape
        return jnp.zeros((*layers, batch, size - 1, channels), dtype)

    def __call__(self, x: Array, window: Window, tail: Array | None) -> tuple[Array, Array | None]:
        """The convolution, and the tail before the next window. Before an utterance's first frame there are zeros."""
        if tail is None:
            return super().__call__(
                jnp.pad(x, ((0, 0), (self.kernel.shape[0] - 1, 0), (0, 0)))
            ), None
        x = jnp.concatenate(
            [jnp.where(window.query[:, :1, None] > 0, tail, 0).astype(x.dtype), x], 1
        )
        cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, tail.shape[1]))
        after = jnp.where(
            window.kept[:, None, None] > 0, cut(x, window.kept).astype(tail.dtype), tail
        )
        return super().__call__(x), after
