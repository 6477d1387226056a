"""Inputs of an attention, and what every implementation of it must do with them."""

import jax
import jax.numpy as jnp
import numpy as np

ROWS = 4
HEADS = 4
SIZE = 8


def packing(rng, length):
    """Threads of random lengths, some with spawn blocks, and some padding at the end."""
    segment, hidden_block = np.zeros((2, ROWS, length), np.int32)
    for row in range(ROWS):
        end = 0
        thread = 0
        filled = length - int(rng.integers(0, length // 4 + 1))
        while end < filled:
            begin = end
            thread = thread + 1
            end = min(filled, begin + int(rng.integers(1, length + 1)))
            segment[row, begin:end] = thread
            for block in range(1, 4):
                at = int(rng.integers(begin, end))
                free = hidden_block[row, at : at + 5] == 0
                hidden_block[row, at : at + 5] = np.where(
                    free & (segment[row, at : at + 5] == thread), block, 0
                )
    return jnp.asarray(segment), jnp.asarray(hidden_block)


def inputs(seed, length, groups):
    rng = np.random.default_rng(seed)
    shapes = (ROWS, length, HEADS, SIZE), (ROWS, groups, length, SIZE), (ROWS, groups, length, SIZE)
    return *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes), *packing(
        rng, length
    )


def with_gradients(attend, q, k, v, segment, hidden_block):
    """Output and gradients; those of padding are blanked, they mean nothing."""
    live = (segment > 0)[:, :, None, None]
    weight = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape) * live

    def total(q, k, v):
        out = attend(q, k, v, segment, hidden_block)
        return jnp.sum(out * weight), out * live

    grads, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def threads_about(size):
    """Rows of five blocks of `size` columns, whose threads are about as long as a block; two rows
    end with padding.
    """
    lengths = (
        (size, size, 2 * size),
        (size - 1, size + 1, size, 2 * size),
        (size + 1, size - 1, size, size + 1, size - 1),
        (1, 3 * size - 2, size, 3),
    )
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return jnp.asarray([np.pad(row, (0, 5 * size - len(row))) for row in rows], jnp.int32)


def assert_only_what_is_seen_is_read(attend, size):
    """NaN in a block of `size` columns does not come through to blocks of other threads, as it
    would through a mask.

    A block of queries reads the blocks where its threads have keys before it. The NaN are in all
    that belongs to a block: forward in keys and values (and its own queries), backward in the
    gradient and what was kept of the forward pass too.
    """
    segment = threads_about(size)
    *x, _, hidden_block = inputs(1, segment.shape[1], 2)
    x.append(jnp.cos(jnp.arange(x[0].size, dtype=jnp.float32)).reshape(x[0].shape))

    @jax.jit
    def run(q, k, v, grad):
        out, pull = jax.vjp(lambda *x: attend(*x, segment, hidden_block), q, k, v)
        return out, *pull(grad)

    def by_block(out, d_q, d_k, d_v):
        columns_first = out, d_q, d_k.swapaxes(1, 2), d_v.swapaxes(1, 2)
        return [np.asarray(part).reshape(ROWS, 5, -1) for part in columns_first]

    threads = np.asarray(segment).reshape(ROWS, 5, size)
    common = (threads[:, :, None, :, None] == threads[:, None, :, None, :]).any((3, 4))
    reads = common & np.tri(5, dtype=bool)  # [row, block of queries, block of keys]
    clean = by_block(*run(*x))
    assert all(np.isfinite(part).all() for part in clean)
    for block in range(5):
        here = slice(block * size, (block + 1) * size)
        q, k, v, grad = x
        q, grad = (part.at[:, here].set(jnp.nan) for part in (q, grad))
        k, v = (part.at[:, :, here].set(jnp.nan) for part in (k, v))
        got = by_block(*run(q, k, v, grad))
        queries = reads[:, :, block]
        keys = (queries[:, :, None] & reads).any(1)
        assert np.isnan(got[0][queries]).all() and not queries.all() and not keys.all()
        for mine, expected, lost in zip(got, clean, (queries, queries, keys, keys), strict=True):
            np.testing.assert_array_equal(
                mine[~lost], expected[~lost], err_msg=f"NaN in block {block}"
            )
