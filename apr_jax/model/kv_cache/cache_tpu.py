"""The key/value cache of decoding on TPU, and its kernel (Pallas).

The kernel writes one position of each decode slot and attends to the positions before it.

The cache of all layers is one array for the keys and one for the values. So the layers can be a
loop that carries the two, and the kernel writes into them in place.

The life of a decode step in a layer:
1. The keys of a decode slot are [M, G * K], all heads of a position side by side. So they fill
   whole registers of 128 columns, whatever K is.
2. The grid walks over the blocks of positions of a decode slot, as many as the longest decode slot
   has. Beyond its own last block a decode slot repeats that block's address, for which nothing is
   fetched. So a step moves only what is live, rounded up to a block. A shorter cache length only
   makes the blocks smaller.
3. The running maximum, sum and product of the softmax begin with the new position, which is not in
   the cache yet.
4. The 16 rows around the new position are written back to its block, in the cache's own memory.

A head's query is spread out over the columns of its group, with zeros in the others, so that one
product serves all heads. That multiplies by many zeros, but on a matrix unit that would wait for
memory anyway. Queries and results are moved to and from memory without the zeros, G * K wide.

Contexts are read several tokens at a time (S > 1) and much more rarely, so plain products over the
cache do for them.

Shapes: W decode slots, N layers, S tokens a step, M positions, H query heads, G key/value heads,
K head size.
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

# Keys and values, [W, N, M, G * K] each, with M filled up to whole blocks.
Sides = tuple[jax.Array, jax.Array]
KERNEL = "decode_attention"
# (longest cache, positions of a block). On average half a block is read for nothing, and each turn
# of the grid has a fixed cost: short caches take smaller blocks, long caches fewer turns.
BLOCKS = ((1_024, 128), (math.inf, 256))
# The most bytes of a block's keys: VMEM holds two blocks of keys and two of values beside the sums.
_BLOCK_BYTES = 2**20
TILE = 16  # Rows of a register of bfloat16 numbers, and of two registers of float32 numbers.


def empty(config: ModelConfig, slots: int, cache_length: int) -> Sides:
    """Makes the cache of all layers for positions below `cache_length`."""
    columns = config.kv_heads * config.head_size
    size = block_size(columns, jnp.dtype(config.dtype).itemsize, cache_length)
    whole_blocks = math.ceil(cache_length / size) * size
    shape = (slots, config.layers, whole_blocks, columns)
    return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def block_size(columns: int, itemsize: int, cache_length: int) -> int:
    """Positions of a block: a power of two, so that smaller blocks fill larger ones.

    Args:
      columns: numbers of one position, G * K.
      itemsize: bytes of a number.
      cache_length: of the cache.
    """
    wanted = next(size for longest, size in BLOCKS if cache_length <= longest)
    fitting = max(TILE, _BLOCK_BYTES // (columns * itemsize))
    largest_power_of_two = 1 << (fitting.bit_length() - 1)
    return min(wanted, largest_power_of_two)


def over(
    cache: Sides,
    layer: Int[Array, ""],
    positions: Int[Array, "W S"],
    cache_length: int,
    interpret: bool = False,
) -> Callable:
    """Makes a layer's attention, as `kv_cache.cache.over` does.

    Args:
      cache: keys and values of all layers.
      layer: number of the layer.
      positions: of the new tokens; a query sees the positions up to its own.
      cache_length: only positions below it are read.
      interpret: runs the kernel as plain JAX on any device; for tests.
    """

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, Sides]:
        if q.shape[1] == 1:
            used = jnp.where(positions < cache_length, positions + 1, 0)[:, 0]  # [W]
            return _attend_one(used, layer, cache_length, q, k, v, cache, interpret)
        return _attend_many(positions, layer, cache_length, q, k, v, cache)

    return attention


def _attend_many(
    positions: Array,
    layer: Array,
    cache_length: int,
    q: Array,
    k: Float[Array, "W G S K"],
    v: Float[Array, "W G S K"],
    cache: Sides,
) -> tuple[Array, Sides]:
    """Stores and attends to several tokens a decode slot, by plain products over the cache."""
    slots, groups, steps, _ = k.shape
    slot = jnp.arange(slots)[:, None]  # [W, 1]

    def store(old: Array, new: Array) -> Array:
        place = jnp.where(positions < cache_length, positions, old.shape[2])
        side_by_side = new.transpose(0, 2, 1, 3).reshape(slots, steps, -1)  # [W, S, G * K]
        return old.at[slot, layer, place].set(side_by_side, mode="drop")

    def heads_first(side: Array) -> Float[Array, "W G M K"]:
        own = jax.lax.dynamic_index_in_dim(side, layer, axis=1, keepdims=False)  # [W, M, G * K]
        return own.reshape(*own.shape[:2], groups, -1).transpose(0, 2, 1, 3)

    keys, values = store(cache[0], k), store(cache[1], v)
    mask = jnp.arange(keys.shape[2])[None, None, :] <= positions[:, :, None]  # [W, S, M]
    out = attend_cached(q, [(heads_first(keys), heads_first(values))], mask)
    return out, (keys, values)


def _attend_one(
    used: Int[Array, " W"],
    layer: Int[Array, ""],
    cache_length: int,
    q: Float[Array, "W 1 H K"],
    k: Array,
    v: Array,
    cache: Sides,
    interpret: bool,
) -> tuple[Float[Array, "W 1 H K"], Sides]:
    """Stores and attends to one token a decode slot, by the kernel.

    Args:
      used: positions in use, the new one included; a decode slot of which 0 are used stores
        nothing.
      layer: number of the layer.
      cache_length: only positions below it are read.
      q: queries of the new token.
      k: its keys.
      v: its values.
      cache: keys and values of all layers before it.
      interpret: see `over`.
    """
    slots, _, heads, head_size = q.shape
    groups = k.shape[1]
    columns = cache[0].shape[3]
    group_heads = heads // groups  # Query heads of a group.
    size = block_size(columns, cache[0].dtype.itemsize, cache_length)

    # Heads of the same place in their groups become one row: [W, H / G, G * K].
    scale = jnp.asarray(head_size**-0.5, q.dtype)
    scaled = q.reshape(slots, groups, group_heads, head_size) * scale

    def last(used: Array) -> Array:
        return jnp.maximum(used - 1, 0)

    # The blocks that a turn of the grid (decode slot w, turn t) works on.
    per_slot = pl.BlockSpec((1, group_heads, columns), lambda w, t, used, layer: (w, 0, 0))
    new_row = pl.BlockSpec((1, 1, columns), lambda w, t, used, layer: (w, 0, 0))
    block = pl.BlockSpec(
        (1, None, size, columns),
        lambda w, t, used, layer: (w, layer[0], jnp.minimum(t, last(used[w]) // size), 0),
    )
    tile = pl.BlockSpec(
        (1, None, TILE, columns),
        lambda w, t, used, layer: (w, layer[0], last(used[w]) // TILE, 0),
    )
    out, keys, values = pl.pallas_call(
        functools.partial(_kernel, size=size, groups=groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(slots, last(used.max()) // size + 1),
            in_specs=[per_slot, new_row, new_row, block, block],
            out_specs=[per_slot, tile, tile],
            scratch_shapes=[
                pltpu.VMEM((heads, columns), jnp.float32),
                pltpu.VMEM((heads, 1), jnp.float32),
                pltpu.VMEM((heads, 1), jnp.float32),
                pltpu.VMEM((heads, columns), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((slots, group_heads, columns), q.dtype),
            *(jax.ShapeDtypeStruct(side.shape, side.dtype) for side in cache),
        ],
        input_output_aliases={5: 1, 6: 2},  # The cache; `used` and `layer` are the first inputs.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=KERNEL,
    )(
        used,
        layer.reshape(1),
        scaled.swapaxes(1, 2).reshape(slots, group_heads, columns),
        k.reshape(slots, 1, columns),
        v.reshape(slots, 1, columns),
        *cache,
    )
    by_head = out.reshape(slots, group_heads, groups, head_size).swapaxes(1, 2)
    return by_head.reshape(q.shape), (keys, values)


def _kernel(
    used: Any, layer: Any, q: Any, new_k: Any, new_v: Any, k: Any, v: Any,
    out: Any, k_tile: Any, v_tile: Any, spread: Any, highest: Any, total: Any, sums: Any,
    *, size: int, groups: int,
) -> None:  # fmt: skip
    """Works on one block of positions of one decode slot.

    Args:
      used: [W] positions in use.
      layer: [1] number of the layer; the blocks of the cache are of this layer already.
      q: [1, H / G, G * K] queries.
      new_k: [1, 1, G * K] keys of the new position.
      new_v: [1, 1, G * K] values of the new position.
      k: [1, size, G * K] keys of the block.
      v: [1, size, G * K] values of the block.
      out: [1, H / G, G * K] result, the mean values.
      k_tile: [1, TILE, G * K] result, keys of the rows around the new position.
      v_tile: [1, TILE, G * K] result, values of the rows around the new position.
      spread: [H, G * K] scratch, queries with zeros in the columns of other groups.
      highest: [H, 1] scratch, the running maximum of the softmax.
      total: [H, 1] scratch, its running sum.
      sums: [H, G * K] scratch, its running product.
      size: positions of a block.
      groups: G.
    """
    del layer
    slot, t = pl.program_id(0), pl.program_id(1)
    new_position = used[slot] - 1
    last = jnp.maximum(new_position, 0) // size
    # A row of `spread` and `sums` is a head: that of row r and group g of `q` is row r * G + g.
    head_size = k.shape[2] // groups
    column = jax.lax.broadcasted_iota(jnp.int32, (groups, k.shape[2]), 1)
    begin = jax.lax.broadcasted_iota(jnp.int32, column.shape, 0) * head_size
    own = (column >= begin) & (column < begin + head_size)  # [G, G * K]
    rows_of = [(r, pl.ds(r * groups, groups)) for r in range(q.shape[1])]

    @pl.when(t == 0)
    def _begin_with_the_new_position() -> None:
        for r, heads in rows_of:
            spread[heads, :] = jnp.where(own, q[0, r : r + 1, :].astype(jnp.float32), 0.0)
        highest[...] = jnp.sum(spread[...] * new_k[0].astype(jnp.float32), axis=1, keepdims=True)
        total[...] = jnp.ones_like(total)
        sums[...] = jnp.broadcast_to(new_v[0].astype(jnp.float32), sums.shape)

    @pl.when(t <= last)
    def _add_block() -> None:
        scores = dot(spread[...].astype(k.dtype), k[0], (1, 1))  # [H, size]
        position = t * size + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(position < new_position, scores, NEVER)
        higher = jnp.maximum(highest[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - higher)
        shrink = jnp.exp(highest[...] - higher)
        highest[...] = higher
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        sums[...] = sums[...] * shrink + dot(weights.astype(v.dtype), v[0], (1, 0))

    @pl.when(t == last)
    def _write_out() -> None:
        for r, heads in rows_of:
            mean = jnp.where(own, sums[heads, :] / total[heads, :], 0.0)
            out[0, r : r + 1, :] = jnp.sum(mean, axis=0, keepdims=True).astype(out.dtype)
        place = jnp.maximum(new_position, 0) % size
        rows = pl.ds(pl.multiple_of(place // TILE * TILE, TILE), TILE)
        row = jax.lax.broadcasted_iota(jnp.int32, k_tile.shape[1:], 0)
        is_new = (row == place % TILE) & (new_position >= 0)
        k_tile[0] = jnp.where(is_new, new_k[0], k[0, rows, :])
        v_tile[0] = jnp.where(is_new, new_v[0], v[0, rows, :])
