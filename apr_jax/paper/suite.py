"""The evaluations of a run, declared in one place. Every figure and table is drawn from them.

The life of a figure:
1. `declare` lists the evaluations that a config wants; the models that a run may hold are in
   MODELS. `choosing` lists evaluations of validation problems, which choose where a comparison
   takes the best of several.
2. `apr reproduce` makes a stage of each evaluation whose model exists. The stage writes
   RUN/eval/NAME (`evaluate/runner`). The plain evaluations of the headline come first.
3. `paper/results` reads the finished evaluations. A figure whose evaluations are missing is left
   out, and the report says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path

from apr_jax.config import EvalConfig, Experiment, override
from apr_jax.data.build import stated_conditions
from apr_jax.errors import UsageError
from apr_jax.evaluate.decoding import Decoding
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.train.checkpoint import FOLDER
from apr_jax.train.checkpoint.exported import SUFFIX

# APR with a random parent beam: parents of its demonstrations draw how many first steps they try,
# from 1 up, as published (task.solver.parent_beam_low=1). The parents of a run's main APR need not.
RANDOM_PARENT_BEAM = "apr+drawn"

# Serial search whose demonstrations have wider beams than published (task.solver.serial_beam). At
# mini it is stronger than SoS+ with the published beams.
BEAMS_1_TO_15 = "sos+beam15"

# Serial search from both ends, in a run whose threads search so (task.solver.search). SoS+ itself
# and all other serial searches of such a run go forward (`own_config`).
BOTH_ENDS = "sos+both-ends"

# Folder of a serial search that may be stronger than SoS+ as published -> what sets it apart.
STRONGER = {BEAMS_1_TO_15: "with beams 1 to 15", BOTH_ENDS: "from both ends"}

# Folder in a run -> the method whose demonstrations the model imitates, and the config fields that
# differ from the run's. `apr reproduce` trains them with `evaluate.ablations=true`: the rows of
# Tables 1 and 2 and of Fig. 5 beside the main comparison, and the stronger serial searches.
ABLATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sos": ("sos", ()),
    BEAMS_1_TO_15: ("sos+", ("task.solver.serial_beam=15",)),
    BOTH_ENDS: ("sos+", ()),
    "sos+rejection": ("sos+", ("data.correct_only=true",)),
    RANDOM_PARENT_BEAM: ("apr", ("task.solver.parent_beam_low=1",)),
}

# What makes a serial search go forward where the run's threads search from both ends: depth first
# and in a fixed order, and past no large number, as models of a million parameters learn it best
# (experiments/mini.py).
_FORWARD = (
    "task.solver.search=beam",
    "task.solver.max_intermediate=200",
    "task.solver.false_claims=0",
    "task.solver.spawn_probability=1",
    "task.solver.shuffle=false",
)

# Folder of the checkpoint in a run -> the name of the model in tables. Every model that is trained
# into one of these folders is evaluated.
MODELS = {
    "sos/sft": "SoS",
    "sos+/sft": "SoS+",
    "sos+/rl": "SoS+ after RL",
    "apr/sft": "APR",
    "apr/rl": "APR after RL",
    f"{RANDOM_PARENT_BEAM}/sft": "APR, random parent beam",
    f"{RANDOM_PARENT_BEAM}/rl": "APR, random parent beam, after RL",
    "apr-nested/sft": "nested APR",
    "apr-nested/rl": "nested APR after RL",
    f"{BEAMS_1_TO_15}/sft": "SoS+ with beams 1 to 15",
    f"{BEAMS_1_TO_15}/rl": "SoS+ with beams 1 to 15 after RL",
    f"{BOTH_ENDS}/sft": "SoS+ from both ends",
    f"{BOTH_ENDS}/rl": "SoS+ from both ends after RL",
    "sos+rejection/sft": "SoS+, rejection sampling",
}
STAGES = ("sft", "rl")

# The models that every run trains, in words for a reader who does not know the paper.
MAIN_MODELS = {
    "sos+/sft": "serial search (SoS+)",
    "sos+/rl": "serial search, after RL",
    "apr/sft": "thread tree (APR)",
    "apr/rl": "thread tree, after RL",
}

# Serial models that may be stronger than SoS+ as published.
STRONGER_MODELS = tuple(f"{folder}/{stage}" for folder in STRONGER for stage in STAGES)

# Serial models whose samples vote.
_VOTING = ("sos+/sft", "sos+/rl", *STRONGER_MODELS)

# Models of which comparisons take the best of several evaluations.
_COMPETING = ("apr/sft", "apr/rl", *_VOTING)


def parallel(model: str) -> bool:
    """Returns whether a model spawns: its conditions are children, and else window bins."""
    return model.startswith("apr")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
      model: a key of MODELS.
      decoding: how its trees are decoded.
      problems: how many of the test problems it answers, from the first; None takes all.
      validation: whether it answers the last `problems` validation problems instead. Where several
        evaluations compete, these choose among them, and the chosen one is scored by its answers to
        test problems. (The first validation problems chose the step of each training.)
    """

    model: str
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    problems: int | None = None
    validation: bool = False

    @property
    def name(self) -> str:
        """The folder in RUN/eval.

        It names the model, then each difference from one greedy answer to every problem.
        """
        decoding = self.decoding
        parts = [self.model.replace("/", "-")]
        if decoding.temperature:
            parts.append(f"t{decoding.temperature:g}")
        if decoding.window is not None:
            parts.append(f"w{decoding.window}")
        if decoding.condition is not None:
            letter = "c" if parallel(self.model) else "b"  # Children, or window bins.
            parts.append(f"{letter}{decoding.condition}")
        if decoding.forced is not None:
            parts.append(f"f{decoding.forced}")
        if decoding.samples > 1:
            parts.append(f"n{decoding.samples}")
        if self.problems is not None:
            split = "v" if self.validation else "p"
            parts.append(f"{split}{self.problems}")
        return "-".join(parts)

    @property
    def plain(self) -> bool:
        """Whether the model chooses its children itself: none requested, none forced."""
        return dataclasses.replace(self.decoding, samples=1, temperature=0.0) == Decoding()


def declare(config: EvalConfig) -> tuple[Evaluation, ...]:
    """Lists every evaluation of a run that has all models, those of the headline first."""
    models = MODELS if config.compared else MAIN_MODELS
    evaluations = []
    for temperature in plain_temperatures(config):
        # All test problems at the temperature of the headline. From here on the first
        # `config.problems` of them.
        problems = None if temperature == config.headline else config.problems
        for model in models:
            samples = _samples(model, temperature, config)
            decoding = Decoding(samples=samples, temperature=temperature)
            evaluations.append(Evaluation(model, decoding, problems))
    problems = config.problems

    # APR with requested children, and with forced children.
    for temperature in (0.0, *config.temperatures):
        for count in config.children:
            decoding = Decoding(temperature=temperature, condition=count)
            evaluations.append(Evaluation(f"apr/{config.sweep}", decoding, problems))
        for method, counts in _forced_children(temperature, config).items():
            for forced in counts:
                decoding = Decoding(temperature=temperature, forced=forced)
                evaluations += [
                    Evaluation(f"{method}/{stage}", decoding, problems) for stage in STAGES
                ]

    # A control of RL's gain: a random parent beam with the most children requested.
    for temperature in compared_temperatures(config):
        for count in config.children[-1:]:
            decoding = Decoding(temperature=temperature, condition=count)
            evaluations.append(Evaluation(f"{RANDOM_PARENT_BEAM}/sft", decoding, problems))

    # SoS+ with requested window bins.
    for bins in config.bins:
        evaluations.append(Evaluation(f"sos+/{config.sweep}", Decoding(condition=bins), problems))

    wanted = (evaluation for evaluation in evaluations if evaluation.model in models)
    return tuple(dict.fromkeys(wanted))  # Each once.


def plain_temperatures(config: EvalConfig) -> tuple[float, ...]:
    """Returns the temperatures of plain evaluations, each once, that of the headline first."""
    return tuple(dict.fromkeys((config.headline, 0.0, *config.temperatures)))


def _forced_children(temperature: float, config: EvalConfig) -> dict[str, tuple[int, ...]]:
    """Returns, by method, how many children its roots are forced to spawn at a temperature.

    A model with a random parent beam breaks where its root is forced to spawn more children than it
    would have, so it is forced to spawn the smallest number only.
    """
    if temperature:
        return {"apr": config.forced[-1:], RANDOM_PARENT_BEAM: ()}
    return {"apr": config.forced, RANDOM_PARENT_BEAM: config.forced[:1]}


def validated(evaluation: Evaluation, config: EvalConfig) -> Evaluation:
    """Returns the same evaluation of validation problems."""
    return dataclasses.replace(evaluation, problems=config.validation, validation=True)


def choosing(config: EvalConfig) -> tuple[Evaluation, ...]:
    """Evaluations of validation problems that choose where comparisons take the best of several.

    There is one for each evaluation that competes, if the run is compared at all.
    """
    if not config.compared:
        return ()
    return tuple(
        validated(evaluation, config)
        for evaluation in declare(config)
        if evaluation.model in _COMPETING and evaluation.decoding.forced is None
    )


def compared_temperatures(config: EvalConfig) -> tuple[float, ...]:
    """Returns the temperatures of comparisons: 0, and the highest one if there is any.

    At the highest the paper compares total tokens, and its policy learns.
    """
    return (0.0, *sorted(config.temperatures)[-1:])


def timed(config: EvalConfig) -> tuple[Evaluation, ...]:
    """Evaluations whose problems are also answered one at a time, to measure seconds.

    They are the greedy ones that compete in seconds (Fig. 6 and the comparisons).
    """
    if not config.timed:
        return ()
    return tuple(
        evaluation
        for evaluation in declare(config)
        if evaluation.model in _COMPETING
        and evaluation.decoding.temperature == 0
        and evaluation.decoding.forced is None
    )


def timed_votes(config: EvalConfig) -> tuple[Evaluation, ...]:
    """Evaluations of which samples of a problem are timed side by side: votes compete in seconds.

    They are those of serial models at the highest temperature.
    """
    if not config.timed:
        return ()
    highest = compared_temperatures(config)[-1]
    return tuple(
        evaluation
        for evaluation in declare(config)
        if evaluation.decoding.samples > 1 and evaluation.decoding.temperature == highest
    )


def timed_on_slots(config: EvalConfig) -> tuple[Evaluation, ...]:
    """Evaluations that are also timed on 1, 2, 4, ... decode slots, for the cost model."""
    return tuple(evaluation for evaluation in timed(config) if evaluation == Evaluation("apr/rl"))


def is_of_the_paper(config: Experiment) -> bool:
    """Returns whether the task of an experiment is the paper's, which the suite is about.

    Countdown with all solutions has other methods, so it is another task here.
    """
    options = config.task.options
    return isinstance(options, CountdownConfig) and options.solutions == "one"


# A serial demonstration of a run from both ends has some fourth of a tree's tokens. With as many
# times the demonstrations, both sides read each of theirs about equally often.
_SERIAL_DEMONSTRATIONS = 4


def own_config(config: Experiment, folder: str) -> Experiment:
    """Returns the config of a model of a run.

    Args:
      config: the config of the run.
      folder: where the run has the model: a method, or a key of ABLATIONS.
    """
    _, settings = ABLATIONS.get(folder, (folder, ()))
    if from_both_ends(config) and not parallel(folder):
        assert isinstance(config.data.demonstrations, int)  # `reproduce` takes no file.
        count = _SERIAL_DEMONSTRATIONS * config.data.demonstrations
        forward = () if folder == BOTH_ENDS else _FORWARD
        settings = (*forward, f"data.demonstrations={count}", *settings)
    return override(config, list(settings)) if settings else config


def from_both_ends(config: Experiment) -> bool:
    """Returns whether the threads of a run search from both ends."""
    return bool(config.task.options.solver.search == "bidirectional")


def check(config: Experiment) -> None:
    """Refuses a suite that the config's models cannot answer, before anything runs.

    Raises:
      UsageError: names the field, the value and what would be right.
    """
    for field in ("windows", "methods"):
        values = getattr(config.evaluate, field)
        if values:
            raise UsageError(
                f"evaluate.{field}={values}: is about other tasks; leave it out for task"
                f" {config.task.kind!r}, whose evaluations are the paper's"
            )
    _check_validation(config)
    solver = config.task.options.solver
    limits = config.limits
    most_forced = limits.max_threads - 1 if limits.max_depth else 0  # The root is a thread too.
    most_bins = math.ceil(limits.window / solver.window_bin)
    for field, low, high in (
        ("children", 0, solver.max_children),
        ("bins", 1, most_bins),
        ("forced", 0, most_forced),
    ):
        values = getattr(config.evaluate, field)
        if any(not low <= value <= high for value in values):
            raise UsageError(f"evaluate.{field}={values}: must be from {low} to {high}")
        if values and field != "forced" and not solver.condition:
            raise UsageError(
                f"evaluate.{field}={values}: the models are trained without conditions"
                " (task.solver.condition=0)"
            )


def _check_validation(config: Experiment) -> None:
    """Refuses a suite whose choices would be made on problems that chose the steps of trainings.

    Raises:
      UsageError: names the field.
    """
    if not config.evaluate.compared:
        return
    train = config.train
    for_steps = max(
        train.sft.validation if train.sft.validate_every else 0,
        train.rl.validation if train.rl.validate_every else 0,
    )
    choosing = config.evaluate.validation
    if config.data.heldout < for_steps + choosing:
        raise UsageError(
            f"data.heldout={config.data.heldout}: must be at least {for_steps + choosing}, because"
            f" {for_steps} validation problems choose the step of each training"
            " (train.sft.validation, train.rl.validation), and"
            f" evaluate.validation={choosing} others choose between evaluations"
        )


def check_conditions(config: Experiment, data: Path, methods: Collection[str]) -> None:
    """Refuses a sweep over conditions that the built data never state.

    No model that was trained on the data has learned what such a condition means.

    Args:
      config: the config of the data.
      data: their folder.
      methods: the methods to look at.

    Raises:
      UsageError: names the field, the values and what the demonstrations state.
      UserError: `data` holds no demonstrations of one of these methods that is swept.
    """
    for field, method in (("children", "apr"), ("bins", "sos+")):
        values = getattr(config.evaluate, field)
        if not values or method not in methods:
            continue
        stated = stated_conditions(data, method)
        unknown = [value for value in values if value not in stated]
        if unknown:
            raise UsageError(
                f"evaluate.{field}={values}: no demonstration of {method!r} in {data} states"
                f" {' or '.join(map(str, unknown))}; they state"
                f" {', '.join(map(str, stated)) or 'nothing'}"
            )


def model_of(run: Path, model: str) -> Path | None:
    """Finds the path of a model in a run; returns None if the run has no such model.

    It is a training in RUN/<method>/<stage>, or else an exported checkpoint
    RUN/<method>-<stage>.safetensors.
    """
    trained = run / model
    if (trained / FOLDER).is_dir():
        return trained
    exported = run / f"{model.replace('/', '-')}{SUFFIX}"
    return exported if exported.is_file() else None


def _samples(model: str, temperature: float, config: EvalConfig) -> int:
    """Samples a problem: several for the models whose pass@n and cons@n compete with APR's threads.

    Greedy samples would be alike, and the headline is of single answers.
    """
    if temperature in (0.0, config.headline):
        return 1
    return config.samples if model in _VOTING else 1
