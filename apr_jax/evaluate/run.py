"""Evaluation: any number of problems through one fixed-shape rollout, every tree to a line on disk.

The life of an evaluation:
1. The problems, `samples` times each, become prompts; what cannot be answered is refused by name before anything runs.
2. Batches of `config.evaluate.batch` trees go through the jitted rollout (the last one is filled up); one compilation.
3. Each batch's lines are appended to `traces.jsonl`. A second start with the same settings goes on after them.
4. `summary.json` is computed from the lines.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from apr_jax.data.tokenizer import BOS
from apr_jax.errors import UsageError, UserError
from apr_jax.evaluate.metrics import summarize, warnings
from apr_jax.evaluate.trace import to_trace
from apr_jax.learn.answers import extract_answers
from apr_jax.learn.checkpoint import Restored, digest, disk_errors
from apr_jax.model.sharding import make_mesh
from apr_jax.model.transformer import make_decode
from apr_jax.tasks import Countdown, Problem
from apr_jax.threads import Limits, Prompts, ThreadForest, make_rollout

TRACES, SUMMARY, SETTINGS = "traces.jsonl", "summary.json", "settings.json"


def evaluate(
    restored: Restored,
    problems: list[Problem],
    out: Path,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    window: int | None = None,
    children: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a checkpoint on problems, on all devices; writes `traces.jsonl` and `summary.json` into `out`.

    Args:
      samples: trees a problem.
      temperature: 0 is greedy.
      window: positions a thread may occupy; None is the checkpoint's own.
      children: condition of the prompt: how many children to spawn.

    Raises:
      UsageError: samples of a greedy policy, a window that doesn't fit, a condition that the model never saw, a problem
        that the tokenizer can't write, or `out` holds an evaluation with other settings.
    """
    if samples > 1 and temperature <= 0:
        raise UsageError(
            f"--samples {samples} with --temperature {temperature}: greedy samples are all the same; give a temperature"
        )
    limits = _limits(restored, window)
    prompts = encode_prompts(restored, problems, limits, children)
    settings = {
        "weights": digest(restored.params),
        "problems": hashlib.sha256(repr([(p.id, p.numbers, p.target) for p in problems]).encode()).hexdigest(),
        "samples": samples,
        "temperature": temperature,
        "window": limits.window,
        "condition": children,
    }
    jobs = [
        (problem, prompt, sample)
        for problem, prompt in zip(problems, prompts, strict=True)
        for sample in range(samples)
    ]
    with disk_errors(out):
        done = _open(out, settings)
        if done < len(jobs):
            _run(restored, jobs, done, limits, temperature, samples, out, progress)
        model = {name: getattr(restored, name) for name in ("method", "stage", "step")}
        summary = summarize(read_traces(out / TRACES)) | model | {"checkpoint": restored.path} | settings
        (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    for warning in warnings(summary, restored.method):
        Console(stderr=True).print(f"[bold red]warning: {warning}[/bold red]")
    return summary


def make_runner(
    restored: Restored, limits: Limits, batch: int
) -> Callable[[list[list[int]], list[int], float], ThreadForest]:
    """`run(prompts, tree identities, temperature) -> forest` (numpy) for up to `batch` trees, on all devices."""
    mesh = make_mesh()
    batch += -batch % mesh.size
    schedule = restored.config.schedule
    lanes = min(schedule.lanes, max(1, batch // mesh.size))
    schedule = dataclasses.replace(schedule, lanes=lanes, admit=min(schedule.admit, lanes))
    rollout = make_rollout(*make_decode(restored.config.model), limits, schedule, mesh, axes=mesh.axis_names)
    key = jax.random.key(restored.config.seed)
    width = limits.window - 1

    def run(prompts: list[list[int]], trees: list[int], temperature: float) -> ThreadForest:
        filler = batch - len(prompts)
        tokens = np.zeros((batch, width), np.int32)
        for row, prompt in zip(tokens, prompts, strict=False):
            row[: len(prompt)] = prompt
        tokens[len(prompts) :, 0] = BOS
        lengths = [len(prompt) for prompt in prompts] + [1] * filler
        forest, _ = rollout(
            restored.params,
            Prompts(
                tokens,
                np.asarray(lengths, np.int32),
                np.asarray(trees + [0] * filler, np.int32),
                np.full(batch, temperature, np.float32),
            ),
            key,
        )
        return jax.tree.map(lambda field: field[: len(prompts)], jax.device_get(forest))

    return run


def _run(
    restored: Restored,
    jobs: list[tuple[Problem, list[int], int]],
    done: int,
    limits: Limits,
    temperature: float,
    samples: int,
    out: Path,
    progress: bool,
) -> None:
    batch = min(restored.config.evaluate.batch, len(jobs))
    run = make_runner(restored, limits, batch)
    task = Countdown(restored.config.task, restored.config.solver)
    columns = (
        TextColumn("eval"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("trees"),
        TimeRemainingColumn(),
        TextColumn("accuracy {task.fields[accuracy]:.3f}"),
    )
    correct = 0
    with (
        Progress(*columns, console=Console(stderr=True), disable=not progress) as bar,
        (out / TRACES).open("a") as file,
    ):
        shown = bar.add_task("", total=len(jobs), completed=done, accuracy=0.0)
        for begin in range(done, len(jobs), batch):
            some = jobs[begin : begin + batch]
            # A tree's identity is its place in the whole evaluation, so that a resumed one samples the same trees.
            forest = run([prompt for _, prompt, _ in some], list(range(begin, begin + len(some))), temperature)
            answers = extract_answers(forest, restored.tokenizer)
            lines = [
                to_trace(forest, tree, problem, sample, answers[tree], task, restored.tokenizer)
                for tree, (problem, _, sample) in enumerate(some)
            ]
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            correct += sum(line["correct"] for line in lines)
            bar.update(shown, completed=begin + len(some), accuracy=correct / (begin + len(some) - done))


def encode_prompts(
    restored: Restored, problems: list[Problem], limits: Limits, children: int | None
) -> list[list[int]]:
    """Token ids of each root's prompt; raises UsageError that names the problem which cannot be asked."""
    config = restored.config
    if children is not None:
        if restored.method != "apr":
            raise UsageError(
                f"--children {children}: {restored.path} is a {restored.method} model; only apr has children"
            )
        if config.solver.condition == 0:
            raise UsageError(
                f"--children {children}: {restored.path} was trained without conditions (solver.condition=0)"
            )
        if not 0 <= children <= config.solver.max_children:
            raise UsageError(f"--children {children}: the model was trained on 0 to {config.solver.max_children}")
    task = Countdown(config.task, config.solver)
    prompts = []
    for problem in problems:
        try:
            prompt = [BOS, *restored.tokenizer.encode(task.prompt(problem, children))]
        except ValueError as error:
            raise UsageError(f"problem {problem.id!r}: {error}") from None
        if len(prompt) > limits.window - 1:
            raise UsageError(
                f"problem {problem.id!r}: its prompt has {len(prompt)} tokens, too many for --window {limits.window}"
            )
        prompts.append(prompt)
    return prompts


def read_traces(path: Path) -> list[dict[str, Any]]:
    """The lines of a traces file; raises UserError that names a damaged one."""
    traces = []
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `apr eval` first") from None
    for number, line in enumerate(lines, start=1):
        try:
            traces.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}, line {number}: is not JSON; delete the folder and evaluate again") from None
    return traces


def _limits(restored: Restored, window: int | None) -> Limits:
    limits = restored.config.limits
    if window is None:
        return limits
    if not 2 <= window <= limits.window:
        raise UsageError(f"--window {window}: must be from 2 to {limits.window}, the window the model was trained with")
    return dataclasses.replace(limits, window=window)


def _open(out: Path, settings: dict[str, Any]) -> int:
    """Prepares the folder; returns how many trees it holds already. A half-written last line is dropped."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if path.is_file():
        old = json.loads(path.read_text())
        for name, value in settings.items():
            if old.get(name) != value:
                raise UsageError(
                    f"{out}: holds an evaluation with {name}={old.get(name)!r}, not {value!r}; choose another --out"
                )
    else:
        path.write_text(json.dumps(settings, indent=2) + "\n")
    traces = out / TRACES
    if not traces.is_file():
        return 0
    whole = traces.read_bytes()
    whole = whole[: whole.rfind(b"\n") + 1]
    traces.write_bytes(whole)
    return whole.count(b"\n")
