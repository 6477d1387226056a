"""Evaluation: any number of problems through one fixed-shape rollout, every tree to a line on disk.

The life of an evaluation:
1. The problems, `samples` times each, become prompts; what cannot be answered is refused by name
   before anything runs.
2. They stream through the jitted rollout, `config.evaluate.batch` trees at a time
   (`evaluate/stream`).
3. Each batch's lines are appended to `traces.jsonl`. A second start with the same settings goes on
   after those that are the answers that belong there, and answers the rest anew.
4. `summary.json` is computed from the lines.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from apr_jax.errors import UsageError, UserError
from apr_jax.evaluate.cells import print_warnings
from apr_jax.evaluate.scores import known, summarize, warnings
from apr_jax.evaluate.stream import Rollout, stream
from apr_jax.evaluate.trace import graded_trace
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.lease import Lease
from apr_jax.io.storage import Mirror, write_text
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import make_mesh
from apr_jax.tasks import Failure, Problem, SandboxedVerifier, Task, make_task
from apr_jax.text.tokenizer import BOS
from apr_jax.threads import (
    NOT_FORCED,
    Limits,
    Prompts,
    Schedule,
    ThreadForest,
    check_prompts,
    make_prompts,
)
from apr_jax.threads.keys import Domain, run_key
from apr_jax.train.answers import extract_answers
from apr_jax.train.checkpoint.checksum import digest
from apr_jax.train.checkpoint.restored import Restored
from apr_jax.train.grader import allowed_unknown
from apr_jax.train.policy import make_policy_rollout
from apr_jax.train.step import place_whole

# Of a rollout of one tree a device: docs/rollout.md has the figures.
_FEW = (1, 4)
# Prompts are padded to a multiple of it: a condition more in them is no new shape.
_WIDTHS = 16
_MOST = 2**31 - 1  # Counts and identities of trees are 32 bits wide.

TRACES, SUMMARY, SETTINGS = "traces.jsonl", "summary.json", "settings.json"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How the trees of an evaluation are decoded.

    Attributes:
      samples: trees a problem.
      temperature: 0 is greedy; top_k: 0 is off; top_p: 1 is off.
      window: positions a thread may occupy; None is the checkpoint's own.
      condition: the number that prompts state: of children with APR, of window bins with SoS+; what
        it counts is said by the model's method (`tasks.Condition`). None states none.
      forced: children that the root is held to, over its spawns; None leaves it free.
      constrain: whether tokens that the protocol does not allow are left out; None is the
        checkpoint's own setting.
    """

    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    window: int | None = None
    condition: int | None = None
    forced: int | None = None
    constrain: bool | None = None

    @property
    def childless(self) -> bool:
        """Whether its trees are asked for no child, or held to none."""
        return 0 in (self.condition, self.forced)

    def __post_init__(self):
        if not 0 <= self.top_k <= _MOST:
            raise UsageError(f"--top-k {self.top_k}: must be from 0 (all tokens) to {_MOST}")
        if self.samples > 1 and self.temperature <= 0:
            raise UsageError(
                f"--samples {self.samples} with --temperature {self.temperature}: greedy samples"
                " are all the same; give a temperature"
            )
        if self.temperature <= 0 and (self.top_k or self.top_p < 1):
            raise UsageError(
                f"--top-k {self.top_k}, --top-p {self.top_p} with --temperature {self.temperature}:"
                " greedy decoding takes the most likely token whatever they are; give a"
                " temperature"
            )


def evaluate(
    restored: Restored,
    problems: list[Problem],
    out: Path,
    decoding: Decoding = Decoding(),
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a checkpoint on problems, on all devices; writes `traces.jsonl` and `summary.json`
    into `out`.

    Evaluations that differ in weights and prompts alone share a compiled rollout.

    Raises:
      UsageError: samples of a greedy policy, a window or number of children that doesn't fit, a
        condition that the model never saw, a problem that the tokenizer can't write, or `out` holds
        an evaluation with other settings.
      UserError: another evaluation writes in `out`.
    """
    task = task_of(restored)
    limits = limits_of(restored, decoding)
    prompts = prompts_of(restored, problems, limits, decoding)
    settings = {
        "weights": digest(restored.params),
        "problems": hashlib.sha256(
            json.dumps([problem.to_json() for problem in problems], sort_keys=True).encode()
        ).hexdigest(),
        **dataclasses.asdict(decoding),
        "window": limits.window,
        "constrain": limits.constrain,
        "limits": dataclasses.asdict(limits),
        "seed": restored.config.seed,
    }
    asked = [(problem, sample) for problem in problems for sample in range(decoding.samples)]
    with (
        disk_errors(out),
        Lease(out, "evaluation") as lease,
        Mirror(out, (SETTINGS, TRACES)) as mirror,
    ):
        _reserve(mirror.local, settings)
        done = _keep_answers(mirror.local / TRACES, asked)
        if done < len(asked):
            _run(restored, task, asked, prompts, limits, done, mirror, progress, lease)
        model = {name: getattr(restored, name) for name in ("method", "stage", "step")}
        summary = (
            summarize(read_traces(mirror.local / TRACES))
            | model
            | {"checkpoint": restored.path}
            | settings
        )
        write_text(mirror.local / SUMMARY, json.dumps(summary, indent=2) + "\n")
    parallel = task.methods[restored.method].parallel and not decoding.childless
    print_warnings(warnings(summary, parallel, decoding.forced))
    return summary


@dataclasses.dataclass(frozen=True)
class Runner:
    """A checkpoint's rollout, compiled once for one shape.

    Attributes:
      rollout: on `mesh`; params: the weights, on all its devices.
      batch: trees of a call; decode slots: of one device.
    """

    rollout: Rollout
    params: Any
    batch: int
    slots: int

    def stream(
        self, prompts: Prompts, seed: int, done: int = 0, progress: bool = False
    ) -> Iterator[tuple[int, ThreadForest]]:
        """`evaluate.stream` of the prompts."""
        key = run_key(seed, Domain.EVALUATION)
        return stream(
            self.rollout,
            self.params,
            prompts,
            key,
            batch=self.batch,
            slots=self.slots,
            done=done,
            progress=progress,
            label="eval",
        )


def make_runner(restored: Restored, limits: Limits, batch: int) -> Runner:
    """On as many devices of this process as `batch` trees can use; its batches may be a little
    larger, so that they divide.
    """
    mesh = make_mesh(devices=jax.local_devices()[:batch])
    batch += -batch % mesh.size
    schedule = restored.config.schedule
    slots = min(schedule.slots, batch // mesh.size * limits.max_threads)
    few = (
        tuple(count for count in _FEW if count < slots)
        if batch == mesh.size
        else schedule.small_batch_sizes
    )
    schedule = dataclasses.replace(
        schedule,
        slots=slots,
        prefill_batch=min(schedule.prefill_batch, slots),
        small_batch_sizes=few,
    )
    rollout = _rollout(restored.config.model, limits, schedule, mesh)
    return Runner(rollout, place_whole(restored.params, mesh), batch, slots)


def make_lone_runner(restored: Restored, limits: Limits, slots: int) -> Runner:
    """One tree a call on one device, every step with exactly so many decode slots."""
    mesh = make_mesh(devices=jax.local_devices()[:1])
    schedule = restored.config.schedule
    schedule = dataclasses.replace(
        schedule,
        slots=slots,
        prefill_batch=min(schedule.prefill_batch, slots),
        small_batch_sizes=(),
    )
    rollout = _rollout(restored.config.model, limits, schedule, mesh)
    return Runner(rollout, place_whole(restored.params, mesh), 1, slots)


@functools.lru_cache(maxsize=8)
def _rollout(
    model: ModelConfig, limits: Limits, schedule: Schedule, mesh: jax.sharding.Mesh
) -> Rollout:
    """One function for each shape, so that JAX compiles it once in a process."""
    return make_policy_rollout(model, limits, schedule, mesh, mesh.axis_names)


def answer_one(restored: Restored, problem: Problem) -> ThreadForest:
    """The greedy tree of one problem, as a forest of one tree with numpy leaves."""
    decoding, limits = Decoding(), restored.config.limits
    prompts = prompts_of(restored, [problem], limits, decoding)
    ((_, forest),) = make_runner(restored, limits, 1).stream(prompts, restored.config.seed)
    return forest


def _run(
    restored: Restored,
    task: Task,
    asked: list[tuple[Problem, int]],
    prompts: Prompts,
    limits: Limits,
    done: int,
    mirror: Mirror,
    progress: bool,
    lease: Lease,
) -> None:
    """Decodes, verifies and writes the trees after the first `done`.

    Raises:
      UserError: too many answers have no verdict.
    """
    runner = make_runner(restored, limits, min(restored.config.evaluate.batch, len(asked)))
    reward = restored.config.train.rl.reward
    allowed = allowed_unknown(len(asked), reward)

    forests = runner.stream(prompts, restored.config.seed, done, progress)
    path = mirror.local / TRACES
    before = read_traces(path) if done else []
    unknown = len(before) - len(known(before))
    with (
        SandboxedVerifier(task, reward.time_limit, reward.memory_limit) as verifier,
        path.open("a") as file,
    ):
        for begin, forest in forests:
            answers = extract_answers(forest, restored.tokenizer)
            these = asked[begin : begin + len(answers)]
            pairs = [(problem, answer) for (problem, _), answer in zip(these, answers, strict=True)]
            outcomes = verifier.verify(pairs, max(0, allowed - unknown))
            unknown += sum(isinstance(outcome, Failure) for outcome in outcomes)
            if unknown > allowed:
                raise UserError(
                    f"evaluation: {unknown} of {len(asked)} answers have no verdict, more than the"
                    f" model's train.rl.reward.max_unknown={reward.max_unknown:g} allows; the trees"
                    " before this batch are kept; mend what the lines of the verifier above say,"
                    " and start the same command again"
                )
            lines = [
                graded_trace(forest, tree, problem, sample, outcome, task, restored.tokenizer)
                for tree, ((problem, sample), outcome) in enumerate(
                    zip(these, outcomes, strict=True)
                )
            ]
            lease.check()
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            mirror.push(seldom=True)


def prompts_of(
    restored: Restored, problems: list[Problem], limits: Limits, decoding: Decoding
) -> Prompts:
    """One prompt a tree: the samples of a problem one after the other.

    Raises UsageError that names what can't be asked.
    """
    task = task_of(restored)
    _check_conditions(restored, task, limits, decoding)
    if len(problems) * decoding.samples > _MOST:
        raise UsageError(
            f"--samples {decoding.samples}: of {len(problems)} problems that is more than {_MOST}"
            " trees"
        )
    ids = []
    for problem in problems:
        try:
            prompt = [BOS, *restored.tokenizer.encode(task.prompt(problem, decoding.condition))]
        except ValueError as error:
            raise UsageError(f"problem {problem.id!r}: {error}") from None
        if len(prompt) > limits.window - 1:
            raise UsageError(
                f"problem {problem.id!r}: its prompt has {len(prompt)} tokens, too many for"
                f" --window {limits.window}"
            )
        ids += [prompt] * decoding.samples
    forced = NOT_FORCED if decoding.forced is None else decoding.forced
    sampling = {name: getattr(decoding, name) for name in ("temperature", "top_k", "top_p")}
    try:
        # A tree's identity is its place in the whole evaluation, so that a resumed one samples the
        # same trees.
        longest = max(map(len, ids), default=1)
        # A sampled token must fit, too.
        width = min(longest + -longest % _WIDTHS, limits.window - 1)
        prompts = make_prompts(ids, width, children=forced, **sampling)
        if ids:
            check_prompts(prompts, limits)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return prompts


def task_of(restored: Restored) -> Task:
    """The task that a model was trained for.

    Raises:
      UserError: the task knows nothing of the model's method.
    """
    config = restored.config
    task = make_task(config.task, config.limits)
    if restored.method not in task.methods:
        raise UserError(
            f"{restored.path}: method={restored.method!r:.60} must be one of"
            f" {', '.join(task.methods)}, the methods of task {config.task.kind!r}"
        )
    return task


def _check_conditions(restored: Restored, task: Task, limits: Limits, decoding: Decoding) -> None:
    """Raises UsageError if a condition or forced children make no sense for the model."""
    method = task.methods[restored.method]
    if decoding.forced is not None:
        if not method.parallel:
            raise UsageError(
                f"--force-children {decoding.forced}: {restored.path} is of method"
                f" {restored.method}, whose threads have no children"
            )
        most = limits.max_threads - 1 if limits.max_depth else 0
        if not 0 <= decoding.forced <= most:
            raise UsageError(
                f"--force-children {decoding.forced}: must be from 0 to {most}, limits.max_threads"
                " less the root"
            )
    if decoding.condition is not None:
        stated = method.condition
        if stated is None:
            raise UsageError(
                f"--condition {decoding.condition}: {restored.path} is of method"
                f" {restored.method} and was trained without conditions"
            )
        if not stated.low <= decoding.condition <= stated.high:
            raise UsageError(
                f"--condition {decoding.condition}: must be from {stated.low} to {stated.high}"
                f" {stated.counts}, what the model was trained on"
            )


def read_traces(path: Path) -> list[dict[str, Any]]:
    """The lines of a traces file; raises UserError that names a damaged one."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `apr eval` first") from None
    return parse_lines(path, text, "delete the folder and evaluate again")


def parse_lines(path: Path, text: str, remedy: str) -> list[dict[str, Any]]:
    """What the lines of a file hold; raises UserError that names one that is not JSON."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}, line {number}: is not JSON; {remedy}") from None
    return found


def limits_of(restored: Restored, decoding: Decoding) -> Limits:
    """The checkpoint's own limits, but for what the decoding asks for.

    Raises:
      UsageError: a window beyond the trained one.
    """
    limits = restored.config.limits
    window = limits.window if decoding.window is None else decoding.window
    if not 2 <= window <= limits.window:
        raise UsageError(
            f"--window {window}: must be from 2 to {limits.window}, the window the model was"
            " trained with"
        )
    constrain = limits.constrain if decoding.constrain is None else decoding.constrain
    return dataclasses.replace(limits, window=window, constrain=constrain)


def read_answers(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary of a finished evaluation, and its traces but for those without a verdict, which no
    score may count.

    Raises:
      UserError: a file is missing or damaged, or the traces are not those that the summary was
        computed from.
    """
    remedy = f"delete {folder} and evaluate again"
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder / SUMMARY}: no such file; run `apr eval` first") from None
    except ValueError:
        raise UserError(f"{folder / SUMMARY}: is damaged; {remedy}") from None

    traces = read_traces(folder / TRACES)
    answered = {(trace.get("id"), trace.get("sample")) for trace in traces}
    expected = summary["n"] * summary["samples"]
    if not len(traces) == len(answered) == expected:
        raise UserError(
            f"{folder / TRACES}: has {len(traces)} lines with answers to {len(answered)} samples of"
            f" problems, but {SUMMARY} is of {expected}; {remedy}"
        )
    return summary, known(traces)


def _reserve(out: Path, settings: dict[str, Any]) -> None:
    """Makes the folder, with its settings in it; refuses one that holds an evaluation with
    others.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if path.is_file():
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError:
            raise UserError(f"{path}: is damaged; delete {out} and evaluate again") from None
        for name, value in settings.items():
            if old.get(name) != value:
                raise UsageError(
                    f"{out}: holds an evaluation with {name}={old.get(name)!r}, not {value!r};"
                    " choose another --out"
                )
    else:
        write_text(path, json.dumps(settings, indent=2) + "\n")


def _keep_answers(traces: Path, asked: list[tuple[Problem, int]]) -> int:
    """How many of the trees that are asked for the file holds, in their order from the first.

    From the first line that is not the answer that belongs there, the file is cut off: what follows
    is answered anew. A tree is the same whenever it is decoded, so the file ends with the bytes of
    an unbroken evaluation."""
    if not traces.is_file():
        return 0

    done, size, half = 0, 0, False
    with traces.open("rb") as file:
        for line in file:
            half = not line.endswith(b"\n")  # The process was killed while it wrote.
            if half or done == len(asked) or not _answers(line, *asked[done]):
                break
            done += 1
            size += len(line)

    if size < traces.stat().st_size:
        if not half:
            problem, sample = asked[done] if done < len(asked) else (None, 0)
            wanted = (
                f"sample {sample} of problem {problem.id!r}" if problem else "no answer any more"
            )
            print_warnings(
                [
                    f"{traces}, line {done + 1}: must be {wanted}, and is not; answering anew from"
                    " there"
                ]
            )
        os.truncate(traces, size)
    return done


def _answers(line: bytes, problem: Problem, sample: int) -> bool:
    """Whether a line of a traces file is the tree of this sample of the problem."""
    try:
        trace = json.loads(line)
        found = (trace["id"], trace["sample"], trace["data"])
    except (ValueError, KeyError, TypeError):
        return False
    return found == (problem.id, sample, dict(problem.data))
