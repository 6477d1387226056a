"""The finished evaluations of a run, read back from its folder.

Figures, tables and comparisons are made from these alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from apr_jax.config import ConfigError, Experiment, from_dict
from apr_jax.data.build import check_files, fitting_methods
from apr_jax.data.statistics import wilson
from apr_jax.errors import UserError
from apr_jax.evaluate import failures
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.folder import SUMMARY, read_answers
from apr_jax.evaluate.intervals import mean_interval
from apr_jax.evaluate.latency import LATENCY, SLOTS, VOTES
from apr_jax.evaluate.scores import Trace, by_problem, consensus, mean
from apr_jax.paper import suite
from apr_jax.paper.oracle import demonstrated
from apr_jax.tasks import Task, load_problems, make_task
from apr_jax.text.stored import tokenizer_from_bytes

# Measure -> how the values of several trees that are sampled side by side become one.
_TOGETHER: dict[str, Callable[..., float]] = {
    "total_tokens": sum,
    "sequential_tokens": max,
    "children": sum,
    "max_thread_tokens": max,
}


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean over problems with its 95% interval.

    Attributes:
      mean: the mean.
      low, high: the interval.
      values: problem -> its share of right answers, or its value of another measure.
    """

    mean: float
    low: float
    high: float
    values: dict[str, float]


def share(values: dict[str, float]) -> Score:
    """Returns the share of right answers with Wilson's interval.

    The interval counts problems, not samples, because samples of one problem are not independent.
    """
    count = len(values)
    mean = sum(values.values()) / count
    return Score(mean, *wilson(round(mean * count), count), values)


def average(values: dict[str, float]) -> Score:
    """Returns the mean of any measure, with the interval of a bootstrap over problems."""
    mean = sum(values.values()) / len(values)
    return Score(mean, *mean_interval(list(values.values())), values)


@dataclasses.dataclass(frozen=True)
class Answered:
    """A finished evaluation.

    Attributes:
      evaluation: its declaration.
      traces: all its trees. Traces of plain evaluations, at the temperatures of the headline and of
        comparisons, have a `failure`.
      summary: what `summary.json` holds.
      latency: what `latency.json` holds; None if it was not measured.
      votes: what `votes.json` holds; None if it was not measured.
      slots: what `slots.json` holds; None if it was not measured.
      validated: the same evaluation of validation problems, which chooses where comparisons take
        the best of several; None if it was not run.
    """

    evaluation: suite.Evaluation
    traces: list[Trace]
    summary: dict[str, Any]
    latency: dict[str, Any] | None = None
    votes: dict[str, Any] | None = None
    slots: dict[str, Any] | None = None
    validated: Answered | None = None

    @functools.cached_property
    def groups(self) -> dict[str, list[Trace]]:
        """Returns, for each problem, the traces of its samples in order."""
        return by_problem(self.traces)

    @property
    def label(self) -> str:
        """The evaluation in words, for legends and tables."""
        return label(self.evaluation)

    def accuracy(self) -> Score:
        """Returns the share of right answers."""
        return share(
            {name: mean([tree["correct"] for tree in trees]) for name, trees in self.groups.items()}
        )

    def mean(self, name: str) -> float:
        """Returns the mean of a measure over all traces."""
        return mean([tree[name] for tree in self.traces])

    def seconds(self) -> float | None:
        """Returns the mean over the timed problems of their median seconds; None if none was."""
        return mean(self.latency["seconds"].values()) if self.latency else None

    def measure(self, name: str) -> Score:
        """Returns the mean of a measure over problems, with its interval."""
        return average(
            {key: mean([tree[name] for tree in trees]) for key, trees in self.groups.items()}
        )

    def spent(self, problems: Iterable[str], votes: int | None = None) -> dict[str, float]:
        """Returns what an answer to one of these problems took: the mean of each measure.

        Args:
          problems: ids of the problems.
          votes: number of samples whose vote is an answer; None where every tree is an answer. The
            samples are taken side by side, so their tokens add up and their longest chain counts.
        """
        groups = [self.groups[name] for name in problems]
        if votes is None:
            return {
                key: mean(mean(tree[key] for tree in group) for group in groups)
                for key in _TOGETHER
            }
        return {
            key: mean(together(tree[key] for tree in group[:votes]) for group in groups)
            for key, together in _TOGETHER.items()
        }

    def thread_tokens(self) -> float:
        """Returns the mean number of sampled tokens of a thread."""
        tokens = sum(tree["total_tokens"] for tree in self.traces)
        threads = sum(len(tree["threads"]) for tree in self.traces)
        return tokens / max(1, threads)

    @functools.cached_property
    def by_n(self) -> list[tuple[Score, Score, float]]:
        """Returns (pass@n, cons@n, total tokens) of the first n samples, for n from 1 to all."""
        return [self._of_first(n) for n in range(1, self.summary["samples"] + 1)]

    def _of_first(self, n: int) -> tuple[Score, Score, float]:
        """Computes pass@n, cons@n and total tokens of the first n samples."""
        passed = {}
        agreed = {}
        tokens = []
        for name, trees in self.groups.items():
            samples = trees[:n]
            passed[name] = float(any(tree["correct"] for tree in samples))
            agreed[name] = float(consensus(samples))
            tokens.append(sum(tree["total_tokens"] for tree in samples))
        return share(passed), share(agreed), mean(tokens)


@dataclasses.dataclass(frozen=True)
class Results:
    """All evaluations of one run, loaded from disk.

    Attributes:
      config: the run's experiment.
      answered: name -> finished evaluation.
      missing: a line for each declared evaluation that the run does not have, with the reason.
      oracle: method -> demonstrations of the test problems, written like traces.
    """

    config: Experiment
    answered: dict[str, Answered]
    missing: list[str]
    oracle: dict[str, list[Trace]]

    def get(self, model: str, **decoding: Any) -> Answered | None:
        """Finds the evaluation of a model by its decoding; None if the run does not have it.

        Args:
          model: a key of `suite.MODELS`.
          **decoding: fields of `Decoding`; the others have their defaults. Any number of samples
            and of problems matches.
        """
        wanted = dataclasses.asdict(Decoding()) | decoding
        for answered in self.answered.values():
            actual = dataclasses.asdict(answered.evaluation.decoding) | {"samples": 1}
            if answered.evaluation.model == model and actual == wanted:
                return answered
        return None

    def sweep(self, method: str, temperature: float = 0.0) -> list[Answered]:
        """Returns the evaluations of the swept model by condition, the smallest condition first.

        The condition is a number of requested children (APR) or of window bins (SoS+).
        """
        config = self.config.evaluate
        model = f"{method}/{config.sweep}"
        if method == "apr":
            points = [
                self.get(model, temperature=temperature, condition=count)
                for count in config.children
            ]
        else:
            points = [
                self.get(model, temperature=temperature, condition=bins) for bins in config.bins
            ]
        return [point for point in points if point]

    def headline(self) -> dict[str, Answered]:
        """Returns the evaluations that the report opens with, by name."""
        return self.plain(self.config.evaluate.headline)

    def plain(self, temperature: float) -> dict[str, Answered]:
        """Returns the plain evaluations at a temperature by name."""
        return {
            name: answered
            for name, answered in self.answered.items()
            if answered.evaluation.plain and answered.evaluation.decoding.temperature == temperature
        }


def read_run(run: Path, data: Path) -> Results:
    """Reads the finished evaluations of a run, and demonstrates the test problems of `data`.

    Raises:
      UserError: there is no config or no evaluation, or a file is damaged.
    """
    config = read_config(run)
    answered = {}
    missing = []
    untrained = set()
    for evaluation in suite.declare(config.evaluate):
        if (run / "eval" / evaluation.name / SUMMARY).is_file():
            answered[evaluation.name] = _read_evaluation(run, evaluation, config)
        elif _was_trained(run, evaluation.model):
            missing.append(f"{label(evaluation)}: not evaluated yet")
        else:
            untrained.add(evaluation.model)
    if not answered:
        raise UserError(
            f"{run}: has no evaluation of its suite; run `apr reproduce --out {run}` first"
        )

    # One line for a model that does not exist, in place of one for each of its evaluations.
    missing += [
        f"{suite.MODELS[model]}: there is no trained model ({model})"
        for model in suite.MODELS
        if model in untrained and _is_possible(model, config)
    ]
    return Results(config, answered, missing, _oracle(data, config))


def _read_evaluation(run: Path, evaluation: suite.Evaluation, config: Experiment) -> Answered:
    """Reads a finished evaluation, its seconds, and its answers to validation problems."""
    folder = run / "eval" / evaluation.name
    summary, traces = read_answers(folder)
    shown = (config.evaluate.headline, *suite.compared_temperatures(config.evaluate))
    if evaluation.plain and evaluation.decoding.temperature in shown:
        own = suite.own_config(config, evaluation.model.partition("/")[0])
        traces = failures.label(traces, make_task(own.task, own.limits))

    remedy = "delete its folder and evaluate again"
    return Answered(
        evaluation,
        traces,
        summary,
        latency=_read(folder / LATENCY, remedy),
        votes=_read(folder / VOTES, remedy),
        slots=_read(folder / SLOTS, remedy),
        validated=_validated(run, suite.validated(evaluation, config.evaluate)),
    )


def _is_possible(model: str, config: Experiment) -> bool:
    """Returns whether a run of this config may have a model."""
    return suite.from_both_ends(config) or model.partition("/")[0] != suite.BOTH_ENDS


def _was_trained(run: Path, model: str) -> bool:
    """Returns whether the run has or had the model: its metrics outlive a deleted checkpoint."""
    return bool(suite.model_of(run, model)) or (run / model / "metrics.jsonl").is_file()


def _validated(run: Path, evaluation: suite.Evaluation) -> Answered | None:
    """Reads an evaluation of validation problems; None if the run does not have it."""
    folder = run / "eval" / evaluation.name
    if not (folder / SUMMARY).is_file():
        return None
    summary, traces = read_answers(folder)
    return Answered(evaluation, traces, summary)


def label(evaluation: suite.Evaluation) -> str:
    """Writes an evaluation in words: the model, then each difference from one greedy answer."""
    decoding = evaluation.decoding
    parts = [suite.MODELS[evaluation.model]]
    if decoding.temperature:
        parts.append(f"T = {decoding.temperature:g}")
    if decoding.condition is not None:
        counted = "children" if suite.parallel(evaluation.model) else "window bins"
        parts.append(f"{decoding.condition} requested {counted}")
    if decoding.forced is not None:
        parts.append(f"{decoding.forced} forced children")
    return ", ".join(parts)


def problems_of(shown: Iterable[Answered | None]) -> str:
    """Says how many problems these evaluations have answered, for example `160 problems`."""
    counts = sorted({len(answered.groups) for answered in shown if answered})
    return " or ".join(f"{count:,}" for count in counts or [0]) + " problems"


def _oracle(data: Path, config: Experiment) -> dict[str, list[Trace]]:
    """Demonstrates the test problems, if the data's tokenizer and problems still exist.

    Each method searches as the run's model of that name does. The demonstrations state no
    condition, because plain evaluations request none. A stated number of children may be small, and
    then the demonstration searches less.
    """
    tokenizer_file = data / "tokenizer.model"
    problems = data / "test.jsonl"
    if not (tokenizer_file.is_file() and problems.is_file()):
        return {}
    check_files(data, tokenizer_file.name, problems.name)
    tokenizer = tokenizer_from_bytes(tokenizer_file.read_bytes())
    demonstrations: dict[str, list[Trace]] = {}
    for method in fitting_methods(_oracle_task(config)):
        task = _oracle_task(suite.own_config(config, method))
        loaded = load_problems(problems, task)
        demonstrations |= demonstrated(task, loaded, tokenizer, (method,))
    return demonstrations


def _oracle_task(config: Experiment) -> Task:
    """Makes the task of a config, without conditions."""
    solver = dataclasses.replace(config.task.options.solver, condition=0.0)
    return make_task(config.task.replace(solver=solver), config.limits)


def read_config(run: Path) -> Experiment:
    """Reads the config of a run.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = run / "config.json"
    values = _read(path, f"delete it; `apr reproduce --out {run}` writes it again")
    if values is None:
        raise UserError(f"{run}: has no config.json; run `apr reproduce --out {run}` first")
    try:
        return from_dict(values)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None


def _read(path: Path, remedy: str) -> dict[str, Any] | None:
    """Reads a JSON file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return values
    except ValueError:
        raise UserError(f"{path}: is damaged; {remedy}") from None
