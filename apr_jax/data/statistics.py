"""How good and how long demonstrations are: the ceiling of what imitation alone can teach."""

import math
from typing import Any

from apr_jax.data.demonstrate import Counts, Recipe
from apr_jax.errors import UsageError

_Z95 = 1.959963984540054


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927); (0, 1) for n = 0.

    centre = (p + z^2/2n) / (1 + z^2/n), half-width = z sqrt(p (1-p)/n + z^2/4n^2) / (1 + z^2/n).
    """
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def statistics(counts: Counts, recipe: Recipe) -> dict[str, Any]:
    """What data.json and `apr bench solver` tell of demonstrations.

    Returns:
      `demonstrations` that were kept; `dropped` for the first bound that each breaks, or as wrong;
      `solver_success`, the share of all whose answer verifies, and its `ci95`; `kept_success`;
      `dropped_success` and `dropped_children`, their mean, or None where none was dropped; and
      means over the kept: children, sampled tokens in a tree, in a thread and on the longest chain,
      positions of a tree's longest thread; `longest_stream` of all; `stored_tokens`, given ones
      included, which an epoch of training reads; `conditions`, how many of the kept state each
      condition (children, or window bins).

    Raises:
      UsageError: none was kept.
    """
    dropped = {
        name: getattr(counts, f"dropped_{name}")
        for name in ("window", "max_thread_tokens", "threads", "wrong")
    }
    lost = sum(dropped.values())
    kept = counts.made - lost
    if not kept:
        remedy = (
            "raise the limits"
            if counts.made > counts.dropped_wrong
            else "set solver.correct_only=false"
        )
        raise UsageError(
            f"limits: none of the {counts.made} demonstrations of {recipe.method!r} fits (too long"
            f" for limits.window={recipe.bounds.window}: {dropped['window']}, for"
            f" limits.max_thread_tokens={recipe.bounds.max_thread_tokens}: {dropped['stream']}, too"
            f" many threads for limits.max_threads, children or max_depth: {dropped['threads']};"
            f" wrong, under solver.correct_only: {dropped['wrong']}); {remedy}"
        )
    return {
        "demonstrations": kept,
        "dropped": dropped,
        "solver_success": counts.solved / counts.made,
        "ci95": list(wilson(counts.solved, counts.made)),
        "kept_success": counts.kept_solved / kept,
        "dropped_success": (counts.solved - counts.kept_solved) / lost if lost else None,
        "dropped_children": counts.dropped_children / lost if lost else None,
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
