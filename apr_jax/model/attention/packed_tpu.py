"""Attention over packed rows as two TPU kernels (Pallas), with the same rule and the same skipped
blocks as `packed.py`.

The life of a block of queries:
1. Thread and hidden block of a token become one number (`_codes`), so that the rule costs two
   comparisons a pair.
2. Forward: the grid walks the blocks of keys from the first one that the queries see to their own.
   Steps beyond that repeat the last block's address, for which nothing is fetched, and compute
   nothing. Output and log-sum-exp go to HBM.
3. Backward, one kernel: for each block of keys the blocks of queries that see it. Keys' and values'
   gradients are summed in scratch memory; the queries' gradient of the whole row stays in VMEM
   until its head is done.

Columns are the last axis everywhere, [K, L], and scores are [keys, queries]: heads of 64 would fill
half of the 128 lanes of a vector register, columns fill them all, and what there is one of for each
query (maximum, sum) is a row.

Shapes: R rows, L columns of a row, H query heads, G key/value heads, K head size, n blocks of P
columns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

BLOCK = 512
ATTENTION = (  # By this name a remat policy keeps what the backward pass needs of the forward one.
    "attention"
)
_LANES = 128  # P is a multiple of it.
_BLOCK_BITS = 16  # Bits of a code that hold the hidden block.
NEVER = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_on_tpu(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R G L K"],
    v: Float[Array, "R G L K"],
    segment: Int[Array, "R L"],
    hidden_block: Int[Array, "R L"],
    interpret: bool = False,
) -> Float[Array, "R L H K"]:
    """`attention.attend_packed` on one TPU core.

    Args:
      interpret: runs the kernels as plain JAX on any device; for tests.
    """
    return _forward(q, k, v, segment, hidden_block, interpret)[0]


def _forward(
    q: Array, k: Array, v: Array, segment: Array, hidden_block: Array, interpret: bool
) -> tuple[Array, tuple]:
    length = q.shape[1]
    if length >= 1 << (31 - _BLOCK_BITS):
        raise ValueError(
            f"rows of {length} columns: must be shorter than {1 << (31 - _BLOCK_BITS)}"
        )
    size = block_size(length)
    missing = -length % size
    segment, hidden_block = (jnp.pad(x, ((0, 0), (0, missing))) for x in (segment, hidden_block))
    first, last = block_range(segment, size)
    q = _columns_last(q.transpose(0, 2, 1, 3) * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), missing)
    k, v = _columns_last(k, missing), _columns_last(v, missing)
    codes = (segment << _BLOCK_BITS) | hidden_block
    out, log_sum = _forward_call(first, codes, q, k, v, size, interpret)
    out, log_sum = checkpoint_name(out, ATTENTION), checkpoint_name(log_sum, ATTENTION)
    return out[..., :length].transpose(0, 3, 1, 2), (
        q,
        k,
        v,
        codes,
        last,
        out,
        log_sum,
        jnp.zeros((length, 0)),
    )


def _backward(
    interpret: bool, saved: tuple[Any, ...], grad: Array
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, codes, last, out, log_sum, columns = saved
    length, heads, groups = columns.shape[0], q.shape[1], k.shape[1]
    grad = _columns_last(grad.transpose(0, 2, 1, 3), q.shape[-1] - length)
    inner = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=2, keepdims=True)
    d_q, d_k, d_v = _backward_call(last, codes, q, k, v, grad, log_sum, inner, interpret)

    def of_group(x: Array) -> Array:
        summed = x.reshape(x.shape[0], groups, heads // groups, *x.shape[2:]).sum(axis=2)
        return summed.astype(k.dtype)[..., :length].transpose(0, 1, 3, 2)

    return d_q[..., :length].transpose(0, 3, 1, 2), of_group(d_k), of_group(d_v), None, None


attend_on_tpu.defvjp(_forward, _backward)


def block_size(length: int) -> int:
    """P: a multiple of 128, at most BLOCK, and such that the last block of a row is nearly full."""
    blocks = -(-length // BLOCK)
    return -(-length // (blocks * _LANES)) * _LANES


def block_range(
    segment: Int[Array, "R L"], size: int
) -> tuple[Int[Array, "R n"], Int[Array, "R n"]]:
    """The first block of keys that a block of queries sees, and the last block of queries that sees
    a block of keys.

    Padding is a thread like any other, after all others.
    """
    column = jnp.arange(segment.shape[1])
    differs = segment[:, 1:] != segment[:, :-1]
    begins = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
    begin = jax.lax.cummax(jnp.where(begins, column, 0), axis=1)
    end = jax.lax.cummin(jnp.where(ends, column, segment.shape[1]), axis=1, reverse=True)
    return begin[:, ::size] // size, end[:, size - 1 :: size] // size


def _columns_last(x: Float[Array, "R heads L K"], missing: int) -> Float[Array, "R heads K padded"]:
    return jnp.pad(x.transpose(0, 1, 3, 2), ((0, 0), (0, 0), (0, 0), (0, missing)))


def _forward_call(
    first: Array, codes: Array, q: Array, k: Array, v: Array, size: int, interpret: bool
) -> tuple[Float[Array, "R H K L"], Float[Array, "R H 1 L"]]:
    rows, heads, head_size, length = q.shape
    count, share = length // size, heads // k.shape[1]

    def key(i: Array, t: Array, row: Array, first: Any) -> Array:
        return jnp.minimum(first[row, i] + t, i)

    queries = pl.BlockSpec((1, 1, head_size, size), lambda r, h, i, t, first: (r, h, 0, i))
    keys = pl.BlockSpec(
        (1, 1, head_size, size), lambda r, h, i, t, first: (r, h // share, 0, key(i, t, r, first))
    )
    return pl.pallas_call(
        functools.partial(_forward_kernel, size=size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, heads, count, count),
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
    most: Any,
    total: Any,
    sums: Any,
    *,
    size: int,
) -> None:
    row, i, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    at = first[row, i] + t

    @pl.when(t == 0)
    def _() -> None:
        most[...] = jnp.full_like(most, NEVER)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(at <= i)
    def _() -> None:
        sees = _visible(code[0], key_code[0], i, at, size)
        scores = jnp.where(sees, dot(k[0, 0], q[0, 0], (0, 0)), NEVER)
        # What blocks without a visible key add to a query's sums vanishes when its own block, the
        # last one, comes.
        higher = jnp.maximum(most[...], jnp.max(scores, axis=0, keepdims=True))
        weights, shrink = jnp.exp(scores - higher), jnp.exp(most[...] - higher)
        most[...] = higher
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        sums[...] = sums[...] * shrink + dot(v[0, 0], weights.astype(v.dtype), (1, 0))

    @pl.when(at == i)
    def _() -> None:
        out[0, 0] = (sums[...] / total[...]).astype(out.dtype)
        log_sum[0, 0] = most[...] + jnp.log(total[...])


def _backward_call(
    last: Array,
    codes: Array,
    q: Array,
    k: Array,
    v: Array,
    grad: Array,
    log_sum: Array,
    inner: Array,
    interpret: bool,
) -> tuple[Float[Array, "R H K L"], Float[Array, "R H K L"], Float[Array, "R H K L"]]:
    """Gradients; those of keys and values for each query head, in float32 where heads are still to
    be added up.
    """
    rows, heads, head_size, length = q.shape
    count, share = last.shape[1], heads // k.shape[1]
    size = length // count
    summed = jax.ShapeDtypeStruct(q.shape, k.dtype if share == 1 else jnp.float32)

    def query(j: Array, t: Array, row: Array, last: Any) -> Array:
        return jnp.minimum(j + t, last[row, j])

    queries = pl.BlockSpec(
        (1, 1, head_size, size), lambda r, h, j, t, last: (r, h, 0, query(j, t, r, last))
    )
    per_query = pl.BlockSpec(
        (1, 1, 1, size), lambda r, h, j, t, last: (r, h, 0, query(j, t, r, last))
    )
    keys = pl.BlockSpec((1, 1, head_size, size), lambda r, h, j, t, last: (r, h // share, 0, j))
    of_keys = pl.BlockSpec((1, 1, head_size, size), lambda r, h, j, t, last: (r, h, 0, j))
    return pl.pallas_call(
        functools.partial(_backward_kernel, size=size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, heads, count, count),
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
                pl.BlockSpec((1, 1, head_size, length), lambda r, h, j, t, last: (r, h, 0, 0)),
                of_keys,
                of_keys,
            ],
            scratch_shapes=[
                pltpu.VMEM((head_size, length), jnp.float32),
                pltpu.VMEM((head_size, size), jnp.float32),
                pltpu.VMEM((head_size, size), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), summed, summed],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="attend_backward",
    )(last, codes[:, None, :], codes[:, :, None], q, k, v, grad, log_sum, inner)


def _backward_kernel(
    last: Any,
    code: Any,
    key_code: Any,
    q: Any,
    k: Any,
    v: Any,
    grad: Any,
    log_sum: Any,
    inner: Any,
    d_q: Any,
    d_k: Any,
    d_v: Any,
    q_sums: Any,
    k_sums: Any,
    v_sums: Any,
    *,
    size: int,
) -> None:
    row, j, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    i, head_size = j + t, q.shape[2]

    @pl.when((j == 0) & (t == 0))
    def _() -> None:
        q_sums[...] = jnp.zeros_like(q_sums)

    @pl.when(t == 0)
    def _() -> None:
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    @pl.when(i <= last[row, j])
    def _() -> None:
        sees = _visible(code[0], key_code[0], i, j, size)
        weights = jnp.where(sees, jnp.exp(dot(k[0, 0], q[0, 0], (0, 0)) - log_sum[0, 0]), 0.0)
        d_scores = (weights * (dot(v[0, 0], grad[0, 0], (0, 0)) - inner[0, 0])).astype(q.dtype)
        k_sums[...] += dot(q[0, 0], d_scores, (1, 1))
        v_sums[...] += dot(grad[0, 0], weights.astype(q.dtype), (1, 1))
        columns = pl.ds(pl.multiple_of(i * size, _LANES), size)
        q_sums[:, columns] += dot(k[0, 0], d_scores, (1, 0))

    @pl.when(i == last[row, j])
    def _() -> None:
        d_k[0, 0] = k_sums[...].astype(d_k.dtype)
        d_v[0, 0] = v_sums[...].astype(d_v.dtype)

    @pl.when((j == pl.num_programs(2) - 1) & (t == pl.num_programs(3) - 1))
    def _() -> None:
        d_q[0, 0] = (q_sums[...] * head_size**-0.5).astype(d_q.dtype)


def _visible(code: Array, key_code: Array, i: Array, j: Array, size: int) -> Array:
    """[keys, queries] of block j of keys and block i of queries: `attention.visible`, on codes."""
    shape = (key_code.shape[0], code.shape[1])
    key_column = j * size + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = i * size + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    open_ = code & ~((1 << _BLOCK_BITS) - 1)  # The thread's tokens outside of hidden blocks.
    return (key_column <= column) & ((key_code == code) | (key_code == open_))


def dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """Within a kernel: the product over one axis of each, in float32."""
    if pltpu.is_tpu_device() and pltpu.get_tpu_info().generation < 4:
        # The kernel compiler has no bfloat16 operands for v2 and v3. Their matrix units round
        # float32 ones to it.
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    contract = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)
