"""The key/value cache of decoding on TPU, and the kernel (Pallas) that writes one position of a
decode slot and reads those before it.

The life of a decode step in a layer:
1. A decode slot's keys are [M, G x K], all heads of a position side by side: whole registers of 128
   columns, whatever K is.
2. The grid walks a decode slot's blocks of positions, as many as the longest decode slot has.
   Beyond its own last one a decode slot repeats that block's address, for which nothing is fetched.
   So a step moves what is live, to a block; buckets only make blocks smaller.
3. The running maximum, sum and product begin with the new position, which is not in the cache yet.
4. Of the new position's block the 16 rows around it are written back, in the cache's own memory.

A head's query is spread out to the columns of its group, zeros in the others: then one product
serves all heads. It multiplies by many zeros on a matrix unit that would wait for memory anyway.
Queries and results cross the memory as they are, G x K wide.

Contexts are read several tokens at a time (S > 1) and much more rarely: by plain products over the
cache.

Shapes: W decode slots, S tokens a step, M positions, H query heads, G key/value heads, K head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from apr_jax.model.attention.packed_tpu import NEVER, dot
from apr_jax.model.config import ModelConfig
from apr_jax.model.kv_cache.cache import attend_cached

# Of a layer: keys and values, [W, M, G x K], M filled up to whole blocks.
Sides = tuple[jax.Array, jax.Array]
KERNEL = "decode_attention"
# Positions of a block, up to a bound. Half a block is read in vain on average, and a turn of the
# grid has a price of its own: short contexts take smaller blocks, long ones fewer turns.
BLOCKS = ((1_024, 128), (math.inf, 256))
# Most of a block's keys: VMEM holds two blocks of keys and two of values beside the sums.
_BYTES = 2**20
TILE = 16  # Rows of a register of bfloat16 numbers; of float32 ones it is two.


def empty(config: ModelConfig, slots: int, bound: int, bounds: tuple[int, ...]) -> Sides:
    """A layer's cache for positions below `bound`."""
    del bounds
    columns = config.kv_heads * config.head_size
    size = block_size(columns, jnp.dtype(config.dtype).itemsize, bound)
    shape = (slots, -(-bound // size) * size, columns)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def block_size(columns: int, itemsize: int, bound: int) -> int:
    """Positions of a block, for so many numbers a position: a power of two, so that smaller blocks
    fill larger ones.
    """
    fit = max(TILE, _BYTES // (columns * itemsize))
    return min(next(size for most, size in BLOCKS if bound <= most), 1 << (fit.bit_length() - 1))


def over(
    cache: Sides,
    positions: Int[Array, "W S"],
    bound: int,
    bounds: tuple[int, ...],
    interpret: bool = False,
) -> Callable:
    """A layer's attention, as `cache.over`.

    Args:
      interpret: runs the kernel as plain JAX on any device; for tests.
    """
    del bounds

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, Sides]:
        if q.shape[1] == 1:
            used = jnp.where(positions < bound, positions + 1, 0)[:, 0]
            return _attend_one(used, bound, q, k, v, cache, interpret)
        return _attend_many(positions, bound, q, k, v, cache)

    return attention


def _attend_many(
    positions: Array,
    bound: int,
    q: Array,
    k: Float[Array, "W G S K"],
    v: Float[Array, "W G S K"],
    cache: Sides,
) -> tuple[Array, Sides]:
    slots, groups, steps, _ = k.shape
    slot = jnp.arange(slots)[:, None]

    def store(old: Array, new: Array) -> Array:
        place = jnp.where(positions < bound, positions, old.shape[1])
        return old.at[slot, place].set(
            new.transpose(0, 2, 1, 3).reshape(slots, steps, -1), mode="drop"
        )

    def heads_first(side: Array) -> Array:
        return side.reshape(*side.shape[:2], groups, -1).transpose(0, 2, 1, 3)

    keys, values = store(cache[0], k), store(cache[1], v)
    mask = jnp.arange(keys.shape[1])[None, None, :] <= positions[:, :, None]
    return attend_cached(q, [(heads_first(keys), heads_first(values))], mask), (keys, values)


def _attend_one(
    used: Int[Array, " W"],
    bound: int,
    q: Float[Array, "W 1 H K"],
    k: Array,
    v: Array,
    cache: Sides,
    interpret: bool,
) -> tuple[Float[Array, "W 1 H K"], Sides]:
    """One token a decode slot, at place `used` - 1; a decode slot of which 0 are used stores
    nothing.
    """
    slots, _, heads, head_size = q.shape
    groups, columns = k.shape[1], cache[0].shape[2]
    shared = heads // groups  # Queries of a group.
    size = block_size(columns, cache[0].dtype.itemsize, bound)
    scaled = q.reshape(slots, groups, shared, head_size) * jnp.asarray(head_size**-0.5, q.dtype)

    def last(used: Array) -> Array:
        return jnp.maximum(used - 1, 0)

    per_slot = pl.BlockSpec((1, shared, columns), lambda w, t, used: (w, 0, 0))
    fresh = pl.BlockSpec((1, 1, columns), lambda w, t, used: (w, 0, 0))
    side = pl.BlockSpec(
        (1, size, columns), lambda w, t, used: (w, jnp.minimum(t, last(used[w]) // size), 0)
    )
    tile = pl.BlockSpec((1, TILE, columns), lambda w, t, used: (w, last(used[w]) // TILE, 0))
    found, keys, values = pl.pallas_call(
        functools.partial(_kernel, size=size, groups=groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(slots, last(used.max()) // size + 1),
            in_specs=[per_slot, fresh, fresh, side, side],
            out_specs=[per_slot, tile, tile],
            scratch_shapes=[
                pltpu.VMEM((heads, columns), jnp.float32),
                pltpu.VMEM((heads, 1), jnp.float32),
                pltpu.VMEM((heads, 1), jnp.float32),
                pltpu.VMEM((heads, columns), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((slots, shared, columns), q.dtype),
            *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in cache),
        ],
        input_output_aliases={4: 1, 5: 2},  # The cache, counted with `used`.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=KERNEL,
    )(
        used,
        scaled.swapaxes(1, 2).reshape(slots, shared, columns),
        k.reshape(slots, 1, columns),
        v.reshape(slots, 1, columns),
        *cache,
    )
    return found.reshape(slots, shared, groups, head_size).swapaxes(1, 2).reshape(q.shape), (
        keys,
        values,
    )


def _kernel(
    used: Any, q: Any, new_k: Any, new_v: Any, k: Any, v: Any, found: Any, k_tile: Any, v_tile: Any,
    spread: Any, most: Any, total: Any, sums: Any,
    *, size: int, groups: int,
) -> None:  # fmt: skip
    slot, t = pl.program_id(0), pl.program_id(1)
    at = used[slot] - 1
    last = jnp.maximum(at, 0) // size
    # A row of `spread` and `sums` is a head: of q's row r, group g, it is r x G + g.
    head_size = k.shape[2] // groups
    column = jax.lax.broadcasted_iota(jnp.int32, (groups, k.shape[2]), 1)
    begin = jax.lax.broadcasted_iota(jnp.int32, column.shape, 0) * head_size
    own = (column >= begin) & (column < begin + head_size)
    rows_of = [(r, pl.ds(r * groups, groups)) for r in range(q.shape[1])]

    @pl.when(t == 0)
    def _() -> None:
        for r, heads in rows_of:
            spread[heads, :] = jnp.where(own, q[0, r : r + 1, :].astype(jnp.float32), 0.0)
        most[...] = jnp.sum(spread[...] * new_k[0].astype(jnp.float32), axis=1, keepdims=True)
        total[...] = jnp.ones_like(total)
        sums[...] = jnp.broadcast_to(new_v[0].astype(jnp.float32), sums.shape)

    @pl.when(t <= last)
    def _() -> None:
        scores = dot(spread[...].astype(k.dtype), k[0], (1, 1))
        before = t * size + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < at
        scores = jnp.where(before, scores, NEVER)
        higher = jnp.maximum(most[...], jnp.max(scores, axis=1, keepdims=True))
        weights, shrink = jnp.exp(scores - higher), jnp.exp(most[...] - higher)
        most[...] = higher
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        sums[...] = sums[...] * shrink + dot(weights.astype(v.dtype), v[0], (1, 0))

    @pl.when(t == last)
    def _() -> None:
        for r, heads in rows_of:
            mean = jnp.where(own, sums[heads, :] / total[heads, :], 0.0)
            found[0, r : r + 1, :] = jnp.sum(mean, axis=0, keepdims=True).astype(found.dtype)
        place = jnp.maximum(at, 0) % size
        rows = pl.ds(pl.multiple_of(place // TILE * TILE, TILE), TILE)
        new = (jax.lax.broadcasted_iota(jnp.int32, k_tile.shape[1:], 0) == place % TILE) & (at >= 0)
        k_tile[0] = jnp.where(new, new_k[0], k[0, rows, :])
        v_tile[0] = jnp.where(new, new_v[0], v[0, rows, :])
