"""How good and how long demonstrations are: the most that imitation alone can teach."""

import math
from typing import Any

from apr_jax.data.demonstrate import Counts, Recipe
from apr_jax.errors import UsageError

_Z95 = 1.959963984540054  # The 97.5% quantile of the standard normal distribution.


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Computes the 95% interval of a share (Wilson 1927); (0, 1) for n = 0.

    centre = (p + z^2/2n) / (1 + z^2/n), half-width = z sqrt(p (1-p)/n + z^2/4n^2) / (1 + z^2/n).
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    z2 = _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def statistics(counts: Counts, recipe: Recipe) -> dict[str, Any]:
    """Computes what data.json and `apr bench solver` say about the demonstrations of a method.

    Returns:
      a dict of
        demonstrations: number that were kept.
        dropped: number that were dropped, by the first limit that each breaks, or as "wrong".
        solver_success, ci95: share of all whose answer verifies, and its 95% interval.
        kept_success, dropped_success: the same share of the kept and of the dropped.
        dropped_children: mean children of the dropped; None, as dropped_success, if there are none.
        mean_children, mean_total_tokens, mean_sequential_tokens: means over the kept.
        mean_thread_tokens: mean sampled tokens of a thread.
        mean_longest_thread: mean positions of a tree's longest thread.
        longest_stream: tokens of the longest thread of all.
        stored_tokens: tokens that an epoch of training reads, prompt tokens included.
        conditions: how many of the kept state each condition (children, or window bins).

    Raises:
      UsageError: no demonstration was kept.
    """
    dropped = {
        name: getattr(counts, f"dropped_{name}")
        for name in ("window", "max_thread_tokens", "threads", "wrong")
    }
    lost = sum(dropped.values())
    kept = counts.made - lost
    if not kept:
        if counts.made > counts.dropped_wrong:
            remedy = "raise the limits"
        else:
            remedy = "set data.correct_only=false"
        raise UsageError(
            f"limits: none of the {counts.made} demonstrations of {recipe.method!r} fits (too long"
            f" for limits.window={recipe.bounds.window}: {dropped['window']}, for"
            f" limits.max_thread_tokens={recipe.bounds.max_thread_tokens}:"
            f" {dropped['max_thread_tokens']}, too many threads for limits.max_threads, children or"
            f" max_depth: {dropped['threads']}; wrong, under data.correct_only:"
            f" {dropped['wrong']}); {remedy}"
        )

    dropped_success = None
    dropped_children = None
    if lost:
        dropped_success = (counts.solved - counts.kept_solved) / lost
        dropped_children = counts.dropped_children / lost
    return {
        "demonstrations": kept,
        "dropped": dropped,
        "solver_success": counts.solved / counts.made,
        "ci95": list(wilson(counts.solved, counts.made)),
        "kept_success": counts.kept_solved / kept,
        "dropped_success": dropped_success,
        "dropped_children": dropped_children,
        "mean_children": counts.threads / kept - 1,
        "mean_total_tokens": counts.tokens / kept,
        "mean_thread_tokens": counts.tokens / counts.threads,
        "mean_sequential_tokens": counts.sequential / kept,
        "mean_longest_thread": counts.window / kept,
        "longest_stream": counts.longest,
        "stored_tokens": counts.stored,
        "conditions": {
            str(condition): counts.conditions[condition] for condition in sorted(counts.conditions)
        },
    }
