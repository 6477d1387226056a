"""Trees that several processes hold become the rows of one update: each token once, in the rows of
a process that holds its tree.

The processes are simulated: each packs its part of one forest.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers.recorded import LIMITS, TREES, record
from helpers.whole_runs import changed
from hypothesis import given
from hypothesis import strategies as st

from apr_jax.data.packing import pack_forest
from apr_jax.model.sharding import make_mesh
from apr_jax.train.distributed import HeldRows
from apr_jax.train.rl.objective import token_weights
from apr_jax.train.rl.packed_trees import (
    Moves,
    given_rows,
    move_rows,
    pack_held_trees,
    taken_rows,
)
from apr_jax.train.step import most_chunks

LENGTH = LIMITS.max_thread_tokens
SIZE = 4  # Rows of a chunk.

# Name -> the trees and the rows of a chunk that each process holds.
HELD = {
    "one process": ([range(TREES)], [range(SIZE)]),
    "two processes": ([range(4), range(4, 6)], [range(2), range(2, 4)]),
    "unlike processes": ([range(4), range(4, 6)], [range(1), range(1, 4)]),
    "one without trees": ([range(6), range(0)], [range(2), range(2, 4)]),
    "a share of both": ([range(4), range(2, 6)], [range(3), range(1, 4)]),
}


def _held(count, parts):
    return HeldRows(count, tuple(np.array(part, np.int64) for part in parts))


@pytest.fixture(params=HELD)
def packed(request, monkeypatch):
    """The packed trees of each process, and which trees and rows each holds; some tokens are
    marked.
    """
    trees = _held(TREES, HELD[request.param][0])
    rows = _held(SIZE, HELD[request.param][1])
    forest = record()
    older = forest.sampled & (forest.tokens % 2 == 1)
    processes = [
        (held, held.owned, _chunks(held))
        for held in _pack_in_each(forest, older, trees, rows, monkeypatch)
    ]
    return processes, trees, rows


def _pack_in_each(forest, older, trees, rows, monkeypatch):
    """What each process packs, one after the other; this is that process meanwhile."""
    for process, mine in enumerate(trees.by_process):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        own = jax.tree.map(lambda x, mine=mine: x[mine], forest)
        marks = None if older is None else older[mine]
        yield pack_held_trees(own, marks, fresh(trees), fresh(rows), LENGTH)


def _chunks(held):
    """The number of chunks in which rows of a process hold tokens."""
    return -(-held.used // len(held.chunk_rows.mine))


def fresh(held):
    """The same for another process: what is cached is of one."""
    return dataclasses.replace(held)


def _threads(rows, chosen=slice(None)):
    """Each packed thread, as (tree, tokens, positions, log-probs)."""
    found = []
    for row in range(len(rows.tokens))[chosen]:
        for segment in range(1, rows.segment[row].max(initial=0) + 1):
            at = rows.segment[row] == segment
            (tree,) = set(rows.tree[row, at].tolist())
            fields = (rows.tokens, rows.position, rows.logprob)
            found.append((tree, *(tuple(field[row, at].tolist()) for field in fields)))
    return sorted(found)


def test_each_thread_is_owned_by_one_process(packed):
    processes, _, _ = packed
    whole = pack_forest(record(), SIZE, LENGTH)
    together = [thread for _, owned, _ in processes for thread in _threads(owned)]
    assert sorted(together) == _threads(whole)


def test_a_process_packs_its_own_trees_alone(packed):
    processes, trees, rows = packed
    for (held, _, chunks), mine, own in zip(
        processes, trees.by_process, rows.by_process, strict=True
    ):
        assert set(np.unique(held.rows.tree)) <= {-1, *mine}
        assert len(held.rows.tokens) % len(own) == 0
        assert not held.rows.segment[chunks * len(own) :].any()
        np.testing.assert_array_equal(held.older, held.rows.sampled & (held.rows.tokens % 2 == 1))


def test_processes_agree_on_rows_that_several_hold(packed):
    """Each lays them on its own devices, which compute them in step."""
    processes, _, rows = packed
    chunks = max(chunks for _, _, chunks in processes)

    def rows_of(number, name):
        found = []
        for (held, _, _), own in zip(processes, rows.by_process, strict=True):
            if number in own:
                mine = vars(held.rows)[name][list(own).index(number) :: len(own)]
                blank = -1 if name == "tree" else 0
                missing = max(0, chunks - len(mine))
                padded = np.pad(mine, ((0, missing), (0, 0)), constant_values=blank)
                found.append(padded[:chunks])
        return found

    for number in range(SIZE):
        for name in ("tokens", "tree", "position", "sampled"):
            first, *others = rows_of(number, name)
            for other in others:
                np.testing.assert_array_equal(first, other)


def test_rows_that_several_hold_are_owned_by_turns():
    """Otherwise the first of them would do the work of all."""
    held = _held(8, [range(6), range(2, 8), range(4, 8)])
    assert held.owner.tolist() == [0, 0, 0, 1, 1, 2, 1, 2]


@pytest.mark.parametrize("aggregation", ["tree", "token", "sequence"])
def test_weights_of_parts_are_those_of_the_whole(packed, aggregation):
    """What divides is counted over all trees, also over those of other processes."""
    processes, _, _ = packed
    forest = record()
    counted = np.arange(TREES) != 1
    whole = pack_forest(forest, SIZE, LENGTH)
    expected = token_weights(whole, counted, aggregation, 5.0)
    counts = {
        "tokens": int(forest.total_tokens[counted].sum()),
        "threads": int(forest.sampled.any(axis=2)[counted].sum()),
    }
    got = [
        (owned, token_weights(owned, counted, aggregation, 5.0, **counts))
        for _, owned, _ in processes
    ]

    def by_tree(rows, weights):
        return np.bincount(rows.tree[rows.segment > 0], weights[rows.segment > 0], TREES)

    total = sum(by_tree(*each) for each in got)
    np.testing.assert_allclose(total, by_tree(whole, expected), rtol=1e-12)
    assert total[0] > 0
    assert total[1] == 0


def test_rows_are_enough_for_the_shards_with_most_trees(config, monkeypatch):
    """Six trees over four shards: three have two of them and one has none, and every thread fills a
    row.
    """
    rl = {"problems": 3, "group": 2, "micro_batch_rows": 4}
    settings = changed(config, rl=rl, limits=LIMITS)
    trees = _held(TREES, [range(2), range(2, 4), range(4, 6), range(0)])
    rows = _held(SIZE, [[row] for row in range(SIZE)])
    forest = record()
    full = dataclasses.replace(forest, length=np.full_like(forest.length, LENGTH))
    chunks = [_chunks(held) for held in _pack_in_each(full, None, trees, rows, monkeypatch)]
    most = 2 * LIMITS.max_threads
    assert chunks == [most, most, most, 0]
    assert most_chunks(settings, make_mesh(4)) == most
    assert most_chunks(settings, make_mesh(1)) < most


SEPARATE = {name: parts for name, parts in HELD.items() if name != "a share of both"}


@pytest.mark.parametrize("name", SEPARATE)
def test_processes_with_many_rows_give_some_away(name, monkeypatch):
    """All need as many chunks as the rows fill together; every thread stays whole and is there
    once.
    """
    trees, rows = (_held(*each) for each in zip((TREES, SIZE), SEPARATE[name], strict=True))
    forest = record()
    older = forest.sampled & (forest.tokens % 2 == 1)
    before = list(_pack_in_each(forest, older, trees, rows, monkeypatch))
    moves = Moves.of([held.used for held in before], rows)
    if not any(moves.gives):
        assert name == "one process"
        assert move_rows(before[0], moves) is before[0]
        return

    all_given = []
    for process, held in enumerate(before):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        all_given.append(given_rows(held, moves))
    everyone = jax.tree.map(lambda *parts: np.stack(parts), *all_given)
    threads = []
    for process, held in enumerate(before):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        after = taken_rows(held, moves, everyone)
        assert after.rows.tokens.shape == (moves.chunks * len(rows.by_process[process]), LENGTH)
        assert after.rows.tree.min() == -1 or (after.rows.segment > 0).all()
        assert not after.rows.segment[after.rows.tree < 0].any()
        assert after.older.dtype == np.bool_
        np.testing.assert_array_equal(
            after.older, after.rows.sampled & (after.rows.tokens % 2 == 1)
        )
        threads += _threads(after.rows)
    assert sorted(threads) == _threads(pack_forest(forest, SIZE, LENGTH))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 5)), min_size=1, max_size=8),
)
def test_no_more_chunks_than_the_rows_of_all_processes_fill(processes):
    used = [rows for rows, _ in processes]
    bounds = np.cumsum([0, *(held for _, held in processes)])
    chunk_rows = _held(int(bounds[-1]), [range(*pair) for pair in itertools.pairwise(bounds)])
    moves = Moves.of(used, chunk_rows)
    assert sum(moves.gives) == sum(moves.takes)
    assert moves.chunks == -(-sum(used) // chunk_rows.count)
    for rows, (_, held), give, take in zip(used, processes, moves.gives, moves.takes, strict=True):
        assert 0 <= rows - give + take <= moves.chunks * held
        assert not (give and take)


def test_rows_that_processes_share_stay_where_they_are():
    chunk_rows = _held(SIZE, HELD["a share of both"][1])
    assert Moves.of([7, 2], chunk_rows) == Moves(3, (0, 0), (0, 0))
