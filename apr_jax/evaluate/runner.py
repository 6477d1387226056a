"""Evaluation: any number of problems through one compiled rollout, each tree a line on disk.

The life of an evaluation:
1. The problems, `samples` times each, become prompts (`evaluate/decoding.py`). What the model
   cannot be asked is refused by name before anything runs.
2. The prompts go through the compiled rollout, `config.evaluate.batch` trees at a time
   (`evaluate/stream.py`).
3. The answers of each batch are verified, and its trees are appended to `traces.jsonl`. If the same
   evaluation is started a second time, it goes on after the lines that are there
   (`evaluate/folder.py`).
4. `summary.json` is computed from the lines.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from apr_jax.errors import UserError
from apr_jax.evaluate.cells import print_warnings
from apr_jax.evaluate.decoding import GREEDY, Decoding, limits_of, method_of, prompts_of, task_of
from apr_jax.evaluate.folder import (
    SETTINGS,
    SUMMARY,
    TRACES,
    Sample,
    keep_answers,
    read_traces,
    reserve_folder,
)
from apr_jax.evaluate.scores import known, summarize, warnings
from apr_jax.evaluate.stream import Rollout, stream
from apr_jax.evaluate.trace import to_trace
from apr_jax.io.disk_errors import disk_errors
from apr_jax.io.json_files import json_line, write_json
from apr_jax.io.lease import Lease
from apr_jax.io.storage import Mirror
from apr_jax.io.subprocesses import StopSignals
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import make_mesh
from apr_jax.tasks import Failure, Problem, SandboxedVerifier
from apr_jax.threads import Limits, Prompts, Schedule, ThreadForest
from apr_jax.threads.keys import Domain, run_key
from apr_jax.train.answers import extract_answers
from apr_jax.train.checkpoint.checksum import digest
from apr_jax.train.checkpoint.restored import Restored
from apr_jax.train.grader import allowed_unknown
from apr_jax.train.policy import make_policy_rollout
from apr_jax.train.step import place_whole

# Small batch sizes of a rollout of one tree on each device; docs/rollout.md has the measurements.
_LONE_TREE_BATCHES = (1, 4)


def evaluate(
    restored: Restored,
    problems: list[Problem],
    out: Path,
    decoding: Decoding = GREEDY,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a checkpoint on problems, on all devices of this process.

    Writes `traces.jsonl` and `summary.json` into `out`, and prints the summary's warnings.
    Evaluations that differ only in weights and prompts share one compiled rollout.

    Args:
      restored: the checkpoint.
      problems: what it is asked.
      out: folder of this evaluation alone. May be gs://.
      decoding: how the trees are decoded.
      progress: whether a bar on standard error shows the progress.

    Returns:
      the summary: `scores.summarize`, the model's name and path, and the settings.

    Raises:
      UsageError: the decoding or a problem does not fit the model, or `out` holds an evaluation
        with other settings.
      UserError: another evaluation is writing to `out`, a file in it is damaged, or too many
        answers have no verdict.
      KeyboardInterrupt, Stopped: by Ctrl-C, SIGTERM or SIGHUP; the trees of the batch at hand are
        written.
    """
    task = task_of(restored)
    limits = limits_of(restored, decoding)
    prompts = prompts_of(restored, problems, limits, decoding)
    settings = _settings(restored, problems, limits, decoding)
    samples = [(problem, sample) for problem in problems for sample in range(decoding.samples)]

    with (
        disk_errors(out),
        Lease(out, "evaluation") as lease,
        Mirror(out, (SETTINGS, TRACES)) as mirror,
    ):
        reserve_folder(mirror.local, settings)
        done = keep_answers(mirror.local / TRACES, samples)
        if done < len(samples):
            _answer_rest(restored, samples, prompts, limits, done, mirror, lease, progress)

        model = {name: getattr(restored, name) for name in ("method", "stage", "step")}
        scores = summarize(read_traces(mirror.local / TRACES))
        summary = scores | model | {"checkpoint": restored.path} | settings
        write_json(mirror.local / SUMMARY, summary)

    expects_children = method_of(restored, task).parallel and not decoding.childless
    print_warnings(warnings(summary, expects_children, decoding.forced))
    return summary


def _settings(
    restored: Restored, problems: list[Problem], limits: Limits, decoding: Decoding
) -> dict[str, Any]:
    """Returns all that the trees depend on; two evaluations with equal settings are the same."""
    listed = json.dumps([problem.to_json() for problem in problems], sort_keys=True)
    return {
        "weights": digest(restored.params),
        "problems": hashlib.sha256(listed.encode()).hexdigest(),
        **dataclasses.asdict(decoding),
        "window": limits.window,
        "constrain": limits.constrain,
        "limits": dataclasses.asdict(limits),
        "seed": restored.config.seed,
    }


def _answer_rest(
    restored: Restored,
    samples: Sequence[Sample],
    prompts: Prompts,
    limits: Limits,
    done: int,
    mirror: Mirror,
    lease: Lease,
    progress: bool,
) -> None:
    """Decodes, verifies and writes the trees after the first `done`.

    Raises:
      KeyboardInterrupt, Stopped: by Ctrl-C, SIGTERM or SIGHUP, after the trees of the batch at hand
        are written. A second signal acts at once.
      UserError: too many answers have no verdict.
    """
    task = task_of(restored)
    reward = restored.config.train.rl.reward
    runner = make_runner(restored, limits, min(restored.config.evaluate.batch, len(samples)))
    forests = runner.stream(prompts, restored.config.seed, done, progress)

    path = mirror.local / TRACES
    before = read_traces(path) if done else []
    unknown = len(before) - len(known(before))
    allowed = allowed_unknown(len(samples), reward)

    with (
        StopSignals() as signals,
        SandboxedVerifier(task, reward.time_limit, reward.memory_limit, reward.workers) as verifier,
        path.open("a") as file,
    ):
        for begin, forest in forests:
            answers = extract_answers(forest, restored.tokenizer)
            batch = samples[begin : begin + len(answers)]
            pairs = [(problem, answer) for (problem, _), answer in zip(batch, answers, strict=True)]
            outcomes = verifier.verify(pairs, max(0, allowed - unknown))

            unknown += sum(isinstance(outcome, Failure) for outcome in outcomes)
            if unknown > allowed:
                raise UserError(
                    f"evaluation: {unknown} of {len(samples)} answers have no verdict, more than"
                    f" the model's train.rl.reward.max_unknown={reward.max_unknown:g} allows; the"
                    " trees before this batch are kept; mend what the lines of the verifier above"
                    " say, and start the same command again"
                )

            lines = []
            for tree, ((problem, sample), outcome) in enumerate(zip(batch, outcomes, strict=True)):
                trace = to_trace(forest, tree, problem, sample, outcome, task, restored.tokenizer)
                lines.append(json_line(trace))
            lease.check()
            file.write("".join(lines))
            file.flush()
            mirror.push(seldom=True)
            signals.check()


def answer_one(restored: Restored, problem: Problem) -> ThreadForest:
    """Decodes one problem greedily; returns a forest of one tree with numpy leaves."""
    limits = restored.config.limits
    prompts = prompts_of(restored, [problem], limits, GREEDY)
    ((_, forest),) = make_runner(restored, limits, 1).stream(prompts, restored.config.seed)
    return forest


@dataclasses.dataclass(frozen=True)
class Runner:
    """A checkpoint with its rollout, which is compiled once for one shape.

    Attributes:
      rollout: the rollout on the devices.
      params: the weights, whole on each of the devices.
      batch: trees of one call.
      slots: decode slots of each device.
    """

    rollout: Rollout
    params: Any
    batch: int
    slots: int

    def stream(
        self, prompts: Prompts, seed: int, done: int = 0, progress: bool = False
    ) -> Iterator[tuple[int, ThreadForest]]:
        """Yields batches of decoded trees; see `evaluate.stream`."""
        return stream(
            self.rollout,
            self.params,
            prompts,
            run_key(seed, Domain.EVALUATION),
            batch=self.batch,
            slots=self.slots,
            done=done,
            progress=progress,
            label="eval",
        )


def make_runner(restored: Restored, limits: Limits, batch: int) -> Runner:
    """Makes a runner on as many devices of this process as `batch` trees can use.

    The runner's batches may be a little larger than asked, so that the devices share them equally.
    """
    mesh = make_mesh(devices=jax.local_devices()[:batch])
    batch += -batch % mesh.size
    schedule = restored.config.schedule

    trees_per_device = batch // mesh.size
    slots = min(schedule.slots, trees_per_device * limits.max_threads)
    small_batch_sizes = schedule.small_batch_sizes
    if trees_per_device == 1:
        small_batch_sizes = tuple(size for size in _LONE_TREE_BATCHES if size < slots)
    return _make(restored, limits, mesh, batch, slots, small_batch_sizes)


def make_lone_runner(restored: Restored, limits: Limits, slots: int) -> Runner:
    """Makes a runner for one tree a call, on one device, that always steps all `slots`."""
    mesh = make_mesh(devices=jax.local_devices()[:1])
    return _make(restored, limits, mesh, batch=1, slots=slots, small_batch_sizes=())


def _make(
    restored: Restored,
    limits: Limits,
    mesh: jax.sharding.Mesh,
    batch: int,
    slots: int,
    small_batch_sizes: tuple[int, ...],
) -> Runner:
    """Makes a runner whose schedule is the checkpoint's own but for the decode slots."""
    schedule = restored.config.schedule
    schedule = dataclasses.replace(
        schedule,
        slots=slots,
        prefill_batch=min(schedule.prefill_batch, slots),
        small_batch_sizes=small_batch_sizes,
    )
    rollout = _rollout(restored.config.model, limits, schedule, mesh)
    return Runner(rollout, place_whole(restored.params, mesh), batch, slots)


@functools.lru_cache(maxsize=8)
def _rollout(
    model: ModelConfig, limits: Limits, schedule: Schedule, mesh: jax.sharding.Mesh
) -> Rollout:
    """Returns the same function for the same shape, so that JAX compiles it once in a process."""
    return make_policy_rollout(model, limits, schedule, mesh, mesh.axis_names)
