"""Ablations: questions that take several trainings at scale nano, each answered by one command.

    apr ablation seeds --out runs/seeds

The life of an ablation (OUT is its folder):
1. `ABLATION_OF` declares its variants: fields of the experiment that differ, and from whose
   supervised model its RL starts.
2. OUT/data (a variant whose solver differs: OUT/<variant>/data) is built, OUT/<variant>/sft and
   OUT/<variant>/rl are trained, OUT/<variant>/eval-* are answers to all test problems. They are
   stages (`paper/stages.py`): the command can be stopped and started at will.
3. OUT/ablation.json has a line an evaluation, and the gaps of pairs of them; OUT/ablation.{svg,png}
   shows accuracy against what it cost.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from apr_jax.config import Experiment, override
from apr_jax.data.build import check_files
from apr_jax.evaluate.intervals import paired_gap
from apr_jax.evaluate.runner import Decoding, evaluate, read_answers
from apr_jax.io.lease import Lease
from apr_jax.io.terminal import Terminal
from apr_jax.paper import Question, charts, figure_parts
from apr_jax.paper.pipeline import data_stage, reinforced_stage, supervised_stage
from apr_jax.paper.results import Score
from apr_jax.paper.stages import Stage, read_json, reserve, run_stages, write_json
from apr_jax.paper.suite import ABLATIONS
from apr_jax.report.terminal_tables import print_table
from apr_jax.tasks import load_problems
from apr_jax.train.checkpoint.manager import last_step, load_checkpoint

MEASURES = ("accuracy", "total_tokens", "sequential_tokens", "children")
KEPT = (*MEASURES, "ci95", "max_thread_tokens", "spawned", "truncated", "n")  # Of a summary.


@dataclasses.dataclass(frozen=True)
class Variant:
    """One training, and what is asked of it.

    Attributes:
      name: its folder, and in the table.
      settings: fields of the experiment that differ, as `--set` takes them.
      method: whose demonstrations it is trained on.
      after: the variant whose supervised model its RL starts from; empty trains its own.
      reinforced: whether there is RL at all.
      asked: numbers of children that its supervised model is asked for, an evaluation each.
      forced: numbers of children that its supervised model is held to, an evaluation each.
      sampled: temperatures at which its models answer too, an evaluation each.
    """

    name: str
    settings: tuple[str, ...] = ()
    method: str = "apr"
    after: str = ""
    reinforced: bool = True
    asked: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()
    sampled: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ablation:
    """How a question is answered.

    Attributes:
      question: in words.
      variants: in the order in which they are trained.
      same: whether the variants are repetitions, of which mean and standard deviation are wanted.
      gaps: pairs of rows, by label: the first less the second is wanted, problem by problem.
      settings: fields of the experiment that differ in all variants alike, the problems among them.
    """

    question: str
    variants: tuple[Variant, ...]
    same: bool = False
    gaps: tuple[tuple[str, str], ...] = ()
    settings: tuple[str, ...] = ()


_SEEDS = range(3)
# A finished nano model needs a higher rate than its recipe's for a price to tell within some
# minutes.
_PRICED = ("train.rl.steps=40", "train.rl.optimizer.lr=1e-4")


def _table(name: str, method: str, settings: tuple[str, ...] = ()) -> Variant:
    """A row of the paper's Tables 1 and 2."""
    return Variant(name, settings, method, reinforced=False, sampled=(1.0,))


ABLATION_OF: dict[Question, Ablation] = {
    Question.SEEDS: Ablation(
        "How much do the results of APR at nano vary with the seed of weights, order and samples?",
        tuple(Variant(f"seed {seed}", (f"seed={seed}",)) for seed in range(5)),
        same=True,
    ),
    # Half of nano's supervised steps, and beams drawn from 1 up, as published: a model that spawns
    # too little.
    Question.EARLY: Ablation(
        "Does RL teach an early model to search wider, and does a price on tokens take back what"
        " earns little?",
        tuple(
            Variant(
                f"{name}seed {seed}",
                (f"seed={seed}", f"train.rl.reward.token_price={price}"),
                after="" if name == "" and seed == 0 else "seed 0",
                sampled=(1.0,),
            )
            for seed in _SEEDS
            for name, price in (("", 0), ("price, ", 5e-4))
        ),
        gaps=tuple(
            pair
            for seed in _SEEDS
            for pair in (
                (f"seed {seed}, after RL, T = 1", "seed 0, T = 1"),
                (f"price, seed {seed}, after RL, T = 1", f"seed {seed}, after RL, T = 1"),
            )
        ),
        settings=(
            "solver.parent_beam_low=1",
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
            Variant("price 0", _PRICED, asked=(2, 5, 8, 11), forced=(2, 4, 6, 8, 10)),
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
    # Supervised models only, as there. Fewer demonstrations, where wrong ones are left out, are
    # seen more often.
    Question.SERIAL: Ablation(
        "What does serial search owe to its demonstrations (the paper's Tables 1 and 2)?",
        (
            _table("SoS", *ABLATIONS["sos"]),
            _table("SoS+", "sos+"),
            _table("SoS+, beam 15", *ABLATIONS["sos+beam15"]),
            _table("SoS+, rejection sampling", *ABLATIONS["sos+rejection"]),
        ),
    ),
    # With fewer than five numbers a grandchild has less to try out than its message costs. The
    # third spends as many tokens as the second, one level deep.
    Question.NESTED: Ablation(
        "What does it change that children spawn too: longest thread and accuracy, nested against"
        " one level?",
        (
            Variant("one level", reinforced=False),
            Variant("nested", method="apr-nested", reinforced=False),
            Variant(
                "one level, wider",
                ("solver.parent_beam=4", "solver.parent_beam_low=4", "solver.child_beam=2"),
                reinforced=False,
            ),
        ),
        settings=(
            "task.numbers=5",
            "task.high=9",
            "task.target_low=5",
            "task.target_high=20",
            "solver.parent_beam=2",
            "solver.parent_beam_low=2",
            "solver.child_beam=3",
            "solver.spawn_probability=1",
            "solver.condition=0",
            # 2, and 3 for each: a spawn divides what is left among its children and itself.
            "solver.max_children=11",
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
    # One supervised step at next to no rate: this supervised model is random weights.
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
    """Runs what is not done yet of an ablation, and returns ablation.json.

    Args:
      question: which one.
      config: of which the variants are variants.
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
    """The stages in their order. Variants are of `config` with the settings of the ablation."""
    config = override(config, list(ablation.settings))
    shared = out / "data"
    owns = [override(config, list(variant.settings)) for variant in ablation.variants]
    sharing = [
        each.method
        for each, own in zip(ablation.variants, owns, strict=True)
        if own.solver == config.solver
    ]
    stages = [data_stage("data", config, shared, tuple(dict.fromkeys(sharing)))]
    for variant, own in zip(ablation.variants, owns, strict=True):
        name, method = variant.name, variant.method
        data, built = "data", shared
        if own.solver != config.solver:
            data, built = f"{name}/data", out / name / "data"
            stages.append(data_stage(data, own, built, (method,)))
        if not variant.after:
            stages.append(supervised_stage(f"{name}/sft", own, data, built, out, method))
        if variant.reinforced:
            stages.append(
                reinforced_stage(
                    f"{name}/rl", f"{variant.after or name}/sft", own, built, out, "rl"
                )
            )
    stages += [_evaluated(row, out) for row in rows_of(ablation)]
    names = tuple(stage.name for stage in stages)
    return [*stages, Stage("table", out / "ablation.json", lambda: _write(ablation, out), names)]


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: one evaluation.

    Attributes:
      label: in the table.
      variant: whose model; stage: "sft" or "rl".
      folder: of the evaluation, in the variant's.
      decoding: what it asks for or holds to, and how it draws.
    """

    label: str
    variant: str
    stage: str
    folder: str
    decoding: Decoding = dataclasses.field(default_factory=Decoding)

    @property
    def is_plain(self) -> bool:
        """Whether the model chooses the number of children, and its most likely tokens."""
        return self.decoding == Decoding()


def rows_of(ablation: Ablation) -> list[Row]:
    """Every evaluation of an ablation."""
    rows = []
    for variant in ablation.variants:
        v = variant.name
        if not variant.after:
            rows.append(Row(f"{v}, supervised", v, "sft", "eval-sft"))
            rows += [
                Row(f"asked for {n}", v, "sft", f"eval-asked{n}", Decoding(condition=n))
                for n in variant.asked
            ]
            rows += [
                Row(f"held to {n}", v, "sft", f"eval-held{n}", Decoding(forced=n))
                for n in variant.forced
            ]
            rows += [
                Row(f"{v}, T = {t:g}", v, "sft", f"eval-t{t:g}", Decoding(temperature=t))
                for t in variant.sampled
            ]
        if variant.reinforced:
            rows.append(Row(f"{v}, after RL", v, "rl", "eval-rl"))
            rows += [
                Row(
                    f"{v}, after RL, T = {t:g}", v, "rl", f"eval-rl-t{t:g}", Decoding(temperature=t)
                )
                for t in variant.sampled
            ]
    return rows


def show_ablation(found: dict[str, Any], out: Path) -> None:
    """Prints the table."""
    console = Terminal(highlight=False, soft_wrap=True, markup=False)
    console.print(found["question"])
    print_table(found["rows"])
    for stage, measures in found["spread"].items():
        said = ", ".join(
            f"{measure} {mean:.4g} +- {spread:.2g}" for measure, (mean, spread) in measures.items()
        )
        console.print(f"{stage}, mean and standard deviation: {said}")
    for gap in found.get("gaps", ()):  # None in what an earlier version wrote.
        said = ", ".join(
            "{} {:+.4g} ({:.4g} to {:.4g})".format(measure, *gap[measure]) for measure in MEASURES
        )
        console.print(f"{gap['one']}, less {gap['other']}: {said}")
    console.print(f"figure  {out / 'ablation.svg'}")


def _evaluated(row: Row, out: Path) -> Stage:
    folder, model = out / row.variant / row.folder, f"{row.variant}/{row.stage}"

    def answer() -> None:
        # Of the supervised steps the one that RL starts from.
        restored = load_checkpoint(out / model if row.stage == "sft" else last_step(out / model))
        check_files(out / "data", "test.jsonl")
        evaluate(restored, load_problems(out / "data" / "test.jsonl"), folder, row.decoding)

    return Stage(f"{row.variant}/{row.folder}", folder / "summary.json", answer, (model,), "eval")


def _write(ablation: Ablation, out: Path) -> None:
    rows = rows_of(ablation)
    lines = {}
    for row in rows:
        summary = read_json(out / row.variant / row.folder / "summary.json")
        lines[row.label] = {key: summary[key] for key in KEPT}
    spread = {
        stage: _spread(rows, lines, stage) for stage in (("sft", "rl") if ablation.same else ())
    }
    gaps = [_gap(rows, out, *pair) for pair in ablation.gaps]
    _draw(rows, lines, out / "ablation")
    write_json(
        out / "ablation.json",
        {"question": ablation.question, "rows": lines, "spread": spread, "gaps": gaps},
    )


def _gap(rows: list[Row], out: Path, *labels: str) -> dict[str, Any]:
    """Of each measure the gap of two rows and its 95% interval, over the problems that both
    answered.
    """
    one, other = (next(row for row in rows if row.label == label) for label in labels)
    traces = [read_answers(out / row.variant / row.folder)[1] for row in (one, other)]
    found: dict[str, Any] = {"one": one.label, "other": other.label}
    for measure in MEASURES:
        field = "correct" if measure == "accuracy" else measure
        gap = paired_gap(*({trace["id"]: float(trace[field]) for trace in each} for each in traces))
        found[measure] = gap.gap, gap.low, gap.high
    return found


def _spread(
    rows: list[Row], lines: dict[str, dict[str, Any]], stage: str
) -> dict[str, tuple[float, float]]:
    """Of each measure, over the variants: mean and standard deviation."""
    found = {}
    for measure in MEASURES:
        values = [lines[row.label][measure] for row in rows if row.stage == stage and row.is_plain]
        found[measure] = statistics.mean(values), statistics.stdev(values)
    return found


@charts.styled
def _draw(rows: list[Row], lines: dict[str, dict[str, Any]], stem: Path) -> None:
    """Accuracy against total tokens, a point a line of the table."""
    figure, axes = charts.canvas(1, height=4.2)
    for row in rows:
        line = lines[row.label]
        low, high = line["ci95"]
        score, spent = Score(line["accuracy"], low, high, values={}), line["total_tokens"]
        tone = charts.APR if row.is_plain else charts.SOS
        full = tone if row.stage == "rl" else "none"
        charts.with_interval(
            axes, [spent], [score], label=row.label, fmt="o", color=tone, markerfacecolor=full
        )
        figure_parts.tag(axes, spent, 100 * score.mean, row.label)
    charts.percent(axes, "Accuracy against cost (hollow: supervised)", figure_parts.TOKENS)
    charts.save(figure, stem)
