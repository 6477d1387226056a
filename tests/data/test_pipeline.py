"""The pipeline: nothing lost or doubled, shards disjoint, epochs reshuffled, and a resume that
nobody can tell.
"""

import collections
import json
import shutil
import threading

import numpy as np
import pytest
from helpers.small_data import small

from apr_jax.data import dataset, packing, pipeline
from apr_jax.data.demonstrate import unflatten
from apr_jax.data.packing import Rows, padding_share
from apr_jax.data.pipeline import LocalRows, sft_batches, steps_of_an_epoch
from apr_jax.errors import UsageError, UserError

ROWS = 4
LENGTH = small().limits.max_thread_tokens
FIELDS = ("tokens", "position", "hidden_block", "sampled")


def threads_of(rows: Rows) -> list[bytes]:
    """The contents of every thread in a batch."""
    found = []
    for row in range(rows.tokens.shape[0]):
        for number in range(1, rows.segment[row].max() + 1):
            at = rows.segment[row] == number
            found.append(
                b"|".join(
                    getattr(rows, name)[row, at].astype(np.int32).tobytes() for name in FIELDS
                )
            )
    return found


def stored(
    data_dir, method: str, split: str = "train", part: slice = slice(None)
) -> collections.Counter:
    source = dataset.read(data_dir, method, split)
    return collections.Counter(
        b"|".join(getattr(stream, name).astype(np.int32).tobytes() for name in FIELDS)
        for k in range(len(source))[part]
        for stream in unflatten(source[k])
    )


def assert_equal(one: Rows, other: Rows) -> None:
    for name, field in vars(one).items():
        np.testing.assert_array_equal(field, getattr(other, name), err_msg=name)


@pytest.mark.parametrize("rows", [1, ROWS, 30])
def test_epochs_hold_every_thread_as_often_as_they_should(data_dir, rows):
    batches = list(sft_batches(data_dir, "apr", rows, LENGTH, seed=0, epochs=3))
    seen = collections.Counter(thread for batch in batches for thread in threads_of(batch))
    once = stored(data_dir, "apr")
    assert seen == collections.Counter({thread: 3 * count for thread, count in once.items()})
    for batch in batches:
        assert batch.tokens.shape == (rows, LENGTH)
        assert all(
            field.flags.writeable and field.flags.c_contiguous for field in vars(batch).values()
        )


def test_batches_are_well_filled(data_dir):
    *full, _ = sft_batches(data_dir, "apr", 24, LENGTH, seed=0, epochs=3)
    assert len(full) > 10
    assert np.mean([padding_share(batch) for batch in full]) < 0.06


@pytest.mark.parametrize("method", ["apr", "sos+"])
def test_first_batches_tell_the_steps_of_an_epoch(data_dir, method):
    *full, _ = sft_batches(data_dir, method, ROWS, LENGTH, seed=0, epochs=3)
    assert steps_of_an_epoch(data_dir, method, ROWS, LENGTH, seed=0) == pytest.approx(
        len(full) / 3, rel=0.03
    )
    # Two streams of two rows each take the steps of one of four.
    shared = steps_of_an_epoch(data_dir, method, ROWS, LENGTH, seed=0, streams=2)
    assert shared == pytest.approx(len(full) / 3, rel=0.08)


def test_batches_are_ready_before_they_are_asked_for(data_dir, monkeypatch):
    """While the device computes on one, so many more are packed, and no further: memory must not
    grow.
    """
    packed = threading.Semaphore(0)

    def scatter(*arguments):
        rows = packing.scatter(*arguments)
        packed.release()
        return rows

    monkeypatch.setattr(pipeline, "scatter", scatter)
    batches = sft_batches(data_dir, "apr", ROWS, LENGTH, seed=0)
    try:
        next(batches)
        for _ in range(1 + pipeline._READY):
            assert packed.acquire(timeout=30)
        # One may wait for a place among those that are ready.
        assert not packed.acquire(timeout=1) or not packed.acquire(timeout=1)
    finally:
        batches.close()


def test_trees_are_told_apart_within_a_batch(data_dir):
    """The threads of a tree share a number, and only they: the root's children are those whose
    messages it sends.
    """
    for batch in sft_batches(data_dir, "apr", ROWS, LENGTH, seed=0, epochs=3):
        numbers = np.unique(batch.tree[batch.tree >= 0])
        # Also where a tree has nothing but waiting threads.
        assert numbers.tolist() == list(range(len(numbers)))
    batch = next(sft_batches(data_dir, "apr", 24, LENGTH, seed=0))
    numbers = np.unique(batch.tree[batch.tree >= 0])
    source = dataset.read(data_dir, "apr", "train")
    tree_of = {}
    for k in range(len(source)):
        for stream in unflatten(source[k]):
            tree_of.setdefault(stream.tokens.tobytes(), set()).add(k)
    common = {}
    for row in range(24):
        for number in range(1, batch.segment[row].max() + 1):
            at = batch.segment[row] == number
            (tree,) = set(batch.tree[row, at].tolist())
            owners = tree_of[batch.tokens[row, at].tobytes()]
            common[tree] = common.get(tree, owners) & owners
    assert all(common.values())
    assert len(set().union(*common.values())) == len(numbers)


@pytest.mark.parametrize("method", ["apr", "sos+"])
@pytest.mark.parametrize("taken", [0, 1, 7, 23])
def test_a_resumed_iterator_goes_on_bit_for_bit(data_dir, method, taken):
    unbroken = sft_batches(data_dir, method, ROWS, LENGTH, seed=1)
    for _ in range(taken):
        next(unbroken)
    state = json.loads(json.dumps(unbroken.get_state()))
    resumed = sft_batches(data_dir, method, ROWS, LENGTH, seed=1)
    for _ in range(3):
        next(resumed)  # Whatever it did before is forgotten.
    resumed.set_state(state)
    assert resumed.get_state() == unbroken.get_state()
    for _ in range(60):  # More than an epoch.
        assert_equal(next(unbroken), next(resumed))
    assert resumed.get_state() == unbroken.get_state()


def test_the_state_stays_small_and_some_threads_wait(data_dir):
    batches = sft_batches(data_dir, "apr", ROWS, LENGTH, seed=0)
    waited = 0
    for _ in range(80):
        next(batches)
        state = batches.get_state()
        waited += bool(state["waiting"][0])
        assert len(json.dumps(state)) < 1500
    assert waited > 40  # The tests above would show nothing otherwise.


def test_streams_share_the_trees(data_dir):
    whole = stored(data_dir, "apr")
    parts = [
        collections.Counter(
            thread
            for batch in sft_batches(
                data_dir, "apr", ROWS, LENGTH, 0, stream=p, streams=3, epochs=1
            )
            for thread in threads_of(batch)
        )
        for p in range(3)
    ]
    for p, part in enumerate(parts):
        assert part == stored(data_dir, "apr", part=slice(p, None, 3))
    assert sum(parts, collections.Counter()) == whole


@pytest.mark.thorough
@pytest.mark.parametrize("streams", [1, 2, 4, 8])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batch_does_not_depend_on_number_of_processes(data_dir, streams, processes):
    def held(process: int, of: int) -> LocalRows:
        rows = range(8 * process // of, 8 * (process + 1) // of)
        return LocalRows(
            lambda s: sft_batches(data_dir, "apr", 8 // streams, LENGTH, 0, s, streams),
            streams,
            8,
            rows,
        )

    def together(parts: list[LocalRows]) -> Rows:
        batches = [next(part) for part in parts]
        return Rows(
            **{
                name: np.concatenate([vars(batch)[name] for batch in batches])
                for name in vars(batches[0])
            }
        )

    whole = held(0, 1)
    parts = [held(process, processes) for process in range(processes)]
    for _ in range(3):
        assert_equal(next(whole), together(parts))
    opened = sum(len(part.get_state()) for part in parts)
    assert opened == max(streams, processes), "a process reads the streams of its own rows alone"
    # What some processes saved, any number of others goes on from.
    states = {stream: state for part in parts for stream, state in part.get_state().items()}
    assert sorted(states) == [str(stream) for stream in range(streams)]
    resumed = held(0, 1)
    resumed.set_state(json.loads(json.dumps(states)))
    batch = next(whole)
    assert_equal(batch, next(resumed))
    trees = [set(part.tree[part.tree >= 0].tolist()) for part in _cut(batch, streams)]
    assert len(set().union(*trees)) == sum(map(len, trees)), "streams share no tree"


def _cut(batch: Rows, count: int) -> list[Rows]:
    return [
        Rows(**{name: np.split(field, count)[k] for name, field in vars(batch).items()})
        for k in range(count)
    ]


def test_each_epoch_and_each_seed_has_its_own_order(data_dir):
    total = sum(stored(data_dir, "sos").values())

    def order(seed: int) -> list[bytes]:
        return [
            t
            for batch in sft_batches(data_dir, "sos", 1, LENGTH, seed, epochs=2)
            for t in threads_of(batch)
        ]

    once = order(0)
    assert once == order(0)
    assert once != order(1)
    first = once[:total]
    second = once[total:]
    assert first != second
    # Epochs touch where a batch holds threads of both.
    assert len(set(first) & set(second)) > 0.9 * total


def test_validation_goes_once_over_its_own_split(data_dir):
    batches = list(sft_batches(data_dir, "sos+", ROWS, LENGTH, 0, split="validation", epochs=1))
    seen = collections.Counter(thread for batch in batches for thread in threads_of(batch))
    assert seen == stored(data_dir, "sos+", "validation")


def test_users_mistakes(data_dir, tmp_path):
    with pytest.raises(
        UserError, match=r"no readable train demonstrations of method 'apr'.*apr data build"
    ):
        sft_batches(tmp_path, "apr", ROWS, LENGTH, 0)
    with pytest.raises(
        UsageError, match=r"length=50 must be at least \d+, the longest train thread of 'apr'"
    ):
        sft_batches(data_dir, "apr", ROWS, 50, 0)
    with pytest.raises(UsageError, match="rows=0 must be at least 1"):
        sft_batches(data_dir, "apr", 0, LENGTH, 0)
    with pytest.raises(UsageError, match=r"\d+ train demonstrations are too few for 1000 streams"):
        sft_batches(data_dir, "apr", ROWS, LENGTH, 0, streams=1000)


def test_flipped_bit_ends_iteration_and_names_the_file(data_dir, tmp_path):
    """Where it is read, which may be hours into a training; every other demonstration still can
    be.
    """
    shutil.copytree(data_dir, tmp_path / "data")
    (file,) = dataset.directory(tmp_path / "data", "apr").glob("*train*")
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    with pytest.raises(
        UserError,
        match=r"demonstration \d+ is damaged \(\w+\); delete .* and run `apr data build` again",
    ) as error:
        for _ in sft_batches(tmp_path / "data", "apr", ROWS, LENGTH, 0, epochs=1):
            pass
    assert str(error.value).startswith(f"{file}: ")


def test_a_closed_iterator_says_so(data_dir):
    batches = sft_batches(data_dir, "apr", ROWS, LENGTH, 0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="is closed"):
        next(batches)
