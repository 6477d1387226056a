"""Blockwise attention equals its naive twin on random packings, and does not hold what the naive
one holds.
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

from apr_jax.model.attention import packed
from apr_jax.model.attention.packed import attend_packed, first_blocks, visible
from apr_jax.model.attention.plain import attend_plainly
from apr_jax.model.sharding import make_mesh


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(1, marks=pytest.mark.thorough),
        pytest.param(9, marks=pytest.mark.slow),
        64,
        65,
        pytest.param(200, marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_equals_the_naive_twin_on_random_packings(length, groups):
    blockwise = jax.jit(lambda *x: with_gradients(attend_packed, *x))
    for seed in range(3):
        x = inputs(seed, length, groups)
        assert_equal(blockwise(*x), with_gradients(attend_plainly, *x))


@pytest.mark.thorough
def test_groups_together_as_on_an_accelerator(monkeypatch):
    """The batched form, which CPUs do not take."""
    choose = jax.lax.platform_dependent
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    x = inputs(7, 200, 2)
    together = with_gradients(attend_packed, *x)
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    assert_equal(together, with_gradients(attend_plainly, *x))


@pytest.mark.parametrize("together", [False, True])
def test_what_no_query_block_sees_is_not_read(together, monkeypatch):
    if together:
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    assert_only_what_is_seen_is_read(attend_packed, packed.BLOCK)


@pytest.mark.parametrize("axes", [(4, 1, 1), (1, 2, 2), (2, 1, 4), (1, 4, 2)])
def test_split_over_a_mesh(axes):
    mesh = make_mesh(*axes)
    x = inputs(3, 90, 2)
    split = jax.jit(lambda *x: with_gradients(lambda *y: attend_packed(*y, mesh), *x))
    assert_equal(split(*x), with_gradients(attend_plainly, *x))


def test_a_device_works_on_its_own_rows():
    """No collective: without the mesh XLA gathers all rows for the loop."""
    mesh = make_mesh(4, 2)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    x = jax.device_put([jnp.concatenate([part, part]) for part in inputs(3, 90, 2)], rows)

    def text(*mesh):
        return (
            jax.jit(lambda *x: with_gradients(lambda *y: attend_packed(*y, *mesh), *x))
            .lower(*x)
            .compile()
            .as_text()
        )

    assert "all-gather" not in text(mesh) and "all-reduce" not in text(mesh)
    assert "all-gather" in text()


@pytest.mark.parametrize(("heads", "together"), [(1, False), (8, False), (1, True)])
def test_nothing_of_length_squared_is_held(heads, together, monkeypatch):
    if together:
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cpu, default: default(*x))
    length = 4096
    shapes = [(1, length, heads, 16), (1, 1, length, 16), (1, 1, length, 16)]
    x = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes] + [
        jax.ShapeDtypeStruct((1, length), jnp.int32)
    ] * 2

    def held(attend):
        program = jax.jit(lambda *x: with_gradients(attend, *x)).lower(*x).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert held(attend_packed) < 4 * length * length / 4
    assert held(attend_plainly) > 4 * length * length * heads


def test_blocks_to_read_by_hand():
    segment = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 0, 0, 0, 0], [1] * 12 + [0] * 2])
    np.testing.assert_array_equal(
        first_blocks(segment, 2), [[0, 0, 1, 1, 1, 5, 6], [0, 0, 0, 0, 0, 0, 6]]
    )


@pytest.mark.parametrize(("length", "size"), [(1, 1), (64, 64), (65, 33), (240, 60), (1024, 64)])
def test_rows_are_cut_into_nearly_full_blocks(length, size):
    assert packed._block_size(length) == size


def test_visibility_by_hand():
    column = jnp.arange(6)
    segment, hidden_block = jnp.asarray([1, 1, 1, 1, 2, 0]), jnp.asarray([0, 1, 1, 0, 0, 0])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],  # After the hidden block: it is hidden.
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(
        visible(segment, hidden_block, column, segment, hidden_block, column),
        np.asarray(expected, bool),
    )
    later = visible(
        segment[3:], hidden_block[3:], column[3:], segment[:3], hidden_block[:3], column[:3]
    )
    np.testing.assert_array_equal(later, np.asarray(expected, bool)[3:, :3])
