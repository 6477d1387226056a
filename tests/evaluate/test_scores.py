"""Scores against figures worked out by hand."""

import pytest

from apr_jax.data.statistics import wilson
from apr_jax.evaluate.scores import accuracy_within, consensus, summarize, warnings
from apr_jax.tasks.countdown.task import canonical

RIGHT = ["22+26=48", "48-2=46"]
SWAPPED = ["26+22=48", "48-2=46"]
WRONG = ["22*2=44", "44+26=70"]


def trace(name, sample, correct, solution=None, status="DONE", **measures):
    measures = {
        "total_tokens": 10,
        "sequential_tokens": 5,
        "children": 1,
        "max_thread_tokens": 4,
    } | measures
    threads = [{"status": status}]
    claimed = solution is not None
    return (
        {
            "id": name,
            "sample": sample,
            "correct": correct,
            "reward": float(bool(correct)),
            "claimed": claimed,
            "vote": ",".join(canonical(solution)) if claimed else None,
        }
        | measures
        | {"threads": threads}
    )


def test_summary_of_single_answers():
    summary = summarize(
        [
            trace("a", 0, True, RIGHT, total_tokens=30),
            trace("b", 0, False, WRONG),
            trace("c", 0, False, status="OUT_OF_WINDOW", children=0),
            trace("d", 0, True, RIGHT, total_tokens=50),
        ]
    )
    assert (summary["accuracy"], summary["n"], summary["samples"]) == (0.5, 4, 1)
    assert summary["ci95"] == list(wilson(2, 4))
    assert (summary["total_tokens"], summary["claimed"], summary["truncated"]) == (25, 0.75, 0.25)
    assert summary["spawned"] == 0.75
    assert "pass_at_n" not in summary


def test_pass_and_consensus_over_samples():
    """Problem a: two of three agree on the right one; b: one lucky sample is outvoted; c: nobody
    comparisons.
    """
    summary = summarize(
        [
            *(
                trace("a", k, correct, answer)
                for k, (correct, answer) in enumerate([(0, WRONG), (1, RIGHT), (1, SWAPPED)])
            ),
            *(
                trace("b", k, correct, answer)
                for k, (correct, answer) in enumerate([(1, RIGHT), (0, WRONG), (0, WRONG)])
            ),
            *(trace("c", k, False) for k in range(3)),
        ]
    )
    assert summary["accuracy"] == pytest.approx(1 / 3)
    assert summary["ci95"] == list(wilson(1, 3)), "three problems, not nine independent answers"
    assert (summary["pass_at_n"], summary["cons_at_n"]) == (
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )


def test_answers_without_a_verdict_are_in_no_share():
    """Nor in pass@n and cons@n, nor is a problem that has none; what a tree cost is known all the
    same.
    """
    unknown = {"correct": None, "claimed": None}
    summary = summarize(
        [
            trace("a", 0, True, RIGHT),
            trace("a", 1, False) | unknown,
            trace("b", 0, False) | unknown,
            trace("b", 1, False, WRONG),
            trace("c", 0, False, total_tokens=40) | unknown,
            trace("c", 1, False) | unknown,
        ]
    )
    assert (summary["unknown"], summary["n"], summary["samples"]) == (4, 3, 2)
    assert summary["accuracy"] == summary["pass_at_n"] == summary["cons_at_n"] == 0.5
    assert summary["ci95"] == list(wilson(1, 2)) and summary["claimed"] == 1.0
    assert summary["total_tokens"] == 15
    assert warnings(summary, "sos", None)[0].startswith("4 ANSWERS HAVE NO VERDICT")


def test_consensus_ties_go_to_the_first_claim():
    assert consensus([trace("a", 0, True, RIGHT), trace("a", 1, False, WRONG)])
    assert not consensus([trace("a", 0, False, WRONG), trace("a", 1, True, RIGHT)])


def test_operands_of_sums_and_products_may_change_places():
    assert canonical(RIGHT) == canonical(SWAPPED)
    assert canonical(["2*3=6"]) == canonical(["3*2=6"])
    assert canonical(["6-3=3"]) != canonical(["3-6=3"])


def test_accuracy_within_counts_only_trees_below_the_limit():
    traces = [trace(str(k), 0, k != 3, RIGHT, max_thread_tokens=10 * k) for k in range(1, 5)]
    rows = accuracy_within(traces, "max_thread_tokens", [5, 10, 39, 40])
    assert [(limit, share) for limit, share, *_ in rows] == [
        (5, 0.0),
        (10, 0.25),
        (39, 0.5),
        (40, 0.75),
    ]
    assert rows[1][2:] == wilson(1, 4)


def test_a_score_without_threads_is_called_by_its_name():
    serial = summarize([trace("a", 0, True, RIGHT, children=0)])
    assert "NO TREE SPAWNED" in warnings(serial, True, None)[0]
    assert warnings(serial, False, None) == []
    cut = summarize([trace("a", 0, False, status="OUT_OF_BUDGET")])
    assert "100% OF THE TREES WERE TRUNCATED" in warnings(cut, True, None)[0]
    broken = [trace("a", 0, False, status="MALFORMED"), trace("b", 0, True, RIGHT)]
    assert warnings(summarize(broken), "apr", None) == []


def test_force_children_is_blamed_only_where_it_was_given():
    traces = [trace("a", 0, False, status="MALFORMED"), trace("b", 0, True, RIGHT)]
    broken = summarize([*traces, trace("c", 0, False, status="MALFORMED")])
    for forced in (None, 0):
        (text,) = warnings(broken, "apr", forced)
        assert text.startswith(
            "67% OF THE ROOTS BROKE THE PROTOCOL: the model has not learned to write it"
        )
        assert "force" not in text
    (text,) = warnings(broken, "apr", 4)
    assert text.startswith(
        "67% OF THE ROOTS BROKE THE PROTOCOL: they were made to spawn 4 children (--force-children"
    )
