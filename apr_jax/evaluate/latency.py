"""Seconds of one problem at batch 1: how long a user waits for an answer, on one device.

The life of a measurement:
1. The problems become prompts as in any evaluation. The rollout is compiled for one tree and run
   once, which is not measured.
2. All problems are answered, one after the other. This is repeated `repeats` times, so that a
   moment in which the machine is busy slows one run of each problem and not all runs of one.
3. The median of a problem's runs counts. `latency.json` has the medians on the schedule's decode
   slots; `slots.json` has means over the problems on several numbers of decode slots.
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

LATENCY = "latency.json"
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
    runner: Runner, prompts: Prompts, seed: int, repeats: int
) -> tuple[list[float], list[int]]:
    """Returns the median seconds and the decode steps of each prompt, each answered alone."""
    key = run_key(seed, Domain.EVALUATION)
    single_prompts = [
        jax.tree.map(lambda field, row=row: field[row : row + 1], prompts)
        for row in range(len(prompts.length))
    ]
    jax.block_until_ready(runner.rollout(runner.params, single_prompts[0], key))  # Compiles.

    seconds: list[list[float]] = [[] for _ in single_prompts]
    steps = [0] * len(single_prompts)
    for _ in range(repeats):
        for row, prompt in enumerate(single_prompts):
            start = time.perf_counter()
            _, work = jax.block_until_ready(runner.rollout(runner.params, prompt, key))
            seconds[row].append(time.perf_counter() - start)
            steps[row] = int(work.steps.sum())
    return [statistics.median(runs) for runs in seconds], steps


def _write(path: Path, values: dict[str, Any]) -> None:
    """Writes JSON, and makes the folder if it does not exist."""
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)
