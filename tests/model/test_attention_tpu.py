"""The TPU kernels equal the naive twin on random packings (interpreted on CPU;
tests/end_to_end/test_tpu.py compiles them).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention import (
    assert_equal,
    assert_only_what_is_seen_is_read,
    inputs,
    with_gradients,
)

from apr_jax.model.attention import packed, packed_tpu
from apr_jax.model.attention.packed_tpu import attend_on_tpu, block_range
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


def test_what_no_query_block_sees_is_not_read():
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


def test_a_row_too_long_for_the_codes_is_refused():
    x = jax.eval_shape(lambda: inputs(0, 8, 1))
    q, k, v, *rows = (
        jax.ShapeDtypeStruct(tuple(1 << 15 if n == 8 else n for n in s.shape), s.dtype) for s in x
    )
    with pytest.raises(ValueError, match="32768"):
        jax.eval_shape(interpreted, q, k, v, *rows)
