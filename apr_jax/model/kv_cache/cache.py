"""The key/value cache of decoding: how it is written, and how it is read.

TPUs have another one (`cache_tpu.py`).

One side (keys or values) of a layer is [W, G, M, K], head first: a head's keys are one block of
memory, which is what the products of a decode step read. The positions are cut at the rollout's
cache lengths into arrays of their own, called segments, because reading a slice of an array costs a
copy of it.

Shapes: W decode slots, S tokens a step, M positions, H query heads, G key/value heads, K head size.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from apr_jax.model.config import ModelConfig

# A layer's keys and values, [W, G, positions of the segment, K] each, for each segment.
Segments = tuple[tuple[jax.Array, jax.Array], ...]


def empty(
    config: ModelConfig, slots: int, cache_length: int, cache_lengths: tuple[int, ...]
) -> Segments:
    """Makes a layer's cache for positions below `cache_length`, cut at `cache_lengths`."""

    def side(begin: int, end: int) -> Array:
        positions = max(0, min(end, cache_length) - begin)
        return jnp.zeros((slots, config.kv_heads, positions, config.head_size), config.dtype)

    begins = (0, *cache_lengths[:-1])
    return tuple((side(*cut), side(*cut)) for cut in zip(begins, cache_lengths, strict=True))


def over(
    cache: Segments,
    positions: Int[Array, "W S"],
    cache_length: int,
    cache_lengths: tuple[int, ...],
) -> Callable:
    """Makes a layer's attention, which stores keys and values and attends to those stored so far.

    Args:
      cache: of the layer.
      positions: of the tokens; a query sees the positions up to its own.
      cache_length: only positions below it are read.
      cache_lengths: where the cache is cut.

    Returns:
      `attention(q [W, S, H, K], k [W, G, S, K], v [W, G, S, K]) -> (mean values [W, S, H, K],
      cache)`.
    """
    begins = (0, *cache_lengths[:-1])
    # Segments that hold positions below the cache length.
    reached = len([begin for begin in begins if begin < cache_length])
    mask = jnp.arange(cache_length)[None, None, :] <= positions[:, :, None]  # [W, S, M]

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, Segments]:
        live = []
        for (keys, values), begin in zip(cache[:reached], begins, strict=False):
            # Places before the segment would count from its end: they go past it, where they are
            # dropped.
            place = jnp.where(positions >= begin, positions - begin, cache_length)  # [W, S]
            live.append((store(keys, k, place), store(values, v, place)))
        return attend_cached(q, live, mask), (*live, *cache[reached:])

    return attention


def store(
    old: Float[Array, "W G M K"], new: Float[Array, "W G S K"], place: Int[Array, "W S"]
) -> Float[Array, "W G M K"]:
    """Puts new entries at their decode slots' places; a place at or beyond M is dropped.

    It is one scatter, in the form in which XLA does not copy the cache on CPU (docs/rollout.md has
    the figures).
    """
    if old.shape[2] == 0:
        return old
    if place.size == 1:
        # XLA fuses the write of a single place with the product that reads it, and copies the cache
        # for that. Two places, the second one dropped, it writes in place: that halves the time of
        # a step at batch 1.
        place = jnp.concatenate([place, jnp.full_like(place, old.shape[2])], axis=1)
        new = jnp.repeat(new, 2, axis=2)
    slot = jnp.arange(place.shape[0])[:, None]  # [W, 1]
    return old.at[slot, :, place].set(new.transpose(0, 2, 1, 3), mode="drop")


def attend_cached(
    q: Float[Array, "W S H K"], segments: Sequence[tuple[Array, Array]], mask: Bool[Array, "W S M"]
) -> Float[Array, "W S H K"]:
    """Computes softmax(q k' / sqrt(K)) v over the positions that `mask` allows.

    The query heads of a group are folded into the query axis, which makes every product one plain
    batched matrix product. It is not meant to be differentiated.

    Args:
      q: the queries.
      segments: keys and values of consecutive positions, [W, G, part of M, K] each.
      mask: True where a query sees a position.
    """
    rows, steps, heads, size = q.shape
    groups = segments[0][0].shape[1]
    folded = _fold(q, groups) * jnp.asarray(size**-0.5, q.dtype)  # [W, G, H/G * S, K]

    scores = [
        jnp.einsum("rgqk,rgmk->rgqm", folded, k, preferred_element_type=jnp.float32)
        for k, _ in segments
    ]
    all_scores = jnp.concatenate(scores, axis=-1).reshape(rows, heads, steps, -1)  # [W, H, S, M]
    all_scores = jnp.where(mask[:, None], all_scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(all_scores, axis=-1).astype(q.dtype)
    weights = weights.reshape(rows, groups, heads // groups * steps, -1)  # [W, G, H/G * S, M]

    out = jnp.zeros_like(folded)
    begin = 0
    for k, v in segments:
        end = begin + k.shape[2]
        out += jnp.einsum("rgqm,rgmk->rgqk", weights[..., begin:end], v)
        begin = end
    return _unfold(out, heads)


def _fold(x: Array, groups: int) -> Array:
    """Turns [W, S, H, K] into [W, G, H/G * S, K]."""
    rows, queries, heads, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(rows, groups, heads // groups * queries, size)


def _unfold(x: Array, heads: int) -> Array:
    """Turns [W, G, H/G * S, K] into [W, S, H, K]."""
    rows, _, _, size = x.shape
    return x.reshape(rows, heads, -1, size).transpose(0, 2, 1, 3)
