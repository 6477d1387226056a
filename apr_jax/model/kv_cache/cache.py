"""The key/value cache of decoding: how it is written, and how it is read. For TPU there is
`cache_tpu.py`.

A side (keys or values) of a layer is [W, G, M, K], head first: a head's keys are one block of
memory, which is what the products of a decode step read. It is cut at the schedule's bounds into
arrays of its own, because reading a slice of an array costs a copy of it.

Shapes: W decode slots, S tokens a step, M positions, H query heads, G key/value heads, K head size.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from apr_jax.model.config import ModelConfig

# Of a layer: for each segment of the window keys and values, [W, G, positions of the segment, K].
Segments = tuple[tuple[jax.Array, jax.Array], ...]


def empty(config: ModelConfig, slots: int, bound: int, bounds: tuple[int, ...]) -> Segments:
    """A layer's cache for positions below `bound`, cut at `bounds`."""

    def side(begin: int, end: int) -> Array:
        positions = max(0, min(end, bound) - begin)
        return jnp.zeros((slots, config.kv_heads, positions, config.head_size), config.dtype)

    return tuple((side(*cut), side(*cut)) for cut in zip((0, *bounds[:-1]), bounds, strict=True))


def over(
    cache: Segments, positions: Int[Array, "W S"], bound: int, bounds: tuple[int, ...]
) -> Callable:
    """A layer's attention: stores keys and values at `positions` and finds what lies up to there;
    all are below `bound`.

    Returns:
      `attention(q [W, S, H, K], k [W, G, S, K], v [W, G, S, K]) -> (found [W, S, H, K], cache)`.
    """
    begins = (0, *bounds[:-1])
    # Segments that hold positions below the bound.
    reached = sum(begin < bound for begin in begins)
    mask = jnp.arange(bound)[None, None, :] <= positions[:, :, None]

    def attention(q: Array, k: Array, v: Array) -> tuple[Array, Segments]:
        live = []
        for (keys, values), begin in zip(cache[:reached], begins, strict=False):
            # Places before the segment would count from its end: they go past it, where they are
            # dropped.
            place = jnp.where(positions >= begin, positions - begin, bound)
            live.append((store(keys, k, place), store(values, v, place)))
        return attend_cached(q, live, mask), (*live, *cache[reached:])

    return attention


def store(
    old: Float[Array, "W G M K"], new: Float[Array, "W G S K"], place: Int[Array, "W S"]
) -> Array:
    """`old` with new entries at their decode slots' places; a place at or beyond M is dropped.

    One scatter, in the form in which XLA does not copy the cache on CPU (docs/rollout.md has the
    figures)."""
    if old.shape[2] == 0:
        return old
    if place.size == 1:
        # XLA fuses the write of a single place with the product that reads it, and copies the cache
        # for that. Of two places, the second one dropped, it writes in place: half the time of a
        # step at batch 1.
        place = jnp.concatenate([place, jnp.full_like(place, old.shape[2])], axis=1)
        new = jnp.repeat(new, 2, axis=2)
    slot = jnp.arange(place.shape[0])[:, None]
    return old.at[slot, :, place].set(new.transpose(0, 2, 1, 3), mode="drop")


def attend_cached(
    q: Float[Array, "W S H K"], segments: Sequence[tuple[Array, Array]], mask: Bool[Array, "W S M"]
) -> Float[Array, "W S H K"]:
    """softmax(q k' / sqrt(K)) v over the positions that `mask` allows, of a cache in several
    arrays. Not differentiated.

    The query heads of a group are folded into the query axis, which makes every product one plain
    batched matrix product.

    Args:
      segments: keys and values, [W, G, part of M, K] each.
    """
    rows, steps, heads, size = q.shape
    groups = segments[0][0].shape[1]
    folded = _fold(q, groups) * jnp.asarray(size**-0.5, q.dtype)
    scores = [
        jnp.einsum("rgqk,rgmk->rgqm", folded, k, preferred_element_type=jnp.float32)
        for k, _ in segments
    ]
    joined = jnp.concatenate(scores, axis=-1).reshape(rows, heads, steps, -1)
    joined = jnp.where(mask[:, None], joined, jnp.finfo(jnp.float32).min)
    weights = (
        jax.nn.softmax(joined, axis=-1)
        .astype(q.dtype)
        .reshape(rows, groups, heads // groups * steps, -1)
    )
    out, begin = jnp.zeros_like(folded), 0
    for k, v in segments:
        out += jnp.einsum("rgqm,rgmk->rgqk", weights[..., begin : begin + k.shape[2]], v)
        begin += k.shape[2]
    return _unfold(out, heads)


def _fold(x: Array, groups: int) -> Array:
    """[R, S, H, K] -> [R, G, H/G * S, K]."""
    rows, queries, heads, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(rows, groups, heads // groups * queries, size)


def _unfold(x: Array, heads: int) -> Array:
    """[R, G, H/G * S, K] -> [R, S, H, K]."""
    rows, _, _, size = x.shape
    return x.reshape(rows, heads, -1, size).transpose(0, 2, 1, 3)
