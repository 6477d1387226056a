"""Attention: who sees whom in packed rows, rotary positions, and grouped-query products.

Shapes: R rows (or W lanes), S queries, M keys, H query heads, G key/value heads, K head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(segment: Int[Array, "R L"], island: Int[Array, "R L"]) -> Bool[Array, "R L L"]:
    """The visibility rule of packed threads (DESIGN.md 6).

    Query i sees key j iff j <= i, both are of the same thread, and j's island is 0 or i's own.

    Args:
      segment: thread of each token within its row; 0 is padding, which sees only padding.
      island: 0, or the spawn block that the token belongs to.
    """
    length = segment.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segment[:, :, None] == segment[:, None, :]
    open_ = (island[:, None, :] == 0) | (island[:, None, :] == island[:, :, None])
    return causal[None] & same & open_


def rotate(x: Float[Array, "R S heads K"], position: Int[Array, "R S"], base: float) -> Float[Array, "R S heads K"]:
    """Rotary embedding (Su et al. 2021): the two halves of a head are turned by position x base^(-2i/K)."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def attend(
    q: Float[Array, "R S H K"],
    k: Float[Array, "R G M K"],
    v: Float[Array, "R G M K"],
    mask: Bool[Array, "R S M"],
) -> Float[Array, "R S H K"]:
    """softmax(q k' / sqrt(K)) v over the keys that `mask` allows; every query must see at least one key.

    The softmax is in float32. Keys are laid out head first, so that a head's keys are one block of memory: decoding is bound
    by reading them. The query heads of a group are folded into the query axis, which makes every product one plain batched
    matrix product; the derivative is written out because autodiff of the masked softmax costs a third more on CPU.
    """
    return _attend(q, k, v, mask)[0]


def _attend(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    rows, queries, heads, size = q.shape
    groups = k.shape[1]
    folded = fold(q, groups) * jnp.asarray(size**-0.5, q.dtype)
    scores = jnp.einsum("rgqk,rgmk->rgqm", folded, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, heads, queries, -1)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(rows, groups, -1, k.shape[2])
    out = jnp.einsum("rgqm,rgmk->rgqk", weights, v)
    return unfold(out, heads), (folded, k, v, weights, out)


def _attend_backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array, Array, Array, None]:
    """The softmax's derivative, d scores = weights x (d weights - sum(d out x out)) (Dao et al. 2022, section 3.1)."""
    folded, k, v, weights, out = saved
    size = k.shape[-1]
    heads = grad.shape[2]
    grad = fold(grad, k.shape[1])
    d_v = jnp.einsum("rgqm,rgqk->rgmk", weights, grad)
    d_weights = jnp.einsum("rgqk,rgmk->rgqm", grad, v, preferred_element_type=jnp.float32)
    inner = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_scores = (weights * (d_weights - inner)).astype(v.dtype)
    d_q = jnp.einsum("rgqm,rgmk->rgqk", d_scores, k) * jnp.asarray(size**-0.5, k.dtype)
    d_k = jnp.einsum("rgqm,rgqk->rgmk", d_scores, folded)
    return unfold(d_q, heads), d_k, d_v, None


attend.defvjp(_attend, _attend_backward)


def fold(x: Array, groups: int) -> Array:
    """[R, S, H, K] -> [R, G, H/G * S, K]."""
    rows, queries, heads, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(rows, groups, heads // groups * queries, size)


def unfold(x: Array, heads: int) -> Array:
    """[R, G, H/G * S, K] -> [R, S, H, K]."""
    rows, _, _, size = x.shape
    return x.reshape(rows, heads, -1, size).transpose(0, 2, 1, 3)
