"""The cost model against a tree worked out by hand, against its bounds, and against steps that the
engine took.
"""

import dataclasses

import pytest
from helpers.puzzles import read_problems

from apr_jax.evaluate.cost import mean_steps, seconds_on, segments, steps_on
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.folder import read_traces
from apr_jax.evaluate.latency import measure_slots
from apr_jax.evaluate.runner import evaluate
from apr_jax.train.checkpoint import load_checkpoint

# A barely trained model, greedy, would not spawn.
DECODING = Decoding(temperature=1.0, forced=2, constrain=True)


def thread(thread_index, parent, spawn_round, start, end):
    return {
        "thread_index": thread_index,
        "parent": parent,
        "round": spawn_round,
        "start": start,
        "end": end,
    }


# The root writes 10 tokens, spawns children of 4, 6 and 2, writes 3, spawns one of 5, and writes 1.
TREE = {
    "threads": [
        thread(0, -1, 0, 0, 25),
        thread(1, 0, 0, 10, 14),
        thread(2, 0, 0, 10, 16),
        thread(3, 0, 0, 10, 12),
        thread(4, 0, 1, 19, 24),
    ],
    "total_tokens": 31,
    "sequential_tokens": 25,
}
# A child that spawns: root 2 + 1, child 3 + 1 with two grandchildren of 4 and 1.
NESTED = {
    "threads": [
        thread(0, -1, 0, 0, 11),
        thread(1, 0, 0, 2, 10),
        thread(2, 1, 0, 5, 9),
        thread(3, 1, 0, 5, 6),
    ],
    "total_tokens": 12,
    "sequential_tokens": 11,
}


def test_segments():
    assert segments(TREE) == {
        0: [(10, [1, 2, 3]), (3, [4]), (1, [])],
        1: [(4, [])],
        2: [(6, [])],
        3: [(2, [])],
        4: [(5, [])],
    }
    assert segments(NESTED)[1] == [(3, [2, 3]), (1, [])]


def test_steps():
    # On two decode slots the children of 4 and 6 begin; the one of 2 follows the one of 4: all end
    # at 6.
    assert [steps_on(TREE, slots) for slots in (1, 2, 3, 9)] == [31, 25, 25, 25]
    assert [steps_on(NESTED, slots) for slots in (1, 2)] == [12, 11]
    assert mean_steps([TREE, NESTED], [1, 2]) == [21.5, 18.0]


def test_seconds_interpolate_between_measured_steps():
    assert seconds_on([TREE], [1, 2, 3], {1: 0.1, 3: 0.3}) == pytest.approx([3.1, 5.0, 7.5])


@pytest.mark.slow
def test_real_trees(checkpoint, data_dir, tmp_path):
    """From one decode slot to one a thread the model gives the tree's own totals; the engine took
    as many steps as it says.
    """
    restored = load_checkpoint(checkpoint)
    problems = read_problems(data_dir / "test.jsonl")[:12]
    limits = dataclasses.replace(restored.config.limits, max_threads=3, children=2)
    restored = dataclasses.replace(
        restored, config=dataclasses.replace(restored.config, limits=limits)
    )
    evaluate(restored, problems, tmp_path, DECODING, progress=False)
    traces = read_traces(tmp_path / "traces.jsonl")
    assert sum(len(trace["threads"]) > 1 for trace in traces) > 1
    for trace in traces:
        for one in trace["threads"]:
            assert sum(steps for steps, _ in segments(trace)[one["thread_index"]]) == one["tokens"]
        assert steps_on(trace, 1) == trace["total_tokens"]
        assert steps_on(trace, len(trace["threads"])) == trace["sequential_tokens"]
    rows = measure_slots(restored, problems, tmp_path, DECODING, 1)["rows"]
    assert [row["slots"] for row in rows] == [1, 2, 3]
    assert rows[0]["steps"] == mean_steps(traces, [1])[0]
    assert rows[-1]["steps"] == pytest.approx(mean_steps(traces, [3])[0])
