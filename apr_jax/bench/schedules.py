"""Measures schedules of the rollout against each other, on the same trees.

A schedule decides in which order threads are decoded. It changes no token, so only the time
differs.
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
    """Returns the schedule itself, then schedules that differ from it in one field."""
    half = window // 2
    quarter = window // 4
    change = functools.partial(dataclasses.replace, base)
    varied = []
    for slots in (8, 16, 32, 64, 128):
        # A prefill batch is no larger than the number of decode slots.
        varied.append(change(slots=slots, prefill_batch=min(base.prefill_batch, slots)))
    for prefill_batch in (1, 4, 16):
        if prefill_batch <= base.slots:
            varied.append(change(prefill_batch=prefill_batch))
    for chunk in (4, 16, 64):
        varied.append(change(prefill_chunk=chunk))
    for buckets in ((), (half,), (quarter, half, half + quarter)):
        varied.append(change(context_buckets=buckets))
    return [base, *(schedule for schedule in varied if schedule != base)]


def contest(restored: Restored, ids: list[list[int]]) -> list[Contestant]:
    """Makes the contestants: rollouts of the same prompts, one with each schedule.

    The name of a contestant says which field differs, and how full its decode slots were.

    Raises:
      UsageError: the number of prompts is no multiple of the number of devices.
    """
    base = restored.config.schedule
    limits = restored.config.limits
    prompts = make_prompts(ids, max(map(len, ids)))
    totals: set[int] = set()  # Tokens of the forests, the same for all schedules.

    def contestant(schedule: Schedule) -> Contestant:
        config = dataclasses.replace(restored.config, schedule=schedule)
        runner = make_runner(dataclasses.replace(restored, config=config), limits, len(ids))

        def run() -> float:
            forest, _ = runner.rollout(runner.params, prompts, jax.random.key(0))
            tokens = int(forest.total_tokens.sum())
            totals.add(tokens)
            if len(totals) > 1:
                raise RuntimeError(
                    f"bench schedule: the trees differ between schedules, {totals} tokens"
                )
            return float(tokens)

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
