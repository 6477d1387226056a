"""Seconds of one problem at batch 1: how long a user waits for an answer, on one device.

The life of a measurement:
1. The problems become prompts as in any evaluation. The rollout is compiled for one tree and run
   once, which is not measured.
2. All problems are answered, one after the other. This is repeated `repeats` times, so that a
   moment in which the machine is busy slows one run of each problem and not all runs of one.
3. The median of a problem's runs counts. `latency.json` has the medians on the schedule's decode
   slots, and `votes.json` those of several samples of a problem, which decode side by side;
   `slots.json` has means over the problems on several numbers of decode slots.
"""

from __future__ import annotations

import dataclasses
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

LATENCY = "latency.json"
VOTES = "votes.json"
SLOTS = "slots.json"


def measure_latency(
    restored: Restored, problems: list[Problem], out: Path, decoding: Decoding, repeats: int
) -> dict[str, Any]:
    """Measures the seconds of each problem on the schedule's decode slots.

    Returns:
      what is written to OUT/latency.json: `device`, `repeats`, `slots`, and `seconds` (id of a
      problem -> median).
    """
    limits = limits_of(restored, decoding)
    prompts = prompts_of(restored, problems, limits, decoding)
    runner = make_runner(restored, limits, 1)
    seconds, _ = _timed(runner, prompts, restored.config.seed, repeats)

    ids = [problem.id for problem in problems]
    measured = {
        "device": jax.local_devices()[0].device_kind,
        "repeats": repeats,
        "slots": runner.slots,
        "seconds": dict(zip(ids, seconds, strict=True)),
    }
    _write(out / LATENCY, measured)
    return measured


def measure_votes(
    restored: Restored, problems: list[Problem], out: Path, decoding: Decoding, repeats: int
) -> dict[str, Any]:
    """Measures the seconds of the first 1, 2, 4, ... and of all samples of each problem.

    The samples of a problem decode side by side, on the schedule's decode slots.

    Returns:
      what is written to OUT/votes.json: `device`, `repeats`, `slots`, and `seconds` (number of
      samples -> id of a problem -> median).
    """
    limits = limits_of(restored, decoding)
    ids = [problem.id for problem in problems]

    seconds_by_count = {}
    for count in _powers_of_two(decoding.samples):
        fewer = dataclasses.replace(decoding, samples=count)
        prompts = prompts_of(restored, problems, limits, fewer)
        runner = make_runner(restored, limits, count)
        seconds, _ = _timed(runner, prompts, restored.config.seed, repeats, count)
        seconds_by_count[str(count)] = dict(zip(ids, seconds, strict=True))

    measured = {
        "device": jax.local_devices()[0].device_kind,
        "repeats": repeats,
        "slots": runner.slots,
        "seconds": seconds_by_count,
    }
    _write(out / VOTES, measured)
    return measured


def measure_slots(
    restored: Restored, problems: list[Problem], out: Path, decoding: Decoding, repeats: int
) -> dict[str, Any]:
    """Measures the mean seconds and decode steps of a problem on 1, 2, 4, ... decode slots.

    Returns:
      what is written to OUT/slots.json: `device`, `repeats`, `problems` (ids), and `rows`, each
      with `slots`, mean `seconds`, mean `steps`, and the `step_seconds` of one step.
    """
    limits = limits_of(restored, decoding)
    prompts = prompts_of(restored, problems, limits, decoding)

    rows = []
    for slots in _powers_of_two(limits.max_threads):
        runner = make_lone_runner(restored, limits, slots)
        medians, steps = _timed(runner, prompts, restored.config.seed, repeats)
        mean_seconds = statistics.mean(medians)
        mean_steps = statistics.mean(steps)
        rows.append(
            {
                "slots": slots,
                "seconds": mean_seconds,
                "steps": mean_steps,
                "step_seconds": mean_seconds / mean_steps,
            }
        )

    measured = {
        "device": jax.local_devices()[0].device_kind,
        "repeats": repeats,
        "problems": [problem.id for problem in problems],
        "rows": rows,
    }
    _write(out / SLOTS, measured)
    return measured


def _powers_of_two(largest: int) -> list[int]:
    """Returns 1, 2, 4, ... below `largest`, and `largest`."""
    counts = [1]
    while counts[-1] < largest:
        counts.append(min(2 * counts[-1], largest))
    return counts


def _timed(
    runner: Runner, prompts: Prompts, seed: int, repeats: int, trees: int = 1
) -> tuple[list[float], list[int]]:
    """Returns the median seconds and the decode steps of each problem, each answered alone.

    Args:
      runner: the rollout of `trees` trees.
      prompts: of all problems, `trees` for each.
      seed: seed of the sampling.
      repeats: number of times that each problem is answered.
      trees: number of trees of a problem.
    """
    key = run_key(seed, Domain.EVALUATION)
    prompts_of_each = [
        jax.tree.map(lambda field, first=first: field[first : first + trees], prompts)
        for first in range(0, len(prompts.length), trees)
    ]
    jax.block_until_ready(runner.rollout(runner.params, prompts_of_each[0], key))  # Compiles.

    seconds: list[list[float]] = [[] for _ in prompts_of_each]
    steps = [0] * len(prompts_of_each)
    for _ in range(repeats):
        for index, together in enumerate(prompts_of_each):
            start = time.perf_counter()
            _, work = jax.block_until_ready(runner.rollout(runner.params, together, key))
            seconds[index].append(time.perf_counter() - start)
            steps[index] = int(work.steps.sum())
    return [statistics.median(runs) for runs in seconds], steps


def _write(path: Path, values: dict[str, Any]) -> None:
    """Writes JSON, and makes the folder if it does not exist."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
