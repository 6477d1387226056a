"""Attention over packed rows, block by block, without any L x L array.

Pairs of tokens of different threads are computed only where they share a block. On TPU the kernels
of `packed_tpu.py` do the same; what follows is for all other devices.

The life of a block of queries:
1. Threads stand one after the other in a row, so what a query may see lies between the start of its
   thread and itself. `first_blocks` says, for each block of queries, which is the first block of
   keys in which there is anything to see.
2. Forward: those blocks of keys are read one by one, and the softmax is kept as a running maximum,
   sum and product (Dao et al. 2022, algorithm 1). Output and log-sum-exp are saved, scores never.
3. Backward: the same blocks are read once more. Scores are computed again, and d scores = weights *
   (d weights - sum(d out * out)).

The work is written for one group of heads of one row. On CPU the groups follow one another, so that
a block's scores stay in the processor's cache, and each group ends at its own last block. On other
devices the groups are batched (`vmap`).

Shapes: R rows, L columns of a row, H query heads, G key/value heads, K head size, n blocks of P
columns, Q = H/G * P queries of a block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from apr_jax.model.attention.packed_tpu import ATTENTION, NEVER, attend_on_tpu
from apr_jax.model.sharding import BATCH_AXES, on_tpu

BLOCK = 64  # docs/training.md has the figures of other sizes.


def attend_packed(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R G L K"],
    v: Float[Array, "R G L K"],
    segment: Int[Array, "R L"],
    hidden_block: Int[Array, "R L"],
    mesh: Mesh | None = None,
) -> Float[Array, "R L H K"]:
    """Computes softmax(q k' / sqrt(K)) v over the keys that `visible` allows.

    The softmax is in float32.

    Args:
      q: queries.
      k: keys.
      v: values.
      segment: thread of each token within its row, counted from 1, every thread's tokens one after
        the other; 0 is padding, whose output means nothing.
      hidden_block: the spawn block that the token belongs to, or 0.
      mesh: devices over which rows (and heads, where that keeps groups whole) are split. Every
        device works on its own then; without a mesh XLA would gather all rows on all devices, since
        it cannot split a loop of unknown length.
    """
    tpu = on_tpu(mesh) if mesh else jax.default_backend() == "tpu"
    attend = attend_on_tpu if tpu else _attend
    if mesh is None or (mesh.size == 1 and not tpu):
        return attend(q, k, v, segment, hidden_block)

    groups = k.shape[1]
    heads = "tensor" if groups % mesh.shape["tensor"] == 0 else None
    queries = PartitionSpec(BATCH_AXES, None, heads)
    keys = PartitionSpec(BATCH_AXES, heads)
    rows = PartitionSpec(BATCH_AXES)
    split = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(queries, keys, keys, rows, rows),
        out_specs=queries,
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
    """Returns which of M keys each of S queries in a packed row sees.

    A query sees a key if the key is not after it, both are of the same thread, and the key is in no
    hidden block or in the query's own. All terms are [S, M].
    """
    causal = key_column[None] <= column[:, None]
    same_thread = key_segment[None] == segment[:, None]
    in_no_block = key_hidden_block[None] == 0
    same_block = key_hidden_block[None] == hidden_block[:, None]
    not_hidden = in_no_block | same_block
    return causal & same_thread & not_hidden


def first_blocks(segment: Int[Array, "R L"], size: int) -> Int[Array, "R n"]:
    """Finds the first block of keys in which each block of queries sees anything.

    A block that begins with padding sees itself alone.

    Args:
      segment: thread of each token, see `attend_packed`.
      size: P, columns of a block.
    """
    column = jnp.arange(segment.shape[1])
    starts = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(starts, column, 0), axis=1)  # [R, L] of each token's thread
    first_seen = jnp.where(segment == 0, column, start)
    return first_seen[:, ::size] // size


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, segment: Array, hidden_block: Array) -> Array:
    """Computes `attend_packed` on one device."""
    return _forward(q, k, v, segment, hidden_block)[0]


def _forward(
    q: Array, k: Array, v: Array, segment: Array, hidden_block: Array
) -> tuple[Array, tuple[Any, ...]]:
    length = q.shape[1]
    groups = k.shape[1]
    head_size = q.shape[-1]

    # Pad the rows to whole blocks.
    columns = _block_size(length)
    missing = -length % columns
    segment, hidden_block = (jnp.pad(x, ((0, 0), (0, missing))) for x in (segment, hidden_block))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in (k, v))

    blocks = _fold(q * jnp.asarray(head_size**-0.5, q.dtype), groups, columns)  # [R, G, n, Q, K]
    rows = (first_blocks(segment, columns), segment, hidden_block)
    out, log_sum = _for_each_group(_forward_group, (blocks, k, v), rows)

    # By these names a remat policy keeps both for the backward pass.
    out = checkpoint_name(out.astype(q.dtype), ATTENTION)  # [R, G, n, Q, K]
    log_sum = checkpoint_name(log_sum, ATTENTION)  # [R, G, n, Q]
    return _unfold(out, q.shape), (blocks, k, v, rows, out, log_sum)


def _backward(saved: tuple[Any, ...], grad: Array) -> tuple[Array, Array, Array, None, None]:
    blocks, k, v, rows, out, log_sum = saved
    groups = k.shape[1]
    columns = k.shape[2] // blocks.shape[2]
    grads = _fold(grad, groups, columns)  # [R, G, n, Q, K]
    # The sum over d out * out of each query. [R, G, n, Q]
    inner = jnp.sum(grads.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    groups_of_heads = (blocks, k, v, grads, log_sum, inner)
    d_q, d_k, d_v = _for_each_group(_backward_group, groups_of_heads, rows)

    d_q = _unfold(d_q.astype(grad.dtype), grad.shape) * jnp.asarray(k.shape[-1] ** -0.5, grad.dtype)
    length = grad.shape[1]
    return d_q, d_k[:, :, :length].astype(k.dtype), d_v[:, :, :length].astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _forward_group(
    group: tuple[Float[Array, "n Q K"], Float[Array, "L K"], Float[Array, "L K"]],
    row: tuple[Int[Array, " n"], Int[Array, " L"], Int[Array, " L"]],
) -> tuple[Float[Array, "n Q K"], Float[Array, "n Q"]]:
    """Computes output and log-sum-exp of one group of heads of one row.

    Args:
      group: blocks of queries, keys and values.
      row: first block of keys of each block of queries, threads and hidden blocks.
    """
    q, k, v = group
    first_blocks_of_keys = row[0]
    count, queries, size = q.shape

    def attend_block(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        """Computes output and log-sum-exp of one block of queries."""
        index, first, q = block

        def read(key_index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            """Adds one block of keys to the running maximum, sum and product."""
            highest, total, out = carry
            sees = _mask(row, index, key_index, count, queries)
            scores = jnp.where(sees, _dot(q, _block(k, key_index, count).T), NEVER)  # [Q, P]
            higher = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[:, None])
            shrink = jnp.exp(highest - higher)
            product = _dot(weights.astype(v.dtype), _block(v, key_index, count))  # [Q, K]
            total = total * shrink + jnp.sum(weights, axis=-1)
            return higher, total, out * shrink[:, None] + product

        nothing = jnp.zeros(queries)
        start = (nothing + NEVER, nothing, jnp.zeros((queries, size)))
        # The block itself comes first. There each query sees a key, so the running maximum is a
        # score from the start.
        carry = read(index, start)
        highest, total, out = jax.lax.fori_loop(first, index, read, carry)
        return out / total[:, None], highest + jnp.log(total)

    return jax.lax.map(attend_block, (jnp.arange(count), first_blocks_of_keys, q))


def _backward_group(
    group: tuple[Array, ...], row: tuple[Int[Array, " n"], Int[Array, " L"], Int[Array, " L"]]
) -> tuple[Float[Array, "n Q K"], Float[Array, "L K"], Float[Array, "L K"]]:
    """Computes the gradients of queries, keys and values of one group of heads of one row.

    Args:
      group: blocks of queries, keys, values, gradient of the output, log-sum-exp, and the sum over
        d out * out of each query.
      row: see `_forward_group`.
    """
    q, k, v, grad, log_sum, inner = group
    first_blocks_of_keys = row[0]
    count, queries, _ = q.shape

    def attend_block(
        d_keys: tuple[Array, Array], block: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        """Computes the gradient of one block of queries and adds to those of keys and values."""
        index, first, q, grad, log_sum, inner = block

        def read(key_index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_q, d_k, d_v = carry
            key = _block(k, key_index, count)  # [P, K]
            value = _block(v, key_index, count)  # [P, K]
            scores = _dot(q, key.T)  # [Q, P]
            sees = _mask(row, index, key_index, count, queries)
            weights = jnp.where(sees, jnp.exp(scores - log_sum[:, None]), 0.0)
            d_scores = (weights * (_dot(grad, value.T) - inner[:, None])).astype(q.dtype)
            return (
                d_q + _dot(d_scores, key),
                _add_block(d_k, key_index, count, _dot(d_scores.T, q)),
                _add_block(d_v, key_index, count, _dot(weights.astype(q.dtype).T, grad)),
            )

        end = index + 1
        start = (jnp.zeros(q.shape), *d_keys)
        d_q, *d_keys_after = jax.lax.fori_loop(first, end, read, start)
        return tuple(d_keys_after), d_q

    nothing = (jnp.zeros(k.shape), jnp.zeros(v.shape))
    blocks = (jnp.arange(count), first_blocks_of_keys, q, grad, log_sum, inner)
    (d_k, d_v), d_q = jax.lax.scan(attend_block, nothing, blocks)
    return d_q, d_k, d_v


def _for_each_group(work: Any, groups: tuple[Array, ...], rows: tuple[Array, ...]) -> Any:
    """Applies `work(group, row)` to all [R, G] groups of heads."""

    def one_by_one(groups: tuple[Array, ...], rows: tuple[Array, ...]) -> Any:
        def of_row(row_and_groups: Any) -> Any:
            groups, row = row_and_groups
            return jax.lax.map(lambda group: work(group, row), groups)

        return jax.lax.map(of_row, (groups, rows))

    def together(groups: tuple[Array, ...], rows: tuple[Array, ...]) -> Any:
        def of_row(groups: Any, row: Any) -> Any:
            return jax.vmap(lambda group: work(group, row))(groups)

        return jax.vmap(of_row)(groups, rows)

    return jax.lax.platform_dependent(groups, rows, cpu=one_by_one, default=together)


def _block_size(length: int) -> int:
    """Returns P, at most BLOCK, with which the last block of a row is nearly full."""
    blocks = math.ceil(length / BLOCK)
    return math.ceil(length / blocks)


def _mask(
    row: tuple[Array, Array, Array], index: Array, key_index: Array, count: int, queries: int
) -> Bool[Array, "Q P"]:
    """Returns which queries of one block see which keys of another.

    Args:
      row: see `_forward_group`.
      index: index of the block of queries.
      key_index: index of the block of keys.
      count: n, blocks of a row.
      queries: Q, queries of a block.
    """
    _, segment, hidden_block = row
    size = segment.shape[0] // count
    column = jnp.arange(size)
    sees = visible(
        _block(segment, index, count),
        _block(hidden_block, index, count),
        index * size + column,
        _block(segment, key_index, count),
        _block(hidden_block, key_index, count),
        key_index * size + column,
    )
    # The same for each head of the group.
    return jnp.tile(sees, (queries // size, 1))


def _block(x: Array, index: Array, count: int) -> Array:
    """Takes block `index` of `count` equal blocks along the first axis."""
    size = x.shape[0] // count
    return jax.lax.dynamic_slice_in_dim(x, index * size, size)


def _add_block(x: Array, index: Array, count: int, more: Array) -> Array:
    """Adds to block `index` of `count` equal ones along the first axis."""
    added = _block(x, index, count) + more
    return jax.lax.dynamic_update_slice_in_dim(x, added, index * (x.shape[0] // count), axis=0)


_dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)


def _fold(x: Float[Array, "R L H K"], groups: int, size: int) -> Float[Array, "R G n Q K"]:
    """Cuts queries into blocks of `size` columns, with the heads of a group one after the other."""
    rows, length, heads, head_size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0)))
    x = x.reshape(rows, -1, size, groups, heads // groups, head_size)
    x = x.transpose(0, 3, 1, 4, 2, 5)  # [R, G, n, H / G, P, K]
    return x.reshape(rows, groups, x.shape[2], -1, head_size)


def _unfold(x: Float[Array, "R G n Q K"], shape: tuple[int, ...]) -> Float[Array, "R L H K"]:
    """Undoes `_fold`; `shape` is that of the queries."""
    rows, length, heads, head_size = shape
    groups, count = x.shape[1:3]
    x = x.reshape(rows, groups, count, heads // groups, -1, head_size)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(rows, -1, heads, head_size)[:, :length]
