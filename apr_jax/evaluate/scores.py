"""Scores from trace lines alone (`traces.jsonl`, one sampled tree a line): nothing here knows a
model.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from apr_jax.data.statistics import wilson

Trace = dict[str, Any]
CUT = ("OUT_OF_WINDOW", "OUT_OF_BUDGET")  # How a truncated thread ended.
MEASURES = {  # Of a tree: what tables call it, and its form.
    "total_tokens": ("total tokens", "{:,.0f}"),
    "sequential_tokens": ("sequential tokens", "{:,.0f}"),
    "children": ("children", "{:.2f}"),
    "max_thread_tokens": ("longest thread", "{:,.0f}"),
}


def summarize(traces: Sequence[Trace]) -> dict[str, Any]:
    """What `summary.json` holds.

    Returns:
      `accuracy` (share of correct trees among those with a verdict), `reward` (their mean reward),
      `unknown` (trees without a verdict), `ci95` (Wilson over the number of problems: samples of
      one problem are not independent, so counting them all would make the interval too narrow), `n`
      problems, `samples` a problem, means of the measures, shares of trees that `claimed`, were
      `truncated`, whose root is `malformed`, that `spawned`; with several samples `pass_at_n` and
      `cons_at_n`.
    """
    asked = by_problem(traces)
    trees, n = len(traces), len(asked)
    samples = max((len(group) for group in asked.values()), default=0)

    graded = known(traces)
    groups = by_problem(graded)  # Problems of which no answer has a verdict are in no mean.
    accuracy = mean(trace["correct"] for trace in graded)
    summary: dict[str, Any] = {
        "accuracy": accuracy,
        "reward": mean(trace["reward"] for trace in graded),
        "ci95": list(wilson(round(accuracy * len(groups)), len(groups))),
        "unknown": trees - len(graded),
        "n": n,
        "samples": samples,
        **{measure: mean(trace[measure] for trace in traces) for measure in MEASURES},
        "claimed": mean(trace["claimed"] for trace in graded),
        "truncated": sum(map(is_truncated, traces)) / max(1, trees),
        "malformed": mean(
            any(root["status"] == "MALFORMED" for root in trace["threads"][:1]) for trace in traces
        ),
        "spawned": mean(trace["children"] > 0 for trace in traces),
    }
    if samples > 1:
        summary["pass_at_n"] = mean(
            any(trace["correct"] for trace in group) for group in groups.values()
        )
        summary["cons_at_n"] = mean(consensus(group) for group in groups.values())
    return summary


def known(traces: Iterable[Trace]) -> list[Trace]:
    """The traces on whose answers there is a verdict; of the others nobody knows whether they are
    right.
    """
    return [trace for trace in traces if trace["correct"] is not None]


def by_problem(traces: Iterable[Trace]) -> dict[str, list[Trace]]:
    """Traces of each problem in the order of their samples."""
    groups: dict[str, list[Trace]] = collections.defaultdict(list)
    for trace in traces:
        groups[trace["id"]].append(trace)
    return {
        name: sorted(group, key=lambda trace: trace["sample"]) for name, group in groups.items()
    }


def consensus(samples: Sequence[Trace]) -> bool:
    """cons@n: whether the solution that most samples claim is right; ties go to the one claimed
    first.
    """
    votes: dict[str, list[Trace]] = collections.defaultdict(list)
    for trace in samples:
        if trace["vote"]:
            votes[trace["vote"]].append(trace)
    if not votes:
        return False
    return bool(max(votes.values(), key=len)[0]["correct"])


def is_truncated(trace: Trace) -> bool:
    """Whether a thread of the tree ran out of window or budget."""
    return any(thread["status"] in CUT for thread in trace["threads"])


def accuracy_within(
    traces: Sequence[Trace], measure: str, limits: Iterable[int]
) -> list[tuple[int, float, float, float]]:
    """Cumulative accuracy: a tree counts as correct only if its `measure` is at most the limit.

    Returns:
      (limit, accuracy, low, high) with the 95% interval, one a limit.
    """
    correct = sorted(trace[measure] for trace in traces if trace["correct"])
    rows = []
    for limit in limits:
        hits = sum(value <= limit for value in correct)
        rows.append((int(limit), hits / max(1, len(traces)), *wilson(hits, len(traces))))
    return rows


def warnings(summary: dict[str, Any], parallel: bool, forced: int | None) -> list[str]:
    """What a reader must not overlook beside the score.

    Args:
      parallel: whether children were to be expected.
      forced: children that the roots were held to, if any.
    """
    found = []
    if summary["unknown"]:
        found.append(
            f"{summary['unknown']} ANSWERS HAVE NO VERDICT AND ARE NOT COUNTED: the verifier failed"
            " or took too long on them"
        )
    if parallel and summary["spawned"] == 0:
        found.append(
            "NO TREE SPAWNED A SINGLE CHILD: this is a serial score, not one of parallel reasoning"
        )
    if summary["truncated"] > 0.5:
        found.append(
            f"{summary['truncated']:.0%} OF THE TREES WERE TRUNCATED: the window or a budget is too"
            " small"
        )
    if summary["malformed"] > 0.5:
        why = (
            "the model has not learned to write it; more supervised steps, or limits.constrain,"
            " help"
        )
        if forced:
            why = (
                f"they are held to {forced} children (--force-children, evaluate.forced); "
                "a root that is held to more than it knows breaks it"
            )
        found.append(f"{summary['malformed']:.0%} OF THE ROOTS BROKE THE PROTOCOL: {why}")
    return found


def mean(values: Iterable[float]) -> float:
    """0 of none."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0
