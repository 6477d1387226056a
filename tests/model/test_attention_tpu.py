"""The TPU kernels equal the naive twin on random packings (interpreted on CPU;
tests/end_to_end/test_tpu.py compiles them).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention import (
    SIZE,
    assert_equal,
    assert_only_what_is_seen_is_read,
    inputs,
    with_gradients,
)
from jax.experimental.pallas import tpu as pltpu

from apr_jax.model.attention import packed, packed_tpu
from apr_jax.model.attention.packed_tpu import attend_on_tpu, block_range, token_codes
from apr_jax.model.attention.plain import attend_plainly
from apr_jax.model.sharding import make_mesh


def interpreted(*x):
    return attend_on_tpu(*x, True)


pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(packed_tpu, "BLOCK", 128)


@pytest.mark.parametrize(
    ("length", "groups"),
    [
        pytest.param(1, 4, marks=pytest.mark.thorough),
        pytest.param(128, 2, marks=pytest.mark.thorough),
        pytest.param(129, 1, marks=pytest.mark.slow),
        (500, 2),
        pytest.param(500, 4, marks=pytest.mark.thorough),
    ],
)
def test_equals_the_naive_twin_on_random_packings(length, groups):
    kernel = jax.jit(lambda *x: with_gradients(interpreted, *x))
    for seed in range(3):
        x = inputs(seed, length, groups)
        assert_equal(kernel(*x), with_gradients(attend_plainly, *x))


def keep_near(monkeypatch, blocks):
    """Lets the backward kernel keep the gradients of so many blocks of queries in VMEM."""
    monkeypatch.setattr(packed_tpu, "_NEAR_BYTES", blocks * 4 * SIZE * packed_tpu.BLOCK)


def one_thread(segment, hidden_block, row):
    """Makes one thread without hidden blocks of a row, so that its last block sees all others."""
    return segment.at[row].set(1), hidden_block.at[row].set(0)


@pytest.mark.parametrize("near", [2, 3])
def test_queries_far_from_their_keys(monkeypatch, near):
    keep_near(monkeypatch, near)
    kernel = jax.jit(lambda *x: with_gradients(interpreted, *x))
    for seed in range(3):
        q, k, v, *rows = inputs(seed, 900, 2)
        x = q, k, v, *one_thread(*rows, row=1)
        assert_equal(kernel(*x), with_gradients(attend_plainly, *x))


@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_transfers_of_far_queries_do_not_race(monkeypatch, capsys, mode):
    """A transfer happens as late, or as soon, as it may. Memory that nobody wrote is NaN."""
    keep_near(monkeypatch, 2)
    simulated = pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode)
    *x, _, _ = (part[:1] for part in inputs(6, 6 * 128, 1))
    x[0] = x[0][:, :, :1]
    # Both threads are longer than what stays in VMEM, and the second begins within a block.
    segment = jnp.repeat(jnp.asarray([[1, 2]]), jnp.asarray([450, 318]), axis=1)
    x = *x, segment, jnp.zeros_like(segment)
    got = with_gradients(lambda *x: attend_on_tpu(*x, simulated), *x)
    assert_equal(got, with_gradients(attend_plainly, *x))
    assert not capsys.readouterr().out  # It prints races, and transfers not waited for.


def test_equals_the_form_of_other_devices_in_bfloat16():
    q, k, v, *rows = inputs(5, 300, 2)
    x = *(part.astype(jnp.bfloat16) for part in (q, k, v)), *rows
    got_all, expected_all = (
        jax.jit(lambda *x, f=f: with_gradients(f, *x))(*x)
        for f in (interpreted, packed.attend_packed)
    )
    for got, expected in zip(got_all, expected_all, strict=True):
        assert got.dtype == expected.dtype
        difference = jnp.abs(got.astype(jnp.float32) - expected.astype(jnp.float32))
        assert difference.max() < 0.02 * jnp.abs(expected.astype(jnp.float32)).max()


@pytest.mark.parametrize("near", [2, 5])
def test_what_no_query_block_sees_is_not_read(monkeypatch, near):
    keep_near(monkeypatch, near)
    assert_only_what_is_seen_is_read(interpreted, packed_tpu.BLOCK)


def test_kernel_follows_platform_and_splits_over_a_mesh(monkeypatch):
    mesh = make_mesh(2, 2, 2)
    x = inputs(3, 90, 2)
    expected = with_gradients(attend_plainly, *x)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(packed, "attend_on_tpu", interpreted)
    assert_equal(jax.jit(lambda *x: with_gradients(packed.attend_packed, *x))(*x), expected)
    taken = []
    monkeypatch.setattr(packed, "attend_on_tpu", lambda *x: taken.append(1))
    assert_equal(
        jax.jit(lambda *x: with_gradients(lambda *y: packed.attend_packed(*y, mesh), *x))(*x),
        expected,
    )
    assert not taken  # The mesh's devices decide, not the default ones.


def test_blocks_to_read_by_hand():
    segment = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 0, 0], [1] * 12])
    first, last = block_range(segment, 2)
    np.testing.assert_array_equal(first, [[0, 0, 1, 1, 1, 5], [0] * 6])
    np.testing.assert_array_equal(last, [[1, 4, 4, 4, 4, 5], [5] * 6])


@pytest.mark.parametrize(
    ("length", "size"), [(1, 128), (512, 512), (4096, 512), (4608, 512), (520, 384), (1280, 512)]
)
def test_rows_are_cut_into_nearly_full_blocks(monkeypatch, length, size):
    monkeypatch.setattr(packed_tpu, "BLOCK", 512)
    assert packed_tpu.block_size(length) == size


@pytest.mark.parametrize("threads", [1, 4, 40_000, 131_072])
def test_a_row_of_131_072_columns_has_a_code_for_each_thread_and_block(threads):
    rng = np.random.default_rng(threads)
    thread = np.sort(np.append(np.arange(threads), rng.integers(0, threads, 131_072 - threads)))
    hidden_block = rng.integers(0, 2**15, 131_072)
    codes = token_codes(jnp.asarray(1 + thread[None]), jnp.asarray(hidden_block[None]))
    pairs = np.unique(thread * 2**15 + hidden_block)  # 64 bits
    assert len(np.unique(codes)) == len(pairs)
    assert len(np.unique(np.asarray(codes) & ~0x7FFF)) == threads


def test_a_row_too_long_for_the_codes_is_refused():
    x = jax.eval_shape(lambda: inputs(0, 8, 1))

    def abstract(length):
        return (
            jax.ShapeDtypeStruct(tuple(length if n == 8 else n for n in s.shape), s.dtype)
            for s in x
        )

    jax.eval_shape(interpreted, *abstract(131_072))
    with pytest.raises(ValueError, match="131073 columns: at most 131072"):
        jax.eval_shape(interpreted, *abstract(131_073))
