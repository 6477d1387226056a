"""Scores of an evaluation, computed from its traces alone (`traces.jsonl`, one tree a line)."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any

from apr_jax.data.statistics import wilson

Trace = dict[str, Any]
CUT = ("OUT_OF_WINDOW", "OUT_OF_BUDGET")  # How a truncated thread ended.

# Measure of a tree -> its title in tables, and the format of its values.
MEASURES = {
    "total_tokens": ("total tokens", "{:,.0f}"),
    "sequential_tokens": ("sequential tokens", "{:,.0f}"),
    "children": ("children", "{:.2f}"),
    "max_thread_tokens": ("longest thread", "{:,.0f}"),
}


def summarize(traces: Sequence[Trace]) -> dict[str, Any]:
    """Computes the scores that `summary.json` holds.

    Returns:
      - `accuracy`: share of correct trees among those with a verdict.
      - `reward`: their mean reward.
      - `ci95`: Wilson's interval of the accuracy. It counts problems, not trees: samples of one
        problem are not independent, so counting them all would make the interval too narrow.
      - `unknown`: number of trees without a verdict.
      - `n`, `samples`: number of problems, and of samples of each.
      - a mean for each of `MEASURES`.
      - `claimed`, `truncated`, `malformed`, `spawned`: shares of trees that claim an answer, that
        were cut off in some thread, whose root broke the protocol, that spawned.
      - `pass_at_n`, `cons_at_n`: only if there are several samples of a problem.
    """
    by_asked = by_problem(traces)
    trees = len(traces)
    n = len(by_asked)
    samples = max((len(group) for group in by_asked.values()), default=0)

    graded = known(traces)
    groups = by_problem(graded)  # A problem without any verdict is in no mean.
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
        "truncated": mean(map(is_truncated, traces)),
        "malformed": mean(map(_is_malformed, traces)),
        "spawned": mean(trace["children"] > 0 for trace in traces),
    }
    if samples > 1:
        summary["pass_at_n"] = mean(
            any(trace["correct"] for trace in group) for group in groups.values()
        )
        summary["cons_at_n"] = mean(consensus(group) for group in groups.values())
    return summary


def known(traces: Iterable[Trace]) -> list[Trace]:
    """Returns the traces whose answers have a verdict.

    Nobody knows whether the other answers are right, so no score may count them.
    """
    return [trace for trace in traces if trace["correct"] is not None]


def by_problem(traces: Iterable[Trace]) -> dict[str, list[Trace]]:
    """Groups traces by the id of their problem, each group in the order of its samples."""
    groups: dict[str, list[Trace]] = collections.defaultdict(list)
    for trace in traces:
        groups[trace["id"]].append(trace)
    return {
        name: sorted(group, key=lambda trace: trace["sample"]) for name, group in groups.items()
    }


def consensus(samples: Sequence[Trace]) -> bool:
    """Whether the solution that most samples of a problem claim is right (cons@n).

    A tie goes to the solution that was claimed first.
    """
    votes: dict[str, list[Trace]] = collections.defaultdict(list)
    for trace in samples:
        if trace["vote"]:
            votes[trace["vote"]].append(trace)
    if not votes:
        return False
    winners = max(votes.values(), key=len)
    return bool(winners[0]["correct"])


def is_truncated(trace: Trace) -> bool:
    """Whether a thread of the tree ran out of window or budget."""
    return any(thread["status"] in CUT for thread in trace["threads"])


def _is_malformed(trace: Trace) -> bool:
    """Whether the root of the tree broke the protocol."""
    return any(root["status"] == "MALFORMED" for root in trace["threads"][:1])


def accuracy_within(
    traces: Sequence[Trace], measure: str, limits: Iterable[int]
) -> list[tuple[int, float, float, float]]:
    """Computes cumulative accuracy: only a tree whose `measure` is within the limit can be correct.

    Returns:
      for each limit: (limit, accuracy, low, high), with the 95% interval.
    """
    correct = sorted(trace[measure] for trace in traces if trace["correct"])
    rows = []
    for limit in limits:
        hits = sum(value <= limit for value in correct)
        rows.append((int(limit), hits / max(1, len(traces)), *wilson(hits, len(traces))))
    return rows


def warnings(summary: dict[str, Any], parallel: bool, forced: int | None) -> list[str]:
    """Returns what a reader of a score must not overlook, one sentence each.

    Args:
      summary: from `summarize`.
      parallel: whether the trees were expected to spawn children.
      forced: the number of forced children; None if the roots were free.
    """
    lines = []
    if summary["unknown"]:
        lines.append(
            f"{summary['unknown']} ANSWERS HAVE NO VERDICT AND ARE NOT COUNTED: the verifier failed"
            " or took too long on them"
        )
    if parallel and summary["spawned"] == 0:
        lines.append(
            "NO TREE SPAWNED A SINGLE CHILD: this is a serial score, not one of parallel reasoning"
        )
    if summary["truncated"] > 0.5:
        lines.append(
            f"{summary['truncated']:.0%} OF THE TREES WERE TRUNCATED: the window or a budget is too"
            " small"
        )
    if summary["malformed"] > 0.5:
        cause = (
            "the model has not learned to write it; more supervised steps, or limits.constrain,"
            " help"
        )
        if forced:
            cause = (
                f"they were made to spawn {forced} children (--force-children, evaluate.forced); a"
                " root that must spawn more than it has learned breaks it"
            )
        lines.append(f"{summary['malformed']:.0%} OF THE ROOTS BROKE THE PROTOCOL: {cause}")
    return lines


def mean(values: Iterable[float]) -> float:
    """Returns the mean of `values`, or 0.0 if there are none."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else 0.0
