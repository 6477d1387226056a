"""Packing: every token once and whole, no overlap, little padding; fast paths against naive
ones.
"""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.data.encode import ThreadTokens
from apr_jax.data.packing import (
    Rows,
    pack_forest,
    pack_marked_forest,
    pack_trees,
    padding_share,
    place,
)

LENGTH = 12
trees_of_lengths = st.lists(
    st.lists(st.integers(1, LENGTH), min_size=1, max_size=5), min_size=1, max_size=8
)


def stream_of(size: int, start: int) -> ThreadTokens:
    """A stream whose every token is different from those of all others."""
    tokens = np.arange(start, start + size, dtype=np.int32)
    return ThreadTokens(tokens, tokens % 7, tokens % 3, tokens % 2 == 0, -1, 0, 0, 0)


def make_trees(sizes: list[list[int]]) -> list[list[ThreadTokens]]:
    start = 1
    trees = []
    for tree in sizes:
        trees.append([])
        for size in tree:
            trees[-1].append(stream_of(size, start))
            start += size
    return trees


def unpacked(rows: Rows) -> list[tuple[int, tuple]]:
    """(tree, columns) of each segment, after checking that segments are unbroken and padding is
    blank.
    """
    found = []
    blank = rows.segment == 0
    for name, value in (
        ("tokens", 0),
        ("position", 0),
        ("hidden_block", 0),
        ("sampled", 0),
        ("tree", -1),
        ("logprob", 0),
    ):
        assert (getattr(rows, name)[blank] == value).all(), name
    for row in range(rows.tokens.shape[0]):
        segment = rows.segment[row]
        for number in range(1, segment.max(initial=0) + 1):
            at = np.flatnonzero(segment == number)
            assert len(at)
            np.testing.assert_array_equal(np.diff(at), 1)
            record = SimpleNamespace(**{name: field[row, at] for name, field in vars(rows).items()})
            (tree,) = set(record.tree.tolist())
            found.append((tree, columns(record, record.logprob)))
    return sorted(found)


def expected(trees: list[list[ThreadTokens]]) -> list[tuple[int, tuple]]:
    return sorted(
        (index, columns(stream, np.zeros(len(stream.tokens))))
        for index, t in enumerate(trees)
        for stream in t
    )


def columns(record: Any, logprob: np.ndarray) -> tuple:
    """One tuple a token."""
    fields = [
        getattr(record, name).tolist() for name in ("tokens", "position", "hidden_block", "sampled")
    ]
    return tuple(zip(*fields, logprob.tolist(), strict=True))


@given(trees_of_lengths)
def test_every_thread_is_there_once_and_whole(sizes):
    trees = make_trees(sizes)
    rows = pack_trees(trees, LENGTH)
    assert unpacked(rows) == expected(trees)
    total = sum(map(sum, sizes))
    # First fit leaves at most one row that is not more than half full.
    assert rows.tokens.shape[0] <= 2 * total // LENGTH + 1
    assert padding_share(rows) == pytest.approx(1 - total / rows.tokens.size)


def naive_place(lengths: list[int], length: int, rows: int, first: int) -> list[tuple[int, int]]:
    """First fit, one thread after the other, row after row."""
    order = list(range(min(first, len(lengths)))) + sorted(
        range(first, len(lengths)), key=lambda k: -lengths[k]
    )
    used = [0] * rows
    placed = [(-1, -1)] * len(lengths)
    for k in order:
        for row in range(rows):
            if used[row] + lengths[k] <= length:
                placed[k] = (row, used[row])
                used[row] += lengths[k]
                break
    return placed


@given(st.lists(st.integers(1, LENGTH), max_size=20), st.integers(1, 6), st.integers(0, 20))
def test_place_is_first_fit_decreasing_after_those_who_wait(lengths, rows, first):
    placement = place(np.array(lengths, np.uint16), LENGTH, rows, first)
    placed = list(zip(placement.row.tolist(), placement.column.tolist(), strict=True))
    assert placed == naive_place(lengths, LENGTH, rows, first)
    assert placement.rows == len({row for row, _ in placed if row >= 0})
    if first and lengths:
        assert placed[0] == (0, 0)  # The longest wait ends.


def random_forest(
    rng: np.random.Generator, trees: int, max_threads: int, length: int
) -> SimpleNamespace:
    """Random streams in some threads, and rubbish in the columns beyond, which must not be read."""
    shape = trees, max_threads, length
    used = rng.random((trees, max_threads)) < 0.6
    return SimpleNamespace(
        tokens=rng.integers(1, 30, shape, dtype=np.int32),
        position=rng.integers(0, length, shape, dtype=np.int32),
        hidden_block=rng.integers(0, 3, shape, dtype=np.int32),
        sampled=rng.random(shape) < 0.5,
        logprob=-rng.random(shape, dtype=np.float32),
        allowed=rng.integers(0, 128, shape, dtype=np.uint8),
        length=np.where(used, rng.integers(1, length + 1, (trees, max_threads)), 0).astype(
            np.int32
        ),
    )


@pytest.mark.parametrize("seed", range(5))
def test_pack_forest_against_the_slots_one_by_one(seed):
    forest = random_forest(np.random.default_rng(seed), trees=5, max_threads=4, length=9)
    rows = pack_forest(forest, rows=3, length=LENGTH)
    max_threads = []
    for tree, thread_index in np.argwhere(forest.length > 0).tolist():
        part = tree, thread_index, slice(forest.length[tree, thread_index])
        record = SimpleNamespace(
            **{name: field[part] for name, field in vars(forest).items() if field.ndim == 3}
        )
        max_threads.append((tree, columns(record, record.logprob)))
    assert unpacked(rows) == sorted(max_threads)
    assert rows.tokens.shape[0] in (3, 6, 12, 24)
    dtypes = {name: getattr(rows, name).dtype for name in vars(rows)}
    assert dtypes.pop("sampled") == np.bool_
    assert dtypes.pop("logprob") == np.float32
    assert dtypes.pop("allowed") == np.uint8
    assert set(dtypes.values()) == {np.dtype(np.int32)}


@pytest.mark.parametrize("seed", range(3))
def test_marks_stand_where_their_tokens_do(seed):
    forest = random_forest(np.random.default_rng(seed), trees=5, max_threads=4, length=9)
    rows, marks = pack_marked_forest(forest, forest.tokens % 3 == 1, rows=3, length=LENGTH)
    np.testing.assert_array_equal(marks, (rows.tokens % 3 == 1) & (rows.segment > 0))
    assert 0 < marks.sum() < (rows.segment > 0).sum()
    jax.tree.map(np.testing.assert_array_equal, rows, pack_forest(forest, 3, LENGTH))


def test_trees_of_a_part_of_a_batch_keep_their_numbers():
    forest = random_forest(np.random.default_rng(0), trees=3, max_threads=4, length=9)
    numbers = np.array([2, 5, 9])
    rows = pack_forest(forest, rows=3, length=LENGTH)
    part, _ = pack_marked_forest(forest, None, rows=3, length=LENGTH, trees=numbers)
    np.testing.assert_array_equal(part.tree, np.where(rows.tree < 0, -1, numbers[rows.tree]))
    assert {2, 9} <= set(part.tree.flat)


def test_row_counts_come_in_buckets():
    forest = random_forest(np.random.default_rng(0), trees=7, max_threads=1, length=LENGTH)
    for used, rows in ((0, 2), (1, 2), (2, 2), (3, 4), (5, 8)):
        forest.length[:] = np.where(np.arange(7) < used, LENGTH, 0)[:, None]
        assert pack_forest(forest, rows=2, length=LENGTH).tokens.shape == (rows, LENGTH)


def test_what_cannot_fit_is_named():
    forest = random_forest(np.random.default_rng(0), trees=3, max_threads=2, length=9)
    forest.length[:] = 4
    forest.length[1, 1] = 9
    with pytest.raises(ValueError, match="thread index 1 of tree 1 has 9 tokens, a row holds 8"):
        pack_forest(forest, rows=1, length=8)
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        pack_forest(forest, rows=0, length=9)
    with pytest.raises(ValueError, match="thread 1 has 13 tokens, a row holds 12"):
        pack_trees(make_trees([[3, 13]]), LENGTH)
    with pytest.raises(ValueError, match="24 tokens do not fit into 1 rows of 12"):
        pack_trees(make_trees([[12, 12]]), LENGTH, rows=1)


def test_rows_are_a_pytree():
    rows = pack_trees(make_trees([[2, 3], [4]]), LENGTH, rows=2)
    doubled = jax.tree.map(lambda field: np.concatenate([field, field]), rows)
    assert isinstance(doubled, Rows)
    assert doubled.tokens.shape == (4, LENGTH)
