"""Schedules against each other: the same trees, decoded in another order.

No schedule changes a token, so only time differs.
"""

import dataclasses
import functools

import jax
import numpy as np

from apr_jax.bench.paired import Contestant
from apr_jax.errors import UsageError
from apr_jax.evaluate.runner import make_runner
from apr_jax.threads import Schedule, make_prompts
from apr_jax.train.checkpoint.restored import Restored


def variations(base: Schedule, window: int) -> list[Schedule]:
    """The schedule itself first, then others that differ from it in one field."""
    half, quarter = window // 2, window // 4
    change = functools.partial(dataclasses.replace, base)
    others = [
        *(
            change(slots=slots, prefill_batch=min(base.prefill_batch, slots))
            for slots in (8, 16, 32, 64, 128)
        ),
        *(change(prefill_batch=admit) for admit in (1, 4, 16) if admit <= base.slots),
        *(change(prefill_chunk=chunk) for chunk in (4, 16, 64)),
        *(
            change(context_buckets=buckets)
            for buckets in ((), (half,), (quarter, half, half + quarter))
        ),
    ]
    return [base, *(other for other in others if other != base)]


def contest(restored: Restored, ids: list[list[int]]) -> list[Contestant]:
    """The same prompts with each schedule; the name says what differs, and how full the decode
    slots were.
    """
    base, limits = restored.config.schedule, restored.config.limits
    prompts = make_prompts(ids, max(map(len, ids)))
    tokens: set[int] = set()

    def contestant(schedule: Schedule) -> Contestant:
        one = dataclasses.replace(
            restored, config=dataclasses.replace(restored.config, schedule=schedule)
        )
        runner = make_runner(one, limits, len(ids))

        def run() -> float:
            forest, _ = runner.rollout(runner.params, prompts, jax.random.key(0))
            tokens.add(int(forest.total_tokens.sum()))
            if len(tokens) > 1:
                raise RuntimeError(
                    f"bench schedule: the trees differ between schedules, {tokens} tokens"
                )
            return float(forest.total_tokens.sum())

        _, work = runner.rollout(runner.params, prompts, jax.random.key(0))
        full = np.sum(work.live) / (np.sum(work.steps) * runner.slots)
        changed = ", ".join(
            f"{field.name}={getattr(schedule, field.name)}"
            for field in dataclasses.fields(Schedule)
            if getattr(schedule, field.name) != getattr(base, field.name)
        )
        return Contestant(f"{changed or base} ({full:.0%} full)", run, "tokens")

    if len(ids) % len(jax.devices()):
        raise UsageError(
            f"bench schedule: {len(ids)} problems do not divide over {len(jax.devices())} devices"
        )
    return [contestant(schedule) for schedule in variations(base, limits.window)]
