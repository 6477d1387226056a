"""Attention over packed rows as two TPU kernels (Pallas).

They follow the same visibility rule and skip the same blocks as `packed.py`.

The life of a block of queries:
1. Thread and hidden block of a token become one number, its code, so that the visibility rule costs
   two comparisons a pair of tokens.
2. Forward: the grid walks over the blocks of keys, from the first one that the queries see to their
   own. A block of queries has as many turns as the one that sees the most blocks. Turns beyond its
   own repeat the last block's address, for which nothing is fetched, and compute nothing. Output
   and log-sum-exp go to HBM.
3. Backward, in one kernel: for each block of keys the grid walks over the blocks of queries that
   see it. Gradients of keys and values are summed in scratch memory, and so are those of queries
   near the keys. Those of queries further away lie in HBM; a block of them is fetched, added to and
   put back while the products of its turn and the next are computed. So VMEM need not grow with the
   row, and threads of up to `near_blocks` blocks are computed without these transfers.

Columns are the last axis everywhere, [K, L], and scores are [keys, queries]. Heads of 64 numbers
would fill half of the 128 lanes of a vector register, but columns fill them all; and what there is
one of for each query (maximum, sum) is a row.

Shapes: R rows, L columns of a row, H query heads, G key/value heads, K head size, n blocks of P
columns. In the kernels i is a block of queries, j a block of keys and t a turn of the grid.
"""

import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

BLOCK = 512  # The most columns of a block.
# By this name a remat policy keeps what the backward pass needs of the forward pass.
ATTENTION = "attention"
_LANES = 128  # P is a multiple of it.
# Bits of a code that hold the hidden block. A block and its answers take four tokens at least, so a
# thread in the longest row has fewer than 2**15 blocks. The other bits hold a column.
_BLOCK_BITS = 15
_LONGEST_ROW = 1 << (32 - _BLOCK_BITS)
_NEAR_BYTES = 4 * 2**20  # VMEM for the gradients of queries near a block of keys.
_FAR_BUFFERS = 2  # One block of queries far away is put back while the next one is fetched.
NEVER = -1e30  # The score of a key that a query does not see.
# Whether kernels run as plain JAX; with parameters, as a simulation of a TPU's memory.
Interpret: TypeAlias = bool | pltpu.InterpretParams


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_on_tpu(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R G L K"],
    v: Float[Array, "R G L K"],
    segment: Int[Array, "R L"],
    hidden_block: Int[Array, "R L"],
    interpret: Interpret = False,
) -> Float[Array, "R L H K"]:
    """Computes `packed.attend_packed` on one TPU core.

    Args:
      q: queries.
      k: keys.
      v: values.
      segment: thread of each token within its row, see `attend_packed`.
      hidden_block: the spawn block that the token belongs to, below 2**15, or 0.
      interpret: runs the kernels as plain JAX on any device; for tests.
    """
    return _forward(q, k, v, segment, hidden_block, interpret)[0]


def _forward(
    q: Array, k: Array, v: Array, segment: Array, hidden_block: Array, interpret: Interpret
) -> tuple[Array, tuple]:
    length = q.shape[1]
    if length > _LONGEST_ROW:
        raise ValueError(
            f"rows of {length} columns: at most {_LONGEST_ROW} on TPU; use a shorter"
            " limits.max_thread_tokens"
        )

    # Pad the rows to whole blocks and put columns last.
    size = block_size(length)
    missing = -length % size
    segment, hidden_block = (jnp.pad(x, ((0, 0), (0, missing))) for x in (segment, hidden_block))
    first, last = block_range(segment, size)  # [R, n]
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q = _columns_last(q.transpose(0, 2, 1, 3) * scale, missing)  # [R, H, K, L]
    k, v = _columns_last(k, missing), _columns_last(v, missing)  # [R, G, K, L]
    codes = token_codes(segment, hidden_block)  # [R, L]

    out, log_sum = _forward_call(first, codes, q, k, v, size, interpret)
    out, log_sum = checkpoint_name(out, ATTENTION), checkpoint_name(log_sum, ATTENTION)

    # Only arrays can be saved, so an empty one carries the length of the rows.
    columns = jnp.zeros((length, 0))
    saved = (q, k, v, codes, last, out, log_sum, columns)
    return out[..., :length].transpose(0, 3, 1, 2), saved


def _backward(
    interpret: Interpret, saved: tuple[Any, ...], grad: Array
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, codes, last, out, log_sum, columns = saved
    length = columns.shape[0]
    heads = q.shape[1]
    groups = k.shape[1]
    grad = _columns_last(grad.transpose(0, 2, 1, 3), q.shape[-1] - length)  # [R, H, K, L]
    # The sum over d out * out of each query. [R, H, 1, L]
    inner = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=2, keepdims=True)
    d_q, d_k, d_v = _backward_call(last, codes, q, k, v, grad, log_sum, inner, interpret)

    def of_groups(x: Float[Array, "R H K L"]) -> Float[Array, "R G columns K"]:
        """Adds up what the query heads of each group give to its keys (or values)."""
        summed = x.reshape(x.shape[0], groups, heads // groups, *x.shape[2:]).sum(axis=2)
        return summed.astype(k.dtype)[..., :length].transpose(0, 1, 3, 2)

    d_q = d_q[..., :length].transpose(0, 3, 1, 2)
    return d_q, of_groups(d_k), of_groups(d_v), None, None


attend_on_tpu.defvjp(_forward, _backward)


def block_size(length: int) -> int:
    """Returns P, with which the last block of a row is nearly full.

    It is a multiple of 128 and at most BLOCK.
    """
    blocks = math.ceil(length / BLOCK)
    return math.ceil(length / (blocks * _LANES)) * _LANES


def block_range(
    segment: Int[Array, "R L"], size: int
) -> tuple[Int[Array, "R n"], Int[Array, "R n"]]:
    """Finds which blocks see each other.

    Padding counts as one more thread, after all others.

    Args:
      segment: thread of each token; rows are padded to whole blocks.
      size: P, columns of a block.

    Returns:
      for each block of queries the first block of keys that it sees, and for each block of keys the
      last block of queries that sees it.
    """
    begin, end = _thread_range(segment)
    return begin[:, ::size] // size, end[:, size - 1 :: size] // size


def token_codes(segment: Int[Array, "R L"], hidden_block: Int[Array, "R L"]) -> Int[Array, "R L"]:
    """Returns a number that says of which thread and which hidden block each token is.

    The upper bits are the column where the thread begins: unlike the number of a thread, which
    counts from 1, it fits in 17 bits for each of 131,072 columns. Codes may be negative.

    Args:
      segment: thread of each token.
      hidden_block: the spawn block that the token belongs to, below 2**15, or 0.
    """
    begin, _ = _thread_range(segment)
    return (begin << _BLOCK_BITS) | hidden_block


def near_blocks(head_size: int, size: int) -> int:
    """Returns the number of blocks of queries whose gradients the backward kernel keeps in VMEM.

    Args:
      head_size: K.
      size: P, columns of a block.
    """
    return max(2, _NEAR_BYTES // (4 * head_size * size))


def _thread_range(
    segment: Int[Array, "R L"],
) -> tuple[Int[Array, "R L"], Int[Array, "R L"]]:
    """Returns the first and the last column of each token's thread."""
    column = jnp.arange(segment.shape[1], dtype=jnp.int32)
    differs = segment[:, 1:] != segment[:, :-1]
    begins = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    begin = jax.lax.cummax(jnp.where(begins, column, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, column, segment.shape[1]), axis=1, reverse=True)
    return begin, end


def _columns_last(x: Float[Array, "R heads L K"], missing: int) -> Float[Array, "R heads K padded"]:
    """Puts the columns last and pads them by `missing`."""
    return jnp.pad(x.transpose(0, 1, 3, 2), ((0, 0), (0, 0), (0, 0), (0, missing)))


def _forward_call(
    first: Array, codes: Array, q: Array, k: Array, v: Array, size: int, interpret: Interpret
) -> tuple[Float[Array, "R H K L"], Float[Array, "R H 1 L"]]:
    """Computes output and log-sum-exp."""
    rows, heads, head_size, length = q.shape
    count = length // size
    share = heads // k.shape[1]  # Query heads that share a key/value head.
    turns = jnp.max(jnp.arange(count) - first) + 1

    def key(i: Array, t: Array, row: Array, first: Any) -> Array:
        """Returns the block of keys of turn t; turns beyond the last one repeat it."""
        return jnp.minimum(first[row, i] + t, i)

    # The blocks that a turn of the grid (row r, head h, block of queries i, turn t) works on.
    queries = pl.BlockSpec((1, 1, head_size, size), lambda r, h, i, t, first: (r, h, 0, i))
    keys = pl.BlockSpec(
        (1, 1, head_size, size), lambda r, h, i, t, first: (r, h // share, 0, key(i, t, r, first))
    )
    return pl.pallas_call(
        functools.partial(_forward_kernel, size=size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, heads, count, turns),
            in_specs=[
                pl.BlockSpec((1, 1, size), lambda r, h, i, t, first: (r, 0, i)),
                pl.BlockSpec((1, size, 1), lambda r, h, i, t, first: (r, key(i, t, r, first), 0)),
                queries,
                keys,
                keys,
            ],
            out_specs=[
                queries,
                pl.BlockSpec((1, 1, 1, size), lambda r, h, i, t, first: (r, h, 0, i)),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, size), jnp.float32),
                pltpu.VMEM((1, size), jnp.float32),
                pltpu.VMEM((head_size, size), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="attend_forward",
    )(first, codes[:, None, :], codes[:, :, None], q, k, v)


def _forward_kernel(
    first: Any,
    code: Any,
    key_code: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    log_sum: Any,
    highest: Any,
    total: Any,
    sums: Any,
    *,
    size: int,
) -> None:
    """Adds one block of keys to the running maximum, sum and product of one block of queries.

    Args:
      first: [R, n] first block of keys of each block of queries.
      code: [1, 1, P] codes of the queries.
      key_code: [1, P, 1] codes of the keys.
      q: [1, 1, K, P] block of queries.
      k: [1, 1, K, P] block of keys.
      v: [1, 1, K, P] block of values.
      out: [1, 1, K, P] result, the output.
      log_sum: [1, 1, 1, P] result, the log-sum-exp.
      highest: [1, P] scratch, the running maximum.
      total: [1, P] scratch, the running sum.
      sums: [K, P] scratch, the running product.
      size: P.
    """
    row, i, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    j = first[row, i] + t

    @pl.when(t == 0)
    def _begin() -> None:
        highest[...] = jnp.full_like(highest, NEVER)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(j <= i)
    def _add_block() -> None:
        sees = _visible(code[0], key_code[0], i, j, size)
        scores = jnp.where(sees, dot(k[0, 0], q[0, 0], (0, 0)), NEVER)
        # A block without a visible key adds to a query's sums too, but that is scaled to nothing
        # when the query's own block comes, which is the last one.
        higher = jnp.maximum(highest[...], jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp(scores - higher)  # [P, P]
        shrink = jnp.exp(highest[...] - higher)  # [1, P]
        highest[...] = higher
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        sums[...] = sums[...] * shrink + dot(v[0, 0], weights.astype(v.dtype), (1, 0))

    @pl.when(j == i)
    def _write_out() -> None:
        out[0, 0] = (sums[...] / total[...]).astype(out.dtype)
        log_sum[0, 0] = highest[...] + jnp.log(total[...])


def _backward_call(
    last: Array,
    codes: Array,
    q: Array,
    k: Array,
    v: Array,
    grad: Array,
    log_sum: Array,
    inner: Array,
    interpret: Interpret,
) -> tuple[Float[Array, "R H K L"], Float[Array, "R H K L"], Float[Array, "R H K L"]]:
    """Computes the gradients of queries, keys and values.

    Those of keys and values are given for each query head, in float32 where several heads are still
    to be added up.
    """
    rows, heads, head_size, length = q.shape
    count = last.shape[1]
    share = heads // k.shape[1]  # Query heads that share a key/value head.
    size = length // count
    near = min(near_blocks(head_size, size), count)
    far = count - near  # The first blocks of a row are never far from the keys that they see.
    buffers = near + (_FAR_BUFFERS if far else 0)
    turns = jnp.max(last - jnp.arange(count)) + 1
    summed = jax.ShapeDtypeStruct(q.shape, k.dtype if share == 1 else jnp.float32)
    # Memory in HBM for the gradients of queries that are far away. No array can be empty.
    blocks = (rows, heads, far) if far else (1, 1, 1)
    far_sums = jax.ShapeDtypeStruct((*blocks, head_size, size), jnp.float32)

    def query(j: Array, t: Array, row: Array, last: Any) -> Array:
        """Returns the block of queries of turn t; turns beyond the last one repeat it."""
        return jnp.minimum(j + t, last[row, j])

    # The blocks that a turn of the grid (row r, head h, block of keys j, turn t) works on.
    queries = pl.BlockSpec(
        (1, 1, head_size, size), lambda r, h, j, t, last: (r, h, 0, query(j, t, r, last))
    )
    per_query = pl.BlockSpec(
        (1, 1, 1, size), lambda r, h, j, t, last: (r, h, 0, query(j, t, r, last))
    )
    keys = pl.BlockSpec((1, 1, head_size, size), lambda r, h, j, t, last: (r, h // share, 0, j))
    of_keys = pl.BlockSpec((1, 1, head_size, size), lambda r, h, j, t, last: (r, h, 0, j))
    d_q, d_k, d_v, _ = pl.pallas_call(
        functools.partial(_backward_kernel, size=size, near=near),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, heads, count, turns),
            in_specs=[
                pl.BlockSpec((1, 1, size), lambda r, h, j, t, last: (r, 0, query(j, t, r, last))),
                pl.BlockSpec((1, size, 1), lambda r, h, j, t, last: (r, j, 0)),
                queries,
                keys,
                keys,
                queries,
                per_query,
                per_query,
            ],
            out_specs=[
                # The queries of block j are done with the keys of block j.
                of_keys,
                of_keys,
                of_keys,
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            scratch_shapes=[
                pltpu.VMEM((buffers, head_size, size), jnp.float32),
                pltpu.VMEM((head_size, size), jnp.float32),
                pltpu.VMEM((head_size, size), jnp.float32),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), summed, summed, far_sums],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="attend_backward",
    )(last, codes[:, None, :], codes[:, :, None], q, k, v, grad, log_sum, inner)
    return d_q, d_k, d_v


def _backward_kernel(
    last: Any, code: Any, key_code: Any,
    q: Any, k: Any, v: Any, grad: Any, log_sum: Any, inner: Any,
    d_q: Any, d_k: Any, d_v: Any, far_sums: Any,
    q_sums: Any, k_sums: Any, v_sums: Any, fetched: Any, stored: Any,
    *, size: int, near: int,
) -> None:  # fmt: skip
    """Adds what one block of keys and one block of queries give to each other's gradients.

    Args:
      last: [R, n] last block of queries of each block of keys.
      code: [1, 1, P] codes of the queries.
      key_code: [1, P, 1] codes of the keys.
      q: [1, 1, K, P] block of queries.
      k: [1, 1, K, P] block of keys.
      v: [1, 1, K, P] block of values.
      grad: [1, 1, K, P] gradient of the output.
      log_sum: [1, 1, 1, P] log-sum-exp of the queries.
      inner: [1, 1, 1, P] product of the gradient and the output, summed over K.
      d_q: [1, 1, K, P] result, the gradient of the queries of block j.
      d_k: [1, 1, K, P] result, the keys' gradient.
      d_v: [1, 1, K, P] result, the values' gradient.
      far_sums: [R, H, n - near, K, P] in HBM, sums for `d_q` of queries far away; the first `near`
        blocks have none.
      q_sums: [near (+ 2), K, P] scratch for `d_q`, one block of queries at an index. Then, if any
        are far away, two buffers for them.
      k_sums: [K, P] scratch for `d_k`.
      v_sums: [K, P] scratch for `d_v`.
      fetched: semaphore of the transfer from `far_sums`.
      stored: semaphore of the transfer to `far_sums`.
      size: P.
      near: turns, from the first one on, whose queries count as near.
    """
    row, head, j, t = (pl.program_id(axis) for axis in range(4))
    i = j + t
    head_size = q.shape[2]
    before = jnp.maximum(j - 1, 0)
    # Whether no keys before block j gave anything to block i.
    is_first = (j == 0) | (i > last[row, before])

    # Block i is one turn nearer for each block of keys. Its sums are in HBM while t >= near, then
    # in VMEM at i % near, where block i - near is done by then.
    index = jnp.where(t < near, jax.lax.rem(i, near), near + jax.lax.rem(t, _FAR_BUFFERS))
    is_fetched = ~is_first & (t >= near - 1)
    is_stored = t >= near
    # A turn waits until what the turn before it stored has arrived. So that has arrived before its
    # buffer is used again, two turns later, and before it is fetched, near - 1 turns later.
    turn_before_stored = jnp.where(t == 0, (j > 0) & (last[row, before] - before >= near), t > near)
    far_block = far_sums.at[row, head, i - near]
    fetch = pltpu.make_async_copy(far_block, q_sums.at[index], fetched)
    store = pltpu.make_async_copy(q_sums.at[index], far_block, stored)

    @pl.when(t == 0)
    def _begin_block_of_keys() -> None:
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    @pl.when(i <= last[row, j])
    def _add_block() -> None:
        @pl.when(is_first)
        def _begin_block_of_queries() -> None:
            q_sums[index] = jnp.zeros_like(q_sums[index])

        pl.when(is_fetched)(fetch.start)
        sees = _visible(code[0], key_code[0], i, j, size)
        scores = dot(k[0, 0], q[0, 0], (0, 0))  # [P, P]
        weights = jnp.where(sees, jnp.exp(scores - log_sum[0, 0]), 0.0)
        d_scores = (weights * (dot(v[0, 0], grad[0, 0], (0, 0)) - inner[0, 0])).astype(q.dtype)
        k_sums[...] += dot(q[0, 0], d_scores, (1, 1))
        v_sums[...] += dot(grad[0, 0], weights.astype(q.dtype), (1, 1))
        to_queries = dot(k[0, 0], d_scores, (1, 0))  # [K, P]

        pl.when(is_fetched)(fetch.wait)
        q_sums[index] += to_queries
        pl.when(turn_before_stored)(store.wait)  # Any block has as many bytes to wait for.
        pl.when(is_stored)(store.start)

    @pl.when(t == 0)
    def _write_block_of_queries() -> None:
        d_q[0, 0] = (q_sums[index] * head_size**-0.5).astype(d_q.dtype)

    @pl.when(i == last[row, j])
    def _write_block_of_keys() -> None:
        d_k[0, 0] = k_sums[...].astype(d_k.dtype)
        d_v[0, 0] = v_sums[...].astype(d_v.dtype)


def _visible(code: Array, key_code: Array, i: Array, j: Array, size: int) -> Array:
    """[keys, queries] `packed.visible` of block j of keys and block i of queries, on codes."""
    shape = (key_code.shape[0], code.shape[1])
    key_column = j * size + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = i * size + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    not_hidden = code & ~((1 << _BLOCK_BITS) - 1)  # The thread's code outside of hidden blocks.
    return (key_column <= column) & ((key_code == code) | (key_code == not_hidden))


def dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """Multiplies over one axis of each operand, summed in float32; for use within a kernel."""
    if pltpu.is_tpu_device() and pltpu.get_tpu_info().generation < 4:
        # The kernel compiler has no bfloat16 operands for v2 and v3, whose matrix units round
        # float32 operands to bfloat16.
        left = left.astype(jnp.float32)
        right = right.astype(jnp.float32)
    contract = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)
