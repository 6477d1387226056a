"""Ablations: questions that take several trainings at scale nano, each answered by one command.

    apr ablation seeds --out runs/seeds

The life of an ablation (OUT is its folder):
1. `ABLATION_OF` declares its variants: the fields of the experiment that differ, and the supervised
   model that its RL starts from.
2. Stages (`paper/stages.py`) do the work, so the command can be stopped and started at will. They
   build OUT/data (OUT/<variant>/data if the variant's solver differs), train OUT/<variant>/sft and
   OUT/<variant>/rl, and answer all test problems: OUT/<variant>/eval-*.
3. OUT/ablation.json has a row for each evaluation, and the gaps of pairs of rows.
   OUT/ablation.{svg,png} shows accuracy against cost.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from apr_jax.config import Experiment, override
from apr_jax.data.build import check_files
from apr_jax.evaluate.cells import outcome
from apr_jax.evaluate.decoding import Decoding
from apr_jax.evaluate.folder import read_answers
from apr_jax.evaluate.intervals import paired_gap
from apr_jax.evaluate.runner import evaluate
from apr_jax.io.json_files import write_json
from apr_jax.io.lease import Lease
from apr_jax.io.terminal import Terminal
from apr_jax.paper import Question, charts, figure_parts
from apr_jax.paper.pipeline import data_stage, reinforced_stage, supervised_stage
from apr_jax.paper.results import Score
from apr_jax.paper.stages import Stage, read_json, reserve, run_stages
from apr_jax.paper.suite import ABLATIONS, BEAMS_1_TO_15
from apr_jax.report.terminal_tables import print_table
from apr_jax.tasks import load_problems, make_task
from apr_jax.train.checkpoint import last_step, load_checkpoint

MEASURES = ("accuracy", "total_tokens", "sequential_tokens", "children")
# What ablation.json takes from the summary of an evaluation.
KEPT = (*MEASURES, "ci95", "max_thread_tokens", "spawned", "truncated", "n")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One training of an ablation, and the evaluations of its models.

    Attributes:
      name: its name in the table, and its folder.
      settings: fields of the experiment that differ, as `--set` takes them.
      method: the method whose demonstrations it is trained on.
      after: the variant whose supervised model its RL starts from; if empty, it trains its own.
      reinforced: whether RL follows the supervised training.
      requested: numbers of requested children; the supervised model has an evaluation with each.
      forced: numbers of forced children; the supervised model has an evaluation with each.
      sampled: temperatures besides 0; each of its models has an evaluation at each.
    """

    name: str
    settings: tuple[str, ...] = ()
    method: str = "apr"
    after: str = ""
    reinforced: bool = True
    requested: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    sampled: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A question, and the trainings that answer it.

    Attributes:
      question: the question in words.
      variants: the trainings, in their order.
      same: whether the variants are repetitions; then the table has their mean and standard
        deviation.
      gaps: pairs of row labels; the table has the gap of each pair, the first less the second,
        computed problem by problem.
      settings: fields of the experiment that all variants share, the problems among them.
    """

    question: str
    variants: tuple[Variant, ...]
    same: bool = False
    gaps: tuple[tuple[str, str], ...] = ()
    settings: tuple[str, ...] = ()


_SEEDS = range(3)

# At the learning rate of nano's recipe a price on tokens would not change a finished model within
# a few minutes.
_PRICED = ("train.rl.steps=40", "train.rl.optimizer.lr=1e-4")


def _supervised(name: str, method: str, settings: tuple[str, ...] = ()) -> Variant:
    """Makes a row of the paper's Tables 1 and 2: a supervised model, at temperatures 0 and 1."""
    return Variant(name, settings, method, reinforced=False, sampled=(1.0,))


# What the RL of an early model is done with, by the beginning of the variant's name. A norm of 1e-4
# cuts every gradient, so that all updates of a run begin at one length, whatever the trees earned.
_EARLY_ARMS = {
    "": (),
    "price, ": ("train.rl.reward.token_price=5e-4",),
    "always cut, ": ("train.rl.optimizer.clip=1e-4",),
}


def _early_variants() -> tuple[Variant, ...]:
    """Makes RL runs from one early model: each arm of `_EARLY_ARMS` with several seeds."""
    variants = []
    for seed in _SEEDS:
        for arm, settings in _EARLY_ARMS.items():
            # The first variant trains the supervised model from which all others start.
            is_first = seed == 0 and not arm
            variants.append(
                Variant(
                    f"{arm}seed {seed}",
                    (f"seed={seed}", *settings),
                    after="" if is_first else "seed 0",
                    sampled=(1.0,),
                )
            )
    return tuple(variants)


def _early_gaps() -> tuple[tuple[str, str], ...]:
    """Lists, for each seed, the gain of RL and what the price and the cut gradients change."""
    gaps = []
    for seed in _SEEDS:
        after_rl = f"seed {seed}, after RL, T = 1"
        gaps.append((after_rl, "seed 0, T = 1"))
        gaps += [(f"{arm}{after_rl}", after_rl) for arm in _EARLY_ARMS if arm]
    return tuple(gaps)


ABLATION_OF: dict[Question, Ablation] = {
    Question.SEEDS: Ablation(
        "How much do the results of APR at nano vary with the seed of weights, order and samples?",
        tuple(Variant(f"seed {seed}", (f"seed={seed}",)) for seed in range(5)),
        same=True,
    ),
    # Half of nano's supervised steps and a random parent beam from 1 up, as published, give a model
    # that spawns too little.
    Question.EARLY: Ablation(
        "Does RL teach an early model to search wider, does a price on tokens take back what earns"
        " little, and is anything lost where every gradient is cut to one length?",
        _early_variants(),
        gaps=_early_gaps(),
        settings=(
            "task.solver.parent_beam_low=1",
            "train.sft.steps=1200",
            "train.rl.steps=60",
            "train.rl.optimizer.lr=1e-4",
            "train.rl.objective.kl=0",
            "train.rl.validate_every=60",
        ),
    ),
    Question.PRICE: Ablation(
        "What do fewer tokens cost: RL with a price on tokens, against fixed numbers of children?",
        (
            Variant("price 0", _PRICED, requested=(2, 5, 8, 11), forced=(2, 4, 6, 8, 10)),
            *(
                Variant(
                    f"price {price}",
                    (*_PRICED, f"train.rl.reward.token_price={price}"),
                    after="price 0",
                )
                for price in ("1e-3", "2e-3", "1e-2")
            ),
        ),
    ),
    # Supervised models only, as in the paper. Where wrong demonstrations are left out, there are
    # fewer of them, and the same number of steps shows each of them more often.
    Question.SERIAL: Ablation(
        "What does serial search owe to its demonstrations (the paper's Tables 1 and 2)?",
        (
            _supervised("SoS", *ABLATIONS["sos"]),
            _supervised("SoS+", "sos+"),
            _supervised("SoS+, beam 15", *ABLATIONS[BEAMS_1_TO_15]),
            _supervised("SoS+, rejection sampling", *ABLATIONS["sos+rejection"]),
        ),
    ),
    # With fewer than five numbers a grandchild would have less to try than its message costs. The
    # third variant spends as many tokens as the second, but one level deep.
    Question.NESTED: Ablation(
        "What does it change that children spawn too: longest thread and accuracy, nested against"
        " one level?",
        (
            Variant("one level", reinforced=False),
            Variant("nested", method="apr-nested", reinforced=False),
            Variant(
                "one level, wider",
                (
                    "task.solver.parent_beam=4",
                    "task.solver.parent_beam_low=4",
                    "task.solver.child_beam=2",
                ),
                reinforced=False,
            ),
        ),
        settings=(
            "task.numbers=5",
            "task.high=9",
            "task.target_low=5",
            "task.target_high=20",
            "task.solver.parent_beam=2",
            "task.solver.parent_beam_low=2",
            "task.solver.child_beam=3",
            "task.solver.spawn_probability=1",
            "task.solver.condition=0",
            # Two children of the root. A spawn divides the threads that are left among its children
            # and itself, so 3 of the other 9 go to each child.
            "task.solver.max_children=11",
            "limits.window=256",
            "limits.max_thread_tokens=352",
            "limits.max_threads=12",
            "limits.children=11",
            "limits.max_depth=2",
            "train.sft.steps=2000",
            "train.sft.validate_every=1000",
            "train.sft.validation=100",
        ),
    ),
    # One supervised step with a learning rate of almost 0: this "supervised model" has random
    # weights.
    Question.SCRATCH: Ablation(
        "Does RL find search and spawning without a supervised warm-up, if the rollout keeps the"
        " protocol?",
        (
            Variant(
                "from nothing",
                (
                    "train.sft.steps=1",
                    "train.sft.optimizer.lr=1e-9",
                    "limits.constrain=true",
                    "train.rl.steps=60",
                    "train.rl.optimizer.lr=1e-3",
                ),
            ),
        ),
    ),
}


def run_ablation(question: Question, config: Experiment, out: Path) -> dict[str, Any]:
    """Runs the stages of an ablation that are not done yet, and returns ablation.json.

    Args:
      question: which ablation.
      config: the experiment that the variants change.
      out: folder of the ablation.

    Raises:
      UsageError: OUT holds an ablation of another config.
      UserError: a stage failed; what was finished before is kept.
    """
    ablation = ABLATION_OF[question]
    with Lease(out, "ablation", together=True):
        reserve(out, config)
        run_stages(stages_of(ablation, config, out), out)
    return read_json(out / "ablation.json")


def stages_of(ablation: Ablation, config: Experiment, out: Path) -> list[Stage]:
    """Lists the stages of an ablation in their order."""
    config = override(config, list(ablation.settings))
    configs = [override(config, list(variant.settings)) for variant in ablation.variants]

    # Variants whose solver is that of `config` share one set of data.
    shared = out / "data"
    sharing = [
        variant.method
        for variant, own in zip(ablation.variants, configs, strict=True)
        if own.task == config.task
    ]
    stages = [data_stage("data", config, shared, tuple(dict.fromkeys(sharing)))]

    for variant, own in zip(ablation.variants, configs, strict=True):
        name = variant.name
        method = variant.method
        data = "data"
        built = shared
        if own.task != config.task:
            data = f"{name}/data"
            built = out / name / "data"
            stages.append(data_stage(data, own, built, (method,)))
        if not variant.after:
            stages.append(supervised_stage(f"{name}/sft", own, data, built, out, method))
        if variant.reinforced:
            start = f"{variant.after or name}/sft"
            stages.append(reinforced_stage(f"{name}/rl", start, own, built, out, "rl"))

    stages += [_evaluation_stage(row, out) for row in rows_of(ablation)]
    names = tuple(stage.name for stage in stages)
    table = out / "ablation.json"
    return [
        *stages,
        Stage("table", table, lambda: _write(ablation, out), "table and figure", names),
    ]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: one evaluation.

    Attributes:
      label: its name in the table.
      variant: the variant whose model answers.
      stage: the model's stage, "sft" or "rl".
      folder: folder of the evaluation within the variant's folder.
      decoding: how the model's trees are decoded.
    """

    label: str
    variant: str
    stage: str
    folder: str
    decoding: Decoding = dataclasses.field(default_factory=Decoding)

    @property
    def is_plain(self) -> bool:
        """Whether the model chooses the number of children itself, and answers greedily."""
        return self.decoding == Decoding()


def rows_of(ablation: Ablation) -> list[Row]:
    """Lists every evaluation of an ablation."""
    return [row for variant in ablation.variants for row in _rows_of_variant(variant)]


def _rows_of_variant(variant: Variant) -> list[Row]:
    """Lists the evaluations of a variant's models: the supervised one if it has its own, then RL's.

    The folders of requested and forced children have the names that earlier runs gave them.
    """
    name = variant.name
    rows = []
    if not variant.after:
        rows.append(Row(f"{name}, supervised", name, "sft", "eval-sft"))
        for count in variant.requested:
            decoding = Decoding(condition=count)
            label = f"{count} requested children"
            rows.append(Row(label, name, "sft", f"eval-asked{count}", decoding))
        for count in variant.forced:
            decoding = Decoding(forced=count)
            rows.append(Row(f"{count} forced children", name, "sft", f"eval-held{count}", decoding))
        for temperature in variant.sampled:
            decoding = Decoding(temperature=temperature)
            label = f"{name}, T = {temperature:g}"
            rows.append(Row(label, name, "sft", f"eval-t{temperature:g}", decoding))

    if variant.reinforced:
        rows.append(Row(f"{name}, after RL", name, "rl", "eval-rl"))
        for temperature in variant.sampled:
            decoding = Decoding(temperature=temperature)
            label = f"{name}, after RL, T = {temperature:g}"
            rows.append(Row(label, name, "rl", f"eval-rl-t{temperature:g}", decoding))
    return rows


def show_ablation(ablation: dict[str, Any], out: Path) -> None:
    """Prints the table of an ablation.

    Args:
      ablation: what ablation.json holds.
      out: folder of the ablation.
    """
    console = Terminal(highlight=False, soft_wrap=True, markup=False)
    console.print(ablation["question"])
    print_table(ablation["rows"])

    for stage, measures in ablation["spread"].items():
        spreads = ", ".join(
            f"{measure} {mean:.4g} +- {spread:.2g}" for measure, (mean, spread) in measures.items()
        )
        console.print(f"{stage}, mean and standard deviation: {spreads}")

    for gap in ablation.get("gaps", ()):  # A file that an earlier version wrote has none.
        gaps = []
        for measure in MEASURES:
            value, low, high = gap[measure]
            gaps.append(f"{measure} {value:+.4g} ({low:.4g} to {high:.4g})")
        console.print(f"{gap['one']}, less {gap['other']}: {', '.join(gaps)}")
    console.print(f"figure  {out / 'ablation.svg'}")


def _evaluation_stage(row: Row, out: Path) -> Stage:
    """Makes a stage that answers all test problems with the model of a row."""
    folder = out / row.variant / row.folder
    model = f"{row.variant}/{row.stage}"

    def run() -> str:
        # The supervised checkpoint is the best one, from which RL starts; that of RL is the last.
        path = out / model if row.stage == "sft" else last_step(out / model)
        restored = load_checkpoint(path)
        check_files(out / "data", "test.jsonl")
        summary = evaluate(
            restored,
            load_problems(out / "data" / "test.jsonl", make_task(restored.config.task)),
            folder,
            row.decoding,
        )
        return outcome(summary)

    name = f"{row.variant}/{row.folder}"
    return Stage(name, folder / "summary.json", run, "answers all test problems", (model,), "eval")


def _write(ablation: Ablation, out: Path) -> None:
    """Writes ablation.json and the figure from the finished evaluations."""
    rows = rows_of(ablation)
    summaries = {}
    for row in rows:
        summary = read_json(out / row.variant / row.folder / "summary.json")
        summaries[row.label] = {key: summary[key] for key in KEPT}

    stages = ("sft", "rl") if ablation.same else ()
    spread = {stage: _spread(rows, summaries, stage) for stage in stages}
    gaps = [_gap(rows, out, *pair) for pair in ablation.gaps]
    _draw(rows, summaries, out / "ablation")
    write_json(
        out / "ablation.json",
        {"question": ablation.question, "rows": summaries, "spread": spread, "gaps": gaps},
    )


def _gap(rows: list[Row], out: Path, first: str, second: str) -> dict[str, Any]:
    """Returns the gap of two rows in each measure, with its 95% interval over the problems of both.

    The rows are named by their labels, and the gap is the first less the second.
    """
    traces_of = {}
    for label in (first, second):
        row = next(row for row in rows if row.label == label)
        traces_of[label] = read_answers(out / row.variant / row.folder)[1]

    gaps: dict[str, Any] = {"one": first, "other": second}
    for measure in MEASURES:
        field = "correct" if measure == "accuracy" else measure
        scores = [
            {trace["id"]: float(trace[field]) for trace in traces_of[label]}
            for label in (first, second)
        ]
        gap = paired_gap(*scores)
        gaps[measure] = gap.gap, gap.low, gap.high
    return gaps


def _spread(
    rows: list[Row], summaries: dict[str, dict[str, Any]], stage: str
) -> dict[str, tuple[float, float]]:
    """Returns mean and standard deviation of each measure over the variants' models of a stage."""
    labels = [row.label for row in rows if row.stage == stage and row.is_plain]
    spread = {}
    for measure in MEASURES:
        values = [summaries[label][measure] for label in labels]
        spread[measure] = statistics.mean(values), statistics.stdev(values)
    return spread


@charts.styled
def _draw(rows: list[Row], summaries: dict[str, dict[str, Any]], stem: Path) -> None:
    """Draws accuracy against total tokens, a point for each row of the table."""
    figure, axes = charts.canvas(1, height=4.2)
    for row in rows:
        summary = summaries[row.label]
        low, high = summary["ci95"]
        score = Score(summary["accuracy"], low, high, values={})
        spent = summary["total_tokens"]
        tone = charts.APR if row.is_plain else charts.SOS
        full = tone if row.stage == "rl" else "none"
        charts.with_interval(
            axes, [spent], [score], label=row.label, fmt="o", color=tone, markerfacecolor=full
        )
        figure_parts.tag(axes, spent, 100 * score.mean, row.label)
    charts.percent(axes, "Accuracy against cost (hollow: supervised)", figure_parts.TOKENS)
    charts.save(figure, stem)
