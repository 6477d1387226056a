"""Any task but the paper's: its methods side by side, trained and evaluated in the same way.

The life of a run (OUT is its folder), whose stages `paper/stages.py` runs once each:
1. data          OUT/data: problems, tokenizer, and the demonstrations of every method.
2. <method>/sft  OUT/<method>/sft: supervised training, for each method.
3. <method>/rl   OUT/<method>/rl: reinforcement learning from there, for each method.
4. eval/NAME     OUT/eval/NAME: greedy answers to all test problems, in the model's own window and
                 in each of `evaluate.windows`. Serial methods also answer `evaluate.samples` times
                 at the highest of `evaluate.temperatures`, for votes.
5. report        OUT/results.json: a row for each evaluation, and every parallel method against
                 every serial one of the same stage.

Nothing here is chosen among several by its score, so no score is flattered by the choice. The
comparisons are:

- *same window*: greedy answers of both.
- *same total tokens*: one greedy tree against the vote of the fewest samples that take as many
  tokens together, or of all there are. It is one greedy answer where that takes as many already.
- *the chain of the parallel method*: both within as many sequential tokens as 95% of the parallel
  answers take. An answer that takes longer counts as wrong. The serial method votes with all its
  samples, which decode side by side; those that take longer have no vote.
- *the chain of the serial method*: greedy answers of both, within as many sequential tokens as 95%
  of the serial answers take.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.build import check_methods, fitting_methods, problem_file
from apr_jax.errors import UsageError
from apr_jax.evaluate import failures
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.folder import SUMMARY, read_answers
from apr_jax.evaluate.intervals import paired_gap
from apr_jax.evaluate.scores import Trace, by_problem, consensus, mean, warnings
from apr_jax.paper.results import Answered, Score, share
from apr_jax.paper.suite import STAGES, Evaluation, model_of
from apr_jax.paper.tables import cell
from apr_jax.paper.trainings import trainings
from apr_jax.tasks import SandboxedVerifier, load_problems, make_task
from apr_jax.train.session import read_tokenizer

_Row = dict[str, Any]

# Fields of `evaluate` that mean something for the paper's methods only.
_OF_THE_PAPER = ("children", "bins", "forced", "timed", "ablations")
# What is equal in a comparison -> how its title says so.
EQUAL = {
    "window": "same window ({limit})",
    "tokens": "same total tokens",
    "parallel chain": "within {limit} sequential tokens, those of {parallel}",
    "serial chain": "within {limit} sequential tokens, those of {serial}",
}
# An answer is in time if it takes no longer than this share of a method's answers do.
_IN_TIME = 0.95
_MEASURES = ("total_tokens", "sequential_tokens", "children", "max_thread_tokens")


def methods_of(config: Experiment) -> tuple[str, ...]:
    """Returns the methods that a run compares: those it names, or all that fit its limits."""
    return config.evaluate.methods or tuple(fitting_methods(make_task(config.task, config.limits)))


def check(config: Experiment) -> None:
    """Refuses an experiment whose methods cannot be compared, before anything runs.

    Raises:
      UsageError: names the field, the value and what would be right.
    """
    methods = methods_of(config)
    check_methods(config, methods)
    known = make_task(config.task, config.limits).methods
    kinds = {known[name].parallel for name in methods}
    if kinds != {True, False}:
        raise UsageError(
            f"config task.kind={config.task.kind!r}: `apr reproduce` compares a method whose"
            f" threads spawn with one whose threads do not; evaluate.methods are"
            f" {', '.join(methods) or '(none)'}. `apr data build`, `apr train` and `apr eval` take"
            " any task"
        )
    settings = config.evaluate
    for field in _OF_THE_PAPER:
        if getattr(settings, field) != getattr(EvalConfig(), field):
            raise UsageError(
                f"evaluate.{field}={getattr(settings, field)}: is about the methods of the paper's"
                f" task; leave it out for task {config.task.kind!r}"
            )
    if not all(2 <= window < config.limits.window for window in settings.windows):
        raise UsageError(
            f"evaluate.windows={settings.windows}: each must be from 2 to"
            f" {config.limits.window - 1}, below limits.window, which is evaluated anyway"
        )


def check_windows(config: Experiment, data: Path) -> None:
    """Refuses windows into which a prompt of the built test problems does not fit.

    Raises:
      UsageError: names the window, the problem and the length of its prompt.
    """
    task = make_task(config.task)
    tokenizer = read_tokenizer(data)
    for problem in load_problems(data / problem_file("test"), task):
        tokens = 1 + len(tokenizer.encode(task.prompt(problem)))  # With `<bos>`.
        for window in config.evaluate.windows:
            if tokens >= window:
                raise UsageError(
                    f"evaluate.windows={config.evaluate.windows}: the prompt of test problem"
                    f" {problem.id!r} takes {tokens} of {window} positions and leaves no room"
                )


def declare(config: Experiment) -> tuple[Evaluation, ...]:
    """Lists every evaluation of a run, the greedy ones in the models' own window first."""
    settings = config.evaluate
    methods = methods_of(config)
    models = [f"{method}/{stage}" for method in methods for stage in STAGES]
    evaluations = [Evaluation(model) for model in models]
    for window in settings.windows:
        evaluations += [Evaluation(model, Decoding(window=window)) for model in models]
    if settings.temperatures and settings.samples > 1:
        known = make_task(config.task, config.limits).methods
        decoding = Decoding(samples=settings.samples, temperature=max(settings.temperatures))
        evaluations += [
            Evaluation(model, decoding, settings.problems)
            for model in models
            if not known[_method(model)].parallel
        ]
    return tuple(dict.fromkeys(evaluations))  # Each once.


def results(config: Experiment, run: Path, models: Path) -> dict[str, Any]:
    """Reads the finished evaluations of a run, and compares its methods.

    Args:
      config: the experiment.
      run: folder of the run.
      models: folder of the run that trained the models, as a rule `run` itself.

    Returns:
      `main`: name of a greedy evaluation -> its summary, with `label`, `failures` by kind, and its
      `measures` with their intervals; `trainings`: what each model had seen; `comparisons`: rows as
      `paper.comparisons` has them, with the two `methods`, the `stage`, what is `equal` and its
      `limit`; `warnings`; and `missing`, a line for each evaluation that was not run.
    """
    task = make_task(config.task, config.limits)
    answered: dict[str, Answered] = {}
    missing = []
    for evaluation in declare(config):
        folder = run / "eval" / evaluation.name
        if (folder / SUMMARY).is_file():
            summary, traces = read_answers(folder)
            answered[evaluation.name] = Answered(evaluation, traces, summary)
        elif model_of(models, evaluation.model):
            missing.append(f"{label(evaluation)}: not evaluated yet")
        else:
            missing.append(f"{label(evaluation)}: there is no trained model ({evaluation.model})")

    lines = []
    for one in answered.values():
        expects_children = task.methods[_method(one.evaluation.model)].parallel
        lines += [
            f"{label(one.evaluation)}: {line}"
            for line in warnings(one.summary, expects_children, None)
        ]

    main = {}
    # What threads joined is model text, so it is scored in processes of its own.
    reward = config.train.rl.reward
    with SandboxedVerifier(
        task, reward.time_limit, reward.memory_limit, reward.workers
    ) as verifier:
        for name, one in answered.items():
            if one.evaluation.decoding.temperature:
                continue
            correct = failures.sandboxed(one.traces, task, verifier)
            labelled = failures.label(one.traces, task, correct)
            main[name] = one.summary | {
                "label": label(one.evaluation),
                "failures": failures.count(labelled),
                "measures": {key: cell(one.measure(key)) for key in _MEASURES},
            }
    rows = list(_comparisons(config, answered))
    steps = {one.evaluation.model: one.summary["step"] for one in answered.values()}
    return {
        "main": main,
        "trainings": trainings(models, steps),
        "comparisons": rows,
        "warnings": lines,
        "missing": missing,
    }


def label(evaluation: Evaluation) -> str:
    """Writes an evaluation in words, for example `serial after RL, window 80`."""
    decoding = evaluation.decoding
    parts = [f"{_method(evaluation.model)}{_after(evaluation.model.partition('/')[2])}"]
    if decoding.window is not None:
        parts.append(f"window {decoding.window}")
    if decoding.temperature:
        parts.append(f"{decoding.samples} samples at T = {decoding.temperature:g}")
    return ", ".join(parts)


def _method(model: str) -> str:
    """Returns the method of a model such as `serial/rl`."""
    return model.partition("/")[0]


def _after(stage: str) -> str:
    """Says behind the name of a method that its model had RL; "" if it had none."""
    return " after RL" if stage == "rl" else ""


def _comparisons(config: Experiment, answered: dict[str, Answered]) -> Iterator[_Row]:
    """Yields the comparisons of each parallel method with each serial one, stage by stage."""
    known = make_task(config.task, config.limits).methods
    methods = methods_of(config)
    for stage in STAGES:
        for parallel in methods:
            for serial in methods:
                if known[parallel].parallel and not known[serial].parallel:
                    yield from _Pair(config, answered, parallel, serial, stage).rows()


class _Pair:
    """A parallel and a serial method that are compared after one stage of training.

    Args:
      config: the experiment.
      answered: the finished evaluations, by name.
      parallel: name of the parallel method.
      serial: name of the serial method.
      stage: "sft" or "rl".
    """

    def __init__(
        self,
        config: Experiment,
        answered: dict[str, Answered],
        parallel: str,
        serial: str,
        stage: str,
    ):
        self._config = config
        self._answered = answered
        self._methods = (parallel, serial)
        self._stage = stage

    def rows(self) -> Iterator[_Row]:
        """Yields every comparison whose evaluations the run has."""
        for window in (None, *self._config.evaluate.windows):
            tree, answer = (self._find(name, Decoding(window=window)) for name in self._methods)
            if tree and answer:
                positions = self._config.limits.window if window is None else window
                yield self._row("window", positions, _greedy(tree), _greedy(answer))

        tree, answer = (self._find(name, Decoding()) for name in self._methods)
        if tree is None or answer is None:
            return
        samples = self._samples()
        if samples:
            rival = _with_as_many_tokens(tree, answer, samples)
            yield self._row("tokens", None, _greedy(tree), rival)

            limit = chain_in_time(tree.traces)
            rival = _votes_within(samples, limit)
            yield self._row("parallel chain", limit, _within(tree, limit), rival)

        limit = chain_in_time(answer.traces)
        yield self._row("serial chain", limit, _within(tree, limit), _within(answer, limit))

    def _find(self, method: str, decoding: Decoding) -> Answered | None:
        """Returns the answers of a method to all test problems; None if they were not given."""
        return self._answered.get(Evaluation(f"{method}/{self._stage}", decoding).name)

    def _samples(self) -> Answered | None:
        """Returns the samples of the serial method; None if there are none."""
        model = f"{self._methods[1]}/{self._stage}"
        for one in self._answered.values():
            if one.evaluation.model == model and one.evaluation.decoding.temperature:
                return one
        return None

    def _row(self, equal: str, limit: int | None, tree: _Side, answer: _Side) -> _Row:
        """Computes the gap of the parallel side over the serial one.

        Args:
          equal: what is equal for both, a key of EQUAL.
          limit: the window, or how many sequential tokens count as in time.
          tree: the parallel side.
          answer: the serial side.
        """
        parallel, serial = self._methods
        what = EQUAL[equal].format(limit=limit, parallel=parallel, serial=serial)
        gap = paired_gap(tree.score.values, answer.score.values)
        shared = [name for name in tree.score.values if name in answer.score.values]
        rival = f"{serial} {answer.voted}" if answer.voted else serial
        return {
            "comparison": f"{what}: {parallel}, {rival}{_after(self._stage)}",
            "methods": [parallel, serial],
            "stage": self._stage,
            "equal": equal,
            "limit": limit,
            "one": mean(tree.score.values[name] for name in shared),
            "other": mean(answer.score.values[name] for name in shared),
            "one_spent": tree.spent,
            "other_spent": answer.spent,
            "gap": gap.gap,
            "low": gap.low,
            "high": gap.high,
            "p": gap.p,
            "n": gap.n,
            "unit": "%",
            "paper": "",
            "reached": None,
            "chosen": "",
            "note": answer.voted,
        }


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two sides of a comparison.

    Attributes:
      score: its score, by problem.
      spent: the mean of each measure of an answer's tree, or of all trees that vote.
      voted: how its samples vote, for example "cons@3"; "" if a tree is an answer.
    """

    score: Score
    spent: dict[str, float]
    voted: str = ""


def _greedy(answered: Answered) -> _Side:
    """Returns the side whose every tree is an answer."""
    return _Side(answered.accuracy(), answered.spent(answered.groups))


def _with_as_many_tokens(tree: Answered, answer: Answered, samples: Answered) -> _Side:
    """Returns the serial side that takes as many total tokens as a tree.

    It is the vote of the fewest samples that do, or of all there are; or the greedy answer, if that
    takes as many already.
    """
    shared = [name for name in samples.groups if name in tree.groups]
    tokens = tree.spent(shared)["total_tokens"]
    if answer.spent(shared)["total_tokens"] >= tokens:
        return _greedy(answer)
    numbers = range(1, len(samples.by_n) + 1)
    enough = (n for n in numbers if samples.spent(shared, n)["total_tokens"] >= tokens)
    count = next(enough, len(samples.by_n))
    _, agreed, _ = samples.by_n[count - 1]
    return _Side(agreed, samples.spent(shared, count), f"cons@{count}")


def _within(answered: Answered, limit: int) -> _Side:
    """Returns a side whose answers count as wrong if they take more sequential tokens."""
    values = {
        name: mean(tree["correct"] and tree["sequential_tokens"] <= limit for tree in trees)
        for name, trees in answered.groups.items()
    }
    return _Side(share(values), answered.spent(answered.groups))


def _votes_within(samples: Answered, limit: int) -> _Side:
    """Returns a side in which the samples vote that take at most so many sequential tokens."""
    in_time = by_problem(trace for trace in samples.traces if trace["sequential_tokens"] <= limit)
    agreed = {name: float(consensus(in_time.get(name, []))) for name in samples.groups}
    count = len(samples.by_n)
    return _Side(share(agreed), samples.spent(samples.groups, count), f"cons@{count}")


def chain_in_time(traces: Sequence[Trace]) -> int:
    """Returns the fewest sequential tokens in which 95% of the trees end."""
    chains = sorted(trace["sequential_tokens"] for trace in traces)
    return int(chains[math.ceil(_IN_TIME * len(chains)) - 1])
