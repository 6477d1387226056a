"""Attention over packed rows, block by block: no work between threads beyond a block, no L x L
array anywhere.

On TPU the same is done by the kernels of `packed_tpu.py`; what follows is for all other devices.

The life of a block of queries:
1. Threads stand one after the other in a row, so what a query may see lies between the start of its
   thread and itself. `first_blocks` says, for each block of queries, from which block of keys on
   there is anything to see.
2. Forward: those blocks of keys are read one by one, the softmax kept as a running maximum, sum and
   product (Dao et al. 2022, algorithm 1). Output and log-sum-exp are kept, scores never.
3. Backward: the same blocks once more; scores are computed again, and d scores = weights x (d
   weights - sum(d out x out)).

Everything here is written for one group of heads of one row. On CPU the groups follow one another,
so that a block's scores stay in the processor's cache, and each ends at its own last block;
elsewhere they are batched (`vmap`).

Shapes: R rows, L columns of a row, H query heads, G key/value heads, K head size, n blocks of P
columns, Q = H/G x P queries of a block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from apr_jax.model.attention.packed_tpu import ATTENTION, NEVER, attend_on_tpu
from apr_jax.model.sharding import BATCH_AXES, on_tpu

BLOCK = 64  # docs/training.md has the figures of others.


def attend_packed(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R G L K"],
    v: Float[Array, "R G L K"],
    segment: Int[Array, "R L"],
    hidden_block: Int[Array, "R L"],
    mesh: Mesh | None = None,
) -> Float[Array, "R L H K"]:
    """softmax(q k' / sqrt(K)) v over what `visible` allows. The softmax is in float32.

    Args:
      segment: thread of each token within its row, every thread's tokens one after the other; 0 is
        padding, whose output means nothing.
      hidden block: 0, or the spawn block that the token belongs to.
      mesh: rows (and heads, where that keeps groups whole) are split over it, and every device
        works on its own: without it XLA would gather all rows on all devices, since it cannot split
        a loop of unknown length.
    """
    tpu = on_tpu(mesh) if mesh else jax.default_backend() == "tpu"
    attend = attend_on_tpu if tpu else _attend
    if mesh is None or (mesh.size == 1 and not tpu):
        return attend(q, k, v, segment, hidden_block)
    groups, shards = k.shape[1], mesh.shape["tensor"]
    heads = "tensor" if groups % shards == 0 else None
    rows = PartitionSpec(BATCH_AXES)
    split = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(
            PartitionSpec(BATCH_AXES, None, heads),
            PartitionSpec(BATCH_AXES, heads),
            PartitionSpec(BATCH_AXES, heads),
            rows,
            rows,
        ),
        out_specs=PartitionSpec(BATCH_AXES, None, heads),
        check_vma=False,
    )
    return split(q, k, v, segment, hidden_block)


def visible(
    segment: Int[Array, " S"],
    hidden_block: Int[Array, " S"],
    column: Int[Array, " S"],
    key_segment: Int[Array, " M"],
    key_hidden_block: Int[Array, " M"],
    key_column: Int[Array, " M"],
) -> Bool[Array, "S M"]:
    """The visibility rule of packed threads (DESIGN.md 6), for S queries and M keys of a row.

    A query sees a key iff the key is not after it, both are of the same thread, and the key's
    hidden block is 0 or the query's own."""
    causal = key_column[None] <= column[:, None]
    same = key_segment[None] == segment[:, None]
    open_ = (key_hidden_block[None] == 0) | (key_hidden_block[None] == hidden_block[:, None])
    return causal & same & open_


def first_blocks(segment: Int[Array, "R L"], size: int) -> Int[Array, "R n"]:
    """The first block of keys with anything to see for each block of queries; a block that begins
    with padding sees itself.
    """
    column = jnp.arange(segment.shape[1])
    starts = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(starts, column, 0), axis=1)
    return jnp.where(segment == 0, column, start)[:, ::size] // size


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, segment: Array, hidden_block: Array) -> Array:
    return _forward(q, k, v, segment, hidden_block)[0]


def _forward(
    q: Array, k: Array, v: Array, segment: Array, hidden_block: Array
) -> tuple[Array, tuple[Any, ...]]:
    length, groups, size = q.shape[1], k.shape[1], q.shape[-1]
    columns = _block_size(length)
    missing = -length % columns
    segment, hidden_block = (jnp.pad(x, ((0, 0), (0, missing))) for x in (segment, hidden_block))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in (k, v))
    blocks = _fold(q * jnp.asarray(size**-0.5, q.dtype), groups, columns)
    rows = (first_blocks(segment, columns), segment, hidden_block)
    out, log_sum = _each(_forward_group, (blocks, k, v), rows)
    out, log_sum = (
        checkpoint_name(out.astype(q.dtype), ATTENTION),
        checkpoint_name(log_sum, ATTENTION),
    )
    return _unfold(out, q.shape), (blocks, k, v, rows, out, log_sum)


def _backward(saved: tuple[Any, ...], grad: Array) -> tuple[Array, Array, Array, None, None]:
    blocks, k, v, rows, out, log_sum = saved
    groups, columns = k.shape[1], k.shape[2] // blocks.shape[2]
    grads = _fold(grad, groups, columns)
    inner = jnp.sum(grads.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    d_q, d_k, d_v = _each(_backward_group, (blocks, k, v, grads, log_sum, inner), rows)
    d_q = _unfold(d_q.astype(grad.dtype), grad.shape) * jnp.asarray(k.shape[-1] ** -0.5, grad.dtype)
    length = grad.shape[1]
    return d_q, d_k[:, :, :length].astype(k.dtype), d_v[:, :, :length].astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _forward_group(
    group: tuple[Float[Array, "n Q K"], Float[Array, "L K"], Float[Array, "L K"]],
    row: tuple[Int[Array, " n"], Int[Array, " L"], Int[Array, " L"]],
) -> tuple[Float[Array, "n Q K"], Float[Array, "n Q"]]:
    """Output and log-sum-exp of the scores."""
    q, k, v = group
    count, queries, size = q.shape

    def queries_of(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        index, first, q = block

        def read(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            most, total, out = carry
            scores = jnp.where(
                _mask(row, index, at, count, queries), _dot(q, _block(k, at, count).T), NEVER
            )
            higher = jnp.maximum(most, jnp.max(scores, axis=-1))
            weights, shrink = jnp.exp(scores - higher[:, None]), jnp.exp(most - higher)
            found = _dot(weights.astype(v.dtype), _block(v, at, count))
            return higher, total * shrink + jnp.sum(weights, axis=-1), out * shrink[:, None] + found

        nothing = jnp.zeros(queries)
        # The block itself comes first: there each query sees a key, so the running maximum is a
        # score from the start.
        carry = read(index, (nothing + NEVER, nothing, jnp.zeros((queries, size))))
        most, total, out = jax.lax.fori_loop(first, index, read, carry)
        return out / total[:, None], most + jnp.log(total)

    return jax.lax.map(queries_of, (jnp.arange(count), row[0], q))


def _backward_group(
    group: tuple[Array, ...], row: tuple[Int[Array, " n"], Int[Array, " L"], Int[Array, " L"]]
) -> tuple[Float[Array, "n Q K"], Float[Array, "L K"], Float[Array, "L K"]]:
    """Gradients of queries, keys and values."""
    q, k, v, grad, log_sum, inner = group
    count, queries, _ = q.shape

    def queries_of(
        carry: tuple[Array, Array], block: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        index, first, q, grad, log_sum, inner = block

        def read(at: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            key, value = _block(k, at, count), _block(v, at, count)
            scores = _dot(q, key.T)
            weights = jnp.where(
                _mask(row, index, at, count, queries), jnp.exp(scores - log_sum[:, None]), 0.0
            )
            d_scores = (weights * (_dot(grad, value.T) - inner[:, None])).astype(q.dtype)
            return (
                d_q + _dot(d_scores, key),
                _add_block(d_k, at, count, _dot(d_scores.T, q)),
                _add_block(d_v, at, count, _dot(weights.astype(q.dtype).T, grad)),
            )

        d_q, *d_keys = jax.lax.fori_loop(first, index + 1, read, (jnp.zeros(q.shape), *carry))
        return tuple(d_keys), d_q

    blank = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (d_k, d_v), d_q = jax.lax.scan(
        queries_of, blank, (jnp.arange(count), row[0], q, grad, log_sum, inner)
    )
    return d_q, d_k, d_v


def _each(work: Any, groups: tuple[Array, ...], rows: tuple[Array, ...]) -> Any:
    """`work(group, row)` for all [R, G] groups of heads."""

    def one_by_one(groups: tuple[Array, ...], rows: tuple[Array, ...]) -> Any:
        return jax.lax.map(
            lambda each: jax.lax.map(lambda group: work(group, each[1]), each[0]), (groups, rows)
        )

    def together(groups: tuple[Array, ...], rows: tuple[Array, ...]) -> Any:
        return jax.vmap(lambda group, row: jax.vmap(lambda one: work(one, row))(group))(
            groups, rows
        )

    return jax.lax.platform_dependent(groups, rows, cpu=one_by_one, default=together)


def _block_size(length: int) -> int:
    """P: at most BLOCK, and such that the last block of a row is nearly full."""
    return -(-length // -(-length // BLOCK))


def _mask(
    row: tuple[Array, Array, Array], index: Array, at: Array, count: int, queries: int
) -> Bool[Array, "Q P"]:
    """Of the block of queries `index` and the block of keys `at`."""
    _, segment, hidden_block = row
    size = segment.shape[0] // count
    column = jnp.arange(size)
    sees = visible(
        _block(segment, index, count),
        _block(hidden_block, index, count),
        index * size + column,
        _block(segment, at, count),
        _block(hidden_block, at, count),
        at * size + column,
    )
    return jnp.tile(sees, (queries // size, 1))


def _block(x: Array, at: Array, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, at * (x.shape[0] // count), x.shape[0] // count)


def _add_block(x: Array, at: Array, count: int, more: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(
        x, _block(x, at, count) + more, at * (x.shape[0] // count), axis=0
    )


_dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def _fold(x: Float[Array, "R L H K"], groups: int, size: int) -> Float[Array, "R G n Q K"]:
    """Blocks of queries, the heads of a group one after the other in each."""
    rows, length, heads, head_size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    x = x.reshape(rows, -1, size, groups, heads // groups, head_size)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(rows, groups, x.shape[1], -1, head_size)


def _unfold(x: Float[Array, "R G n Q K"], shape: tuple[int, ...]) -> Float[Array, "R L H K"]:
    rows, length, heads, head_size = shape
    groups, count = x.shape[1:3]
    x = x.reshape(rows, groups, count, heads // groups, -1, head_size)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(rows, -1, heads, head_size)[:, :length]
