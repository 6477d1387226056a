"""The key/value cache of decoding: how it is written, and how it is read.

A side (keys or values) of a layer is [W, G, M, K], head first: a head's keys are one block of memory, which is what the
products of a decode step read. Written is one place of each lane, and every lane at another.

Shapes: W lanes, S tokens a step, M positions, H query heads, G key/value heads, K head size.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def store(old: Float[Array, "W G M K"], new: Float[Array, "W G S K"], place: Int[Array, "W S"]) -> Array:
    """`old` with new entries at their lanes' places; a place at or beyond M is dropped.

    On CPU and on TPU it is done in the way in which XLA does not copy the cache (docs/rollout.md has the figures).
    """
    if old.shape[2] == 0:
        return old
    return jax.lax.platform_dependent(old, new, place, tpu=store_one_by_one, default=store_at_once)


def store_at_once(old: Float[Array, "W G M K"], new: Float[Array, "W G S K"], place: Int[Array, "W S"]) -> Array:
    """As one scatter."""
    if place.size == 1:
        # XLA fuses the write of a single place with the product that reads it, and copies the cache for that. Of two places,
        # the second one dropped, it writes in place: half the time of a step at batch 1.
        place = jnp.concatenate([place, jnp.full_like(place, old.shape[2])], axis=1)
        new = jnp.repeat(new, 2, axis=2)
    lane = jnp.arange(place.shape[0])[:, None]
    return old.at[lane, :, place].set(new.transpose(0, 2, 1, 3), mode="drop")


def store_one_by_one(old: Float[Array, "W G M K"], new: Float[Array, "W G S K"], place: Int[Array, "W S"]) -> Array:
    """As W x S small writes. A scatter wants another layout than the products do on TPU: the whole cache twice, every step."""
    lanes, steps = place.shape
    size = (1, old.shape[1], 1, old.shape[3])

    def write(index: Array, cache: Array) -> Array:
        lane, step = index // steps, index % steps
        at = place[lane, step]
        there = jax.lax.dynamic_slice(cache, (lane, 0, at, 0), size)
        entry = jax.lax.dynamic_slice(new, (lane, 0, step, 0), size)
        return jax.lax.dynamic_update_slice(cache, jnp.where(at < old.shape[2], entry, there), (lane, 0, at, 0))

    return jax.lax.fori_loop(0, lanes * steps, write, old)


def attend_cached(
    q: Float[Array, "W S H K"], segments: Sequence[tuple[Array, Array]], mask: Bool[Array, "W S M"]
) -> Float[Array, "W S H K"]:
    """softmax(q k' / sqrt(K)) v over the positions that `mask` allows, of a cache in several arrays. Not differentiated.

    The query heads of a group are folded into the query axis, which makes every product one plain batched matrix product.

    Args:
      segments: keys and values, [W, G, part of M, K] each.
    """
    rows, steps, heads, size = q.shape
    groups = segments[0][0].shape[1]
    folded = _fold(q, groups) * jnp.asarray(size**-0.5, q.dtype)
    scores = [jnp.einsum("rgqk,rgmk->rgqm", folded, k, preferred_element_type=jnp.float32) for k, _ in segments]
    joined = jnp.concatenate(scores, axis=-1).reshape(rows, heads, steps, -1)
    joined = jnp.where(mask[:, None], joined, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(joined, axis=-1).astype(q.dtype).reshape(rows, groups, heads // groups * steps, -1)
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
