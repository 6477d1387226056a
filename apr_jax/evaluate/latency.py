"""Seconds of one problem at batch 1: what a user waits. Medians of repeated runs, on one device.

The life of a measurement:
1. The problems become prompts as in any evaluation; the rollout is compiled for one tree and run
   once unmeasured.
2. All problems are answered, one after the other; then all again, `repeats` times, so that a busy
   moment slows one run of each.
3. Of each problem the median counts. `eval/NAME/latency.json` has all medians, `slots.json` those
   on several numbers of decode slots.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import jax

from apr_jax.evaluate.decoding import Decoding, limits_of, prompts_of
from apr_jax.evaluate.runner import Runner, make_lone_runner, make_runner
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.json_files import write_json
from apr_jax.tasks import Problem
from apr_jax.threads import Prompts
from apr_jax.threads.keys import Domain, run_key
from apr_jax.train.checkpoint import Restored

LATENCY, SLOTS = "latency.json", "slots.json"


def measure_latency(
    restored: Restored, problems: list[Problem], out: Path, decoding: Decoding, repeats: int
) -> dict[str, Any]:
    """Writes OUT/latency.json: seconds of each problem with as many decode slots as the schedule
    has.
    """
    limits = limits_of(restored, decoding)
    runner = make_runner(restored, limits, 1)
    prompts = prompts_of(restored, problems, limits, decoding)
    seconds, _ = _timed(runner, prompts, restored.config.seed, repeats)
    ids = [problem.id for problem in problems]
    found = {
        "device": jax.local_devices()[0].device_kind,
        "repeats": repeats,
        "slots": runner.slots,
        "seconds": dict(zip(ids, seconds, strict=True)),
    }
    _write(out / LATENCY, found)
    return found


def measure_slots(
    restored: Restored, problems: list[Problem], out: Path, decoding: Decoding, repeats: int
) -> dict[str, Any]:
    """Writes OUT/slots.json: seconds and decode steps of the mean problem on 1, 2, 4, ...

    decode slots, and of one step of so many.
    """
    limits = limits_of(restored, decoding)
    prompts = prompts_of(restored, problems, limits, decoding)
    counts = [1]
    while counts[-1] < limits.max_threads:
        counts.append(min(2 * counts[-1], limits.max_threads))
    rows = []
    for slots in counts:
        seconds, steps = _timed(
            make_lone_runner(restored, limits, slots), prompts, restored.config.seed, repeats
        )
        rows.append(
            {"slots": slots, "seconds": statistics.mean(seconds), "steps": statistics.mean(steps)}
        )
    found = {
        "device": jax.local_devices()[0].device_kind,
        "repeats": repeats,
        "problems": [problem.id for problem in problems],
        "rows": [row | {"step_seconds": row["seconds"] / row["steps"]} for row in rows],
    }
    _write(out / SLOTS, found)
    return found


def _timed(
    runner: Runner, prompts: Prompts, seed: int, repeats: int
) -> tuple[list[float], list[int]]:
    """Median seconds and decode steps of each prompt, answered alone."""
    key = run_key(seed, Domain.EVALUATION)
    count = len(prompts.length)
    alone = [
        jax.tree.map(lambda field, place=place: field[place : place + 1], prompts)
        for place in range(count)
    ]
    jax.block_until_ready(runner.rollout(runner.params, alone[0], key))
    spent: list[list[float]] = [[] for _ in alone]
    steps = [0] * len(alone)
    for _ in range(repeats):
        for place, prompt in enumerate(alone):
            start = time.perf_counter()
            _, work = jax.block_until_ready(runner.rollout(runner.params, prompt, key))
            spent[place].append(time.perf_counter() - start)
            steps[place] = int(work.steps.sum())
    return list(map(statistics.median, spent)), steps


def _write(path: Path, values: dict[str, Any]) -> None:
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
