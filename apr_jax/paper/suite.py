"""Which evaluations a run has: declared once, and every figure and table is drawn from them.

The life of a figure:
1. `declare` lists the evaluations that the config asks for, as values; the models that a run may
   hold are in MODELS. `choosing` lists those of validation problems, which choose where a
   comparison takes the best of several.
2. `apr reproduce` makes each of them whose model is there a stage: RUN/eval/NAME
   (`evaluate/runner`). All greedy ones come first.
3. `paper/results` reads what is there; a figure whose evaluations are missing is left out, and the
   report says so.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.build import stated_conditions
from apr_jax.errors import UsageError
from apr_jax.evaluate.runner import Decoding
from apr_jax.train.checkpoint.exported import SUFFIX
from apr_jax.train.checkpoint.manager import FOLDER

# APR whose parents draw their beams from 1 up, as published (solver.parent_beam_low=1), beside a
# run whose own do not.
DRAWN = "apr+drawn"
# Serial search of demonstrations with beams wider than published (solver.serial_beam), which at
# mini are stronger.
WIDE = "sos+beam15/sft"
# Folder in a run -> whose demonstrations it imitates, and the fields in which it differs from the
# run: the rows of Tables 1 and 2 and Fig. 5 beside the main comparison, which `apr reproduce`
# trains with `evaluate.ablations=true`.
ABLATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sos": ("sos", ()),
    "sos+beam15": ("sos+", ("solver.serial_beam=15",)),
    "sos+rejection": ("sos+", ("solver.correct_only=true",)),
    DRAWN: ("apr", ("solver.parent_beam_low=1",)),
}
# Folder of the checkpoint in a run -> what the tables call it. Whatever is trained into one of
# these is evaluated.
MODELS = {
    "sos/sft": "SoS",
    "sos+/sft": "SoS+",
    "sos+/rl": "SoS+ after RL",
    "apr/sft": "APR",
    "apr/rl": "APR after RL",
    f"{DRAWN}/sft": "APR, drawn beams",
    f"{DRAWN}/rl": "APR, drawn beams, after RL",
    "apr-nested/sft": "nested APR",
    "apr-nested/rl": "nested APR after RL",
    WIDE: "SoS+ on wide beams",
    "sos+rejection/sft": "SoS+, rejection sampling",
}
STAGES = ("sft", "rl")
# Models of which comparisons take the best of several evaluations.
_COMPETING = ("apr/sft", "apr/rl", "sos+/sft", "sos+/rl", WIDE)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
      model: a key of MODELS.
      decoding: how its trees are decoded.
      problems: the first so many of the test problems; None takes all.
      validation: whether it answers the last so many validation problems instead. Where several
        evaluations compete, these choose among them, and the chosen one is scored by its answers to
        test problems. The first validation problems chose the step of each training.
    """

    model: str
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    problems: int | None = None
    validation: bool = False

    @property
    def name(self) -> str:
        """Its folder in RUN/eval: the model, then what differs from one greedy answer to every
        problem.
        """
        d = self.decoding
        parts = [
            self.model.replace("/", "-"),
            f"t{d.temperature:g}" if d.temperature else "",
            f"c{d.condition}" if d.condition is not None else "",
            f"b{d.bins}" if d.bins is not None else "",
            f"f{d.forced}" if d.forced is not None else "",
            f"n{d.samples}" if d.samples > 1 else "",
            (
                f"{'v' if self.validation else 'p'}{self.problems}"
                if self.problems is not None
                else ""
            ),
        ]
        return "-".join(filter(None, parts))

    @property
    def plain(self) -> bool:
        """Whether its model is asked for nothing and held to nothing, at any temperature."""
        return dataclasses.replace(self.decoding, samples=1, temperature=0.0) == Decoding()


def declare(config: EvalConfig) -> tuple[Evaluation, ...]:
    """Every evaluation of a run with all models, the plain greedy ones first."""
    plain = [Evaluation(model) for model in MODELS]
    few = config.problems
    found = plain + [
        Evaluation(
            model,
            Decoding(samples=_samples(model, temperature, config), temperature=temperature),
            few,
        )
        for temperature in config.temperatures
        for model in MODELS
    ]
    parallel, serial = f"apr/{config.sweep}", f"sos+/{config.sweep}"
    for temperature in (0.0, *config.temperatures):
        found += [
            Evaluation(parallel, Decoding(temperature=temperature, condition=count), few)
            for count in config.children
        ]
        # A root that draws its beam breaks where it is held to more children than it would have
        # spawned: it takes the first.
        held = {
            "apr": config.forced[-1:] if temperature else config.forced,
            DRAWN: config.forced[: not temperature],
        }
        found += [
            Evaluation(f"{method}/{stage}", Decoding(temperature=temperature, forced=forced), few)
            for method, counts in held.items()
            for forced in counts
            for stage in STAGES
        ]
    found += [Evaluation(serial, Decoding(bins=bins), few) for bins in config.bins]
    return tuple(dict.fromkeys(found))


def validated(one: Evaluation, config: EvalConfig) -> Evaluation:
    """The same evaluation of validation problems."""
    return dataclasses.replace(one, problems=config.problems, validation=True)


def choosing(config: EvalConfig) -> tuple[Evaluation, ...]:
    """Evaluations of validation problems that choose where comparisons take the best of several:
    one for each that competes.
    """
    return tuple(
        validated(one, config)
        for one in declare(config)
        if one.model in _COMPETING and one.decoding.forced is None
    )


def compared_temperatures(config: EvalConfig) -> tuple[float, ...]:
    """The temperatures of comparisons: 0, and the highest, at which the paper compares total tokens
    and its policy learns.
    """
    return (0.0, *sorted(config.temperatures)[-1:])


def timed(config: EvalConfig) -> tuple[Evaluation, ...]:
    """Those whose problems are also answered one at a time: the greedy ones that compete in seconds
    (Fig. 6, comparisons).
    """
    if not config.timed:
        return ()
    names = [WIDE, *(f"{method}/{stage}" for method in ("sos+", "apr") for stage in STAGES)]
    return tuple(
        one
        for one in declare(config)
        if one.decoding.temperature == 0 and one.decoding.forced is None and one.model in names
    )


def laned(config: EvalConfig) -> tuple[Evaluation, ...]:
    """Those whose problems are also answered on several numbers of decode slots, for the cost
    model.
    """
    return tuple(one for one in timed(config) if one == Evaluation("apr/rl"))


def check(config: Experiment) -> None:
    """Refuses a suite that the config's models cannot answer, before anything runs.

    Raises:
      UsageError: names the field, the value and what would be right.
    """
    solver, limits = config.solver, config.limits
    max_threads = limits.max_threads - 1 if limits.max_depth else 0
    bins = -(-limits.window // solver.window_bin)
    for field, low, high in (
        ("children", 0, solver.max_children),
        ("bins", 1, bins),
        ("forced", 0, max_threads),
    ):
        values = getattr(config.evaluate, field)
        if any(not low <= value <= high for value in values):
            raise UsageError(f"evaluate.{field}={values}: must be from {low} to {high}")
        if values and field != "forced" and not solver.condition:
            raise UsageError(
                f"evaluate.{field}={values}: the models are trained without conditions"
                " (solver.condition=0)"
            )


def check_conditions(config: Experiment, data: Path) -> None:
    """Refuses a sweep over conditions that the built data never state: no model has learned what
    they mean.

    Raises:
      UsageError: names the field, the values and what the demonstrations state.
      UserError: `data` holds no data of a method that is swept.
    """
    for field, method in (("children", "apr"), ("bins", "sos+")):
        values = getattr(config.evaluate, field)
        if not values:
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
    """Where a run has a model: a trained one in RUN/<method>/<stage>, or a kept file
    RUN/<method>-<stage>.safetensors.
    """
    trained, kept = run / model, run / f"{model.replace('/', '-')}{SUFFIX}"
    if (trained / FOLDER).is_dir():
        return trained
    return kept if kept.is_file() else None


def _samples(model: str, temperature: float, config: EvalConfig) -> int:
    """pass@n and cons@n are drawn for SoS+, whose samples compete with APR's threads; on wide beams
    only where comparisons are.
    """
    voting = model in ("sos+/sft", "sos+/rl") or (
        model == WIDE and temperature in compared_temperatures(config)
    )
    return config.samples if voting else 1
