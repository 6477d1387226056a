"""Fills the tables and numbers of README.md and docs/*.md from the result files in experiments/.

    python docs/figures.py            # rewrites what is out of date, and prints the lines
    python docs/figures.py --check    # writes nothing; exit status 1 if a line is out of date

A table stands between two comments, which a reader of the rendered page does not see:

    <!-- figures: nano-models -->

    | | accuracy (95%) | total tokens |
    ...

    <!-- end -->

A number within a sentence has a comment on each side: `RL gains <!--=early-least-gain-->10.6<!---->
points`. The name in a marker is that of a function below, with hyphens for underscores: one that is
decorated with `@table` or `@number`. To add a figure, write such a function, put its marker into a
document with nothing inside, and run the script.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apr_jax.evaluate.cells import ON_TEST, comparison_cells
from apr_jax.evaluate.intervals import mean_interval, optimism

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "experiments"

Rows = list[list[str]]  # Cells of a table, a list a row; the first row is the head.

TABLES: dict[str, Callable[[], Rows]] = {}
NUMBERS: dict[str, Callable[[], str]] = {}


# What stands in the place of a table: a heading and a row.
_NOT_MEASURED: Rows = [["results"], ["not measured yet"]]


class FiguresError(Exception):
    """A marker or a result file that the script cannot use."""


def table(function: Callable[[], Rows]) -> Callable[[], Rows]:
    """Registers a function that returns a table, under its name with hyphens."""
    TABLES[function.__name__.replace("_", "-")] = function
    return function


def number(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a function that returns a number or a few words, under its name with hyphens."""
    NUMBERS[function.__name__.replace("_", "-")] = function
    return function


# Result files.


class Record(dict):
    """An object of a result file that, asked for a missing key, says where it was looked for."""

    def __init__(self, values: dict[str, Any], where: str):
        """Wraps `values`, which stand at `where`: a file and the keys that lead there."""
        super().__init__({key: _located(value, f"{where}.{key}") for key, value in values.items()})
        self.where = where

    def __missing__(self, key: str) -> Any:
        """Raises the error that names the place and the key."""
        raise FiguresError(f"{self.where} has no {key!r}")


def _located(value: Any, where: str) -> Any:
    """Returns `value` with every object in it as a `Record`."""
    if isinstance(value, dict):
        return Record(value, where)
    if isinstance(value, list):
        return [_located(item, f"{where}[{index}]") for index, item in enumerate(value)]
    return value


@functools.cache
def read(path: Path) -> Record:
    """Reads a result file; the errors of its records begin with the file's path."""
    name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
    try:
        return Record(json.loads(path.read_text()), f"{name}: results")
    except (OSError, json.JSONDecodeError) as error:
        raise FiguresError(f"{name} cannot be read: {error}") from error


def results(scale: str) -> Record:
    """Returns the results of a whole run of a scale, as `apr reproduce` wrote them."""
    return read(EXPERIMENTS / scale / "results.json")


def find_row(rows: Iterable[Record], key: str, value: str) -> Record:
    """Returns the only row whose `key` is `value`."""
    return _only_row(list(rows), key, value, lambda text: text == value)


def find_row_by_start(rows: Iterable[Record], key: str, start: str) -> Record:
    """Returns the only row whose `key` begins with `start`."""
    return _only_row(list(rows), key, f"{start}...", lambda text: text.startswith(start))


def _only_row(rows: list[Record], key: str, what: str, matches: Callable[[str], bool]) -> Record:
    """Returns the only row whose `key` matches; `what` names it in the error."""
    chosen = [row for row in rows if matches(row[key])]
    if len(chosen) != 1:
        where = rows[0].where if rows else "an empty list"
        raise FiguresError(f"{len(chosen)} rows beside {where} have the {key} {what!r}, not one")
    return chosen[0]


# How values are written.


def percent(share: float) -> str:
    """Writes a share with its sign: `84.1%`."""
    return f"{100 * share:.1f}%"


def share_and_interval(share: float, low: float, high: float) -> str:
    """Writes a share with its 95% interval: `84.1% (81.7 to 86.2)`."""
    return f"{percent(share)} ({100 * low:.1f} to {100 * high:.1f})"


def gap_and_interval(values: Sequence[float], scale: float = 1.0, digits: int = 0) -> str:
    """Writes (gap, low, high), each times `scale`: `+11.5 (8.4 to 14.6)`."""
    gap, low, high = (scale * value for value in values)
    return f"{gap:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def whole(value: float) -> str:
    """Writes a whole number: `1,741`."""
    return f"{value:,.0f}"


def tenths(value: float) -> str:
    """Writes a number with one digit after the point: `18.7`."""
    return f"{value:.1f}"


# Tables that every scale has.


def models(scale: str) -> Rows:
    """Returns a row for each model of a scale: its greedy answers and what they cost."""
    head = ["", "accuracy (95%)", "total tokens", "sequential tokens", "children", "longest thread"]
    rows = [
        [
            row["label"],
            share_and_interval(row["accuracy"], *row["ci95"]),
            whole(row["total_tokens"]),
            whole(row["sequential_tokens"]),
            tenths(row["children"]),
            whole(row["max_thread_tokens"]),
        ]
        for row in results(scale)["main"].values()
    ]
    return [head, *rows]


def paper_cell(comparison: Record) -> str:
    """Writes what the paper reports, and whether it is reached here."""
    return ": ".join(filter(None, (comparison["paper"], comparison_cells(comparison)["verdict"])))


def gap_cell(comparison: Record) -> str:
    """Writes the gap of a comparison with its 95% interval."""
    cells = comparison_cells(comparison)
    return f"{cells['gap']} ({cells['interval'].replace('+', '')})"


# How the names of comparisons end in which stronger serial searches compete, too.
_STRONGER = re.compile(r", SoS\+ .* too$")


def against_serial_search(scale: str) -> Rows:
    """Returns a row for each comparison of APR with serial search.

    SoS+ on published beams stands in the first part of a row. Each further part is of a comparison
    in which stronger serial searches compete, too; it is empty where these were not evaluated.
    """
    comparisons = {
        tuple(row["comparison"].split(": ", 1)): row
        for row in results(scale)["comparisons"]
        if ": " in row["comparison"]
    }
    # (who competes too, what is equal, APR) -> the models of the comparison, and its row.
    stronger: dict[tuple[str, str, str], tuple[str, Record]] = {}
    for (question, models), row in comparisons.items():
        competing = _STRONGER.search(question)
        if competing:
            plain = question.removesuffix(competing.group())
            stronger[competing.group(), plain, models.split(", ")[0]] = (models, row)
    groups = list(dict.fromkeys(group for group, *_ in stronger))

    head = ["", "APR", "SoS+", "gap (95%)", "the paper"]
    for group in groups:
        head += [f"SoS+, {group.removeprefix(', SoS+ ').removeprefix('with ')}", "gap (95%)"]
    rows = [[*head, "problems"]]
    for (question, models), row in comparisons.items():
        if _STRONGER.search(question):
            continue
        parallel, serial = models.split(", ", 1)
        cells = comparison_cells(row)
        line = [
            question,
            _score_cell(cells["one"], parallel.removeprefix("APR")),
            _score_cell(cells["other"], serial.removeprefix("SoS+")),
            gap_cell(row),
            paper_cell(row),
        ]
        counts = [row["n"]]
        for group in groups:
            models_there, harder = stronger.get((group, question, parallel), ("", None))
            line += ["", ""] if harder is None else _stronger_cells(models_there, harder)
            counts += [] if harder is None else [harder["n"]]
        rows.append([*line, "; ".join(map(whole, dict.fromkeys(counts)))])
    return rows


def _stronger_cells(models: str, comparison: Record) -> list[str]:
    """Writes the score of the best serial search in a comparison, and the gap to it."""
    _, serial = models.split(", ", 1)
    detail = serial.removeprefix("SoS+ with beams 1 to 15").removeprefix("SoS+")
    return [_score_cell(comparison_cells(comparison)["other"], detail), gap_cell(comparison)]


def _score_cell(score: str, detail: str) -> str:
    """Writes a score, and in parentheses how the answers were made, if that is special."""
    detail = detail.strip().replace(" cons@", ", cons@")
    return f"{score} ({detail})" if detail else score


def gains_by_rl(scale: str) -> Rows:
    """Returns a row for each model that was trained by RL: its score before and after."""
    rows = [["", "before RL", "after RL", "gain, points (95%)", "the paper", "problems"]]
    for row in results(scale)["comparisons"]:
        what, _, model = row["comparison"].partition(", ")
        if what == "RL's gain":
            cells = comparison_cells(row)
            before = cells["other"]
            after = cells["one"]
            rows.append(
                [model, before, after, gap_cell(row), paper_cell(row), whole(row["n"])],
            )
    return rows


def every_comparison(scale: str) -> Rows:
    """Returns all rows of the comparison table of a report, without the notes."""
    rows = [["", "here", "total tokens", "gap (95%)", "the paper", "problems"]]
    for row in results(scale)["comparisons"]:
        cells = comparison_cells(row)
        tokens = (row[side]["total_tokens"] for side in ("one_spent", "other_spent"))
        rows.append(
            [
                row["comparison"],
                f"{cells['one']}, {cells['other']}",
                ", ".join(map(whole, tokens)),
                gap_cell(row),
                paper_cell(row),
                whole(row["n"]),
            ]
        )
    return rows


# Scale nano.


@table
def nano_models() -> Rows:
    """Shows the greedy answers of nano's models."""
    return models("nano")


@table
def nano_against_serial_search() -> Rows:
    """Compares APR with SoS+ at nano."""
    return against_serial_search("nano")


@table
def nano_gains_by_rl() -> Rows:
    """Shows what RL changed at nano."""
    return gains_by_rl("nano")


@table
def nano_every_comparison() -> Rows:
    """Shows all comparisons of nano's report."""
    return every_comparison("nano")


def nano_at_equal_tokens() -> Record:
    """Returns nano's comparison of APR after RL with votes of SoS+ that take as many tokens."""
    return find_row_by_start(
        results("nano")["comparisons"], "comparison", "same total tokens: APR after RL, "
    )


@number
def nano_tree_at_equal_tokens() -> str:
    """Writes the accuracy of APR after RL, sampled, at nano."""
    return percent(nano_at_equal_tokens()["one"])


@number
def nano_votes_at_equal_tokens() -> str:
    """Writes the accuracy of as many samples of SoS+ as take the tokens of a tree."""
    return percent(nano_at_equal_tokens()["other"])


@number
def nano_gap_at_equal_tokens() -> str:
    """Writes the gap of the two, in points, with its interval."""
    return gap_cell(nano_at_equal_tokens())


@number
def nano_tree_supervised() -> str:
    """Writes the greedy accuracy of APR before RL."""
    return percent(results("nano")["main"]["apr-sft"]["accuracy"])


@number
def nano_tree_after_rl() -> str:
    """Writes the greedy accuracy of APR after RL."""
    return percent(results("nano")["main"]["apr-rl"]["accuracy"])


# An early model of scale nano: `apr ablation early`.

EARLY_SEEDS = range(3)
EARLY_ARMS = {  # How RL was done: the start of an arm's names in the file, and what it is called.
    "": "RL",
    "price, ": "RL with a price of 5e-4 a token",
    "always cut, ": "RL, every gradient cut",
}


def early() -> Record:
    """Returns the results of `apr ablation early`."""
    return read(EXPERIMENTS / "nano" / "early.json")


def early_arms() -> list[str]:
    """Returns the arms of `EARLY_ARMS` that were trained."""
    return [arm for arm in EARLY_ARMS if f"{arm}seed 0, after RL" in early()["rows"]]


@table
def families_parity() -> Rows:
    """Compares small random networks of each family with transformers, level by level."""
    found = read(EXPERIMENTS / "pretrained" / "parity.json")
    rows = [
        [
            "family",
            "first weight",
            "output of each layer",
            "logits in one pass",
            f"of {whole(found['far'])} tokens",
            "logits token by token",
            "export read by transformers",
            "error in bfloat16, of theirs: mean, largest",
        ]
    ]
    for family, levels in found["families"].items():
        rows.append(
            [
                family,
                _same(levels["same_first_weight"]),
                f"{levels['layers']:.1e}",
                f"{levels['logits']:.1e}",
                f"{levels['far']:.1e}",
                f"{levels['decoding']:.1e}",
                _same(levels["same_exported"]),
                f"{levels['bfloat16_mean']:.2f}, {levels['bfloat16_largest']:.2f}",
            ]
        )
    return rows


def _same(holds: bool) -> str:
    """Says whether two arrays are the same to the bit."""
    return "same bits" if holds else "differs"


@table
def smollm2_parity() -> Rows:
    """Compares a real model with what transformers computes of it."""
    found = read(EXPERIMENTS / "smollm2" / "parity.json")
    return [
        ["SmolLM2-135M-Instruct, float32", "apr_jax", "transformers"],
        [
            f"perplexity of {found['tokens']:,} tokens, {found['texts']} paragraphs",
            f"{found['perplexity']:.4f}",
            f"{found['perplexity_of_transformers']:.4f}",
        ],
        [
            f"greedy continuations that are equal, of {found['texts']}",
            str(found["same_continuations"]),
            "",
        ],
        [
            f"largest difference of logits, which reach {found['largest_logit']:.0f}",
            f"{found['worst_difference']:.5f}",
            "",
        ],
    ]


@table
def smollm2_decode() -> Rows:
    """Shows how fast a real model decodes here and in other engines."""
    path = EXPERIMENTS / "smollm2" / "decode.json"
    if not path.is_file():
        return _NOT_MEASURED
    found = read(path)
    names: list[str] = found["parts"][0]["result"]["names"]
    rows = [[f"SmolLM2-135M-Instruct, {found['dtype']}", *names[:-1], "the memory's limit"]]
    for part in found["parts"]:
        result = part["result"]
        ours, *others = result["medians"]
        ratios = zip(others, result["ratios"], strict=True)
        cells = [f"{rate:,.1f} ({ratio:.2f})" for rate, ratio in ratios]
        megabytes = part["bytes_a_step"] / 1e6
        rows.append([f"batch {part['batch']}, {megabytes:,.0f} MB a step", f"{ours:,.1f}", *cells])
    return rows


# Networks of others that docs/scale.md plans for, by the names of their files.
NETWORKS = {"qwen3-0.6b": "Qwen3-0.6B", "llama-3.2-1b": "Llama-3.2-1B"}
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v6e:2x4", "v6e:4x4", "v5p:4x4x4")


def imported_plans() -> list[tuple[str, Record]]:
    """Returns the kept plans of `apr plan --network`, each with the name of its network."""
    return [
        (name, read(path))
        for topology in TOPOLOGIES
        for file, name in NETWORKS.items()
        if (
            path := EXPERIMENTS / "pretrained" / f"{file}-{topology.replace(':', '-')}.json"
        ).is_file()
    ]


@table
def imported_supervised() -> Rows:
    """Shows what a supervised step of networks of others needs on slices of TPUs."""
    rows = [
        [
            *("topology", "network", "mesh data x fsdp x tensor", "in all", "at least (bound)"),
            *("tokens/s", "of peak", "2,000 steps"),
        ]
    ]
    for name, plan in imported_plans():
        stage = plan["stages"]["supervised"]
        hours = plan["recipes"]["apr"]["supervised"]
        rows.append(
            [
                plan["topology"],
                name,
                " x ".join(map(str, plan["mesh"].values())),
                size_cell(plan, stage),
                f"{_duration(stage['seconds'])} ({stage['bound']})",
                f"{stage['tokens_per_second'] / 1e6:.2g}M",
                f"{stage['share_of_peak']:.0%}",
                f"{hours:.2g} h",
            ]
        )
    return rows


@table
def imported_rl() -> Rows:
    """Shows what a step of RL of networks of others needs on slices of TPUs."""
    rows = [
        [
            *("topology", "network", "rollout: in all", "at least (bound)", "rescoring: in all"),
            *("at least", "update: in all", "at least (bound)", "150 steps", "both stages"),
        ]
    ]
    for name, plan in imported_plans():
        rollout, rescoring, update = (
            plan["stages"][stage] for stage in ("rollout", "rescoring", "update")
        )
        recipe = plan["recipes"]["apr"]
        rows.append(
            [
                plan["topology"],
                name,
                size_cell(plan, rollout),
                f"{_duration(rollout['seconds'])} ({rollout['bound']})",
                size_cell(plan, rescoring),
                _duration(rescoring["seconds"]),
                size_cell(plan, update),
                f"{_duration(update['seconds'])} ({update['bound']})",
                f"{recipe['reinforced']:.2g} h",
                f"{recipe['chip_hours']:,.0f} chip hours",
            ]
        )
    return rows


def size_cell(plan: Record, stage: Record) -> str:
    """Writes the memory that a stage needs on a device, and whether the chip has as much."""
    fits = "fits" if stage["fits"] else f"**does not fit**; {plan['change'][stage['name']]}"
    return f"{stage['total_bytes'] / 2**30:.1f} GiB, {fits}"


def _duration(seconds: float) -> str:
    """Writes a time in seconds, or in milliseconds if it is short."""
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1_000 * seconds:.0f} ms"


@table
def demo_models() -> Rows:
    """Shows what `make demo` ends with: sampled answers, and how many greedy ones are right."""
    found = results("demo")
    accuracy_of = {row["name"]: row["accuracy"]["mean"] for row in found["scores"]}
    head = ["", "right (95%)", "total tokens", "longest chain", "children", "right, greedy"]
    rows = [
        [
            label,
            share_and_interval(row["accuracy"], *row["ci95"]),
            whole(row["total_tokens"]),
            whole(row["sequential_tokens"]),
            tenths(row["children"]),
            percent(accuracy_of[f"{row['method']}-{row['stage']}-p{row['n']}"]),
        ]
        for label, row in found["opening"]["rows"].items()
    ]
    return [head, *rows]


@number
def demo_minutes() -> str:
    """Writes how long the stages of `make demo` took, without the installation."""
    return f"{sum(results('demo')['seconds'].values()) / 60:.1f}"


@table
def early_models() -> Rows:
    """Shows sampled answers of an early model before RL, and after each kind of RL."""
    head = ["", "accuracy (95%)", "children", "total tokens", "sequential tokens", "greedy"]
    rows = [head, _early_row("supervised", "seed 0, T = 1", "seed 0, supervised")]
    for arm in early_arms():
        for seed in EARLY_SEEDS:
            name = f"{arm}seed {seed}, after RL"
            rows.append(_early_row(f"{EARLY_ARMS[arm]}, seed {seed}", f"{name}, T = 1", name))
    return rows


def _early_row(label: str, sampled: str, greedy: str) -> list[str]:
    """Returns the row of one model, from the names of its two evaluations."""
    row = early()["rows"][sampled]
    return [
        label,
        share_and_interval(row["accuracy"], *row["ci95"]),
        tenths(row["children"]),
        whole(row["total_tokens"]),
        whole(row["sequential_tokens"]),
        percent(early()["rows"][greedy]["accuracy"]),
    ]


@table
def early_gaps() -> Rows:
    """Shows what RL changes, and what its other kinds change against plain RL."""
    effects = {
        "": "RL",
        "price, ": "the price",
        "always cut, ": "cutting every gradient",
    }
    rows = [["", "accuracy, points (95%)", "total tokens (95%)", "children (95%)"]]
    for arm in early_arms():
        for seed in EARLY_SEEDS:
            gap = early_gap(arm, seed)
            rows.append(
                [
                    f"effect of {effects[arm]}, seed {seed}",
                    gap_and_interval(gap["accuracy"], scale=100, digits=1),
                    gap_and_interval(gap["total_tokens"]),
                    gap_and_interval(gap["children"], digits=1),
                ]
            )
    return rows


def early_gap(arm: str, seed: int) -> Record:
    """Returns how sampled answers after RL differ.

    Plain RL (the arm "") is compared with the model before it, every other arm with plain RL.
    """
    return find_row(early()["gaps"], "one", f"{arm}seed {seed}, after RL, T = 1")


def range_of(values: Iterable[float], digits: int = 1) -> str:
    """Writes the least and the greatest value: `10.6 to 12.6`."""
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


@number
def early_accuracy_before() -> str:
    """Writes the share of sampled answers of the early model that are right before RL."""
    return percent(early()["rows"]["seed 0, T = 1"]["accuracy"])


@number
def early_gains_by_rl() -> str:
    """Writes the least and the greatest gain of sampled answers by RL, in points."""
    return range_of(100 * early_gap("", seed)["accuracy"][0] for seed in EARLY_SEEDS)


@number
def early_more_children() -> str:
    """Writes how many more children a sampled tree has after RL."""
    return range_of(early_gap("", seed)["children"][0] for seed in EARLY_SEEDS)


@number
def early_tokens_by_price() -> str:
    """Writes by how many tokens of a tree the price changes what RL learns."""
    return range_of(
        (early_gap("price, ", seed)["total_tokens"][0] for seed in EARLY_SEEDS), digits=0
    )


@number
def early_points_by_price() -> str:
    """Writes by how many points of accuracy the price changes what RL learns."""
    return range_of(100 * early_gap("price, ", seed)["accuracy"][0] for seed in EARLY_SEEDS)


@number
def early_greedy_by_rl() -> str:
    """Writes by how many points RL of any kind changes greedy answers."""
    rows = early()["rows"]
    before = rows["seed 0, supervised"]["accuracy"]
    after = [
        rows[f"{arm}seed {seed}, after RL"]["accuracy"]
        for arm in early_arms()
        for seed in EARLY_SEEDS
    ]
    return range_of(100 * (accuracy - before) for accuracy in after)


# Scale mini.


@table
def mini_models() -> Rows:
    """Shows the greedy answers of mini's models."""
    return models("mini")


@table
def mini_against_serial_search() -> Rows:
    """Compares APR with SoS+ at mini."""
    return against_serial_search("mini")


@table
def mini_gains_by_rl() -> Rows:
    """Shows what RL changed at mini."""
    return gains_by_rl("mini")


@table
def mini_every_comparison() -> Rows:
    """Shows all comparisons of mini's report."""
    return every_comparison("mini")


@table
def mini_three_models() -> Rows:
    """Shows the three models of mini that README tells of."""
    shown = {
        "sos+-rl": "serial search (SoS+), after RL",
        "sos+beam15-sft": "serial search with wide beams, supervised",
        "apr+drawn-rl": "thread tree (APR, random parent beam), after RL",
    }
    rows = [["", "right answers", "tokens in all", "tokens in the longest chain"]]
    for name, label in shown.items():
        row = results("mini")["main"][name]
        tokens = [whole(row["total_tokens"]), whole(row["sequential_tokens"])]
        rows.append([label, percent(row["accuracy"]), *tokens])
    return rows


@table
def mini_seconds() -> Rows:
    """Shows how long mini's models take for one problem on two CPU cores."""
    names = ("sos+-sft", "sos+-rl", "sos+beam15-sft", "apr-sft", "apr-rl")
    rows = [["", "seconds of one problem (95%)", "accuracy"]]
    for name in names:
        seconds = list(results("mini")["latency"][name]["seconds"].values())
        low, high = mean_interval(seconds)
        row = results("mini")["main"][name]
        rows.append(
            [
                row["label"],
                f"{statistics.mean(seconds):.2f} ({low:.2f} to {high:.2f})",
                percent(row["accuracy"]),
            ]
        )
    return rows


FAILURES = (  # Kinds of failure in the order of the table; others follow if they occur.
    "coverage",
    "arithmetic",
    "bookkeeping",
    "belief",
    "message",
    "join",
    "truncated",
    "malformed",
)


@table
def mini_failures() -> Rows:
    """Counts the wrong answers of mini's models by kind."""
    main = results("mini")["main"].values()
    others = sorted({kind for row in main for kind in row["failures"]} - set(FAILURES))
    kinds = (*FAILURES, *others)
    rows = [["", "wrong", *kinds]]
    for row in main:
        counts = row["failures"]
        cells = [str(counts[kind]) if kind in counts else "" for kind in kinds]
        rows.append([row["label"], str(sum(counts.values())), *cells])
    return rows


@table
def mini_serial_demonstrations() -> Rows:
    """Shows Tables 1 and 2 of the paper: SoS+ on other demonstrations."""
    tables = results("mini")["tables"]
    head = ["", "supervised steps", "greedy (95%)", "tokens", "left the window", "temperature 1"]
    rows = [[*head, "the paper, 228M: 0; 1"]]
    for row in (tables["table1"][0], *tables["table2"]):
        greedy = row["cells"]["0"]
        sampled = row["cells"]["1"]
        score = greedy["ours"]
        truncated = results("mini")["main"][row["model"].replace("/", "-")]["truncated"]
        rows.append(
            [
                row["label"],
                whole(row["step"]),
                share_and_interval(score["mean"], score["low"], score["high"]),
                whole(score["total_tokens"]),
                percent(truncated),
                percent(sampled["ours"]["mean"]),
                f"{greedy['paper']}; {sampled['paper']}",
            ]
        )
    return rows


def evaluation(scale: str, model: str, temperature: str) -> Record:
    """Returns the scores of a model at a temperature, over all problems that were asked.

    Args:
      scale: a folder of experiments/.
      model: the model's folder with a hyphen, as in `apr-rl`.
      temperature: as the name of the evaluation writes it.
    """
    scores = results(scale)["scores"]
    if temperature == "0":
        return find_row(scores, "name", model)
    return find_row_by_start(scores, "name", f"{model}-t{temperature}-p")


@table
def mini_random_parent_beam() -> Rows:
    """Compares APR with a random parent beam to APR that was shown every first step."""
    tables = results("mini")["tables"]
    rows = [
        [
            "temperature",
            "supervised: accuracy, children, tokens",
            "after RL",
            "every first step shown: supervised, after RL",
            "the paper: supervised, after RL",
            "problems",
        ]
    ]
    for temperature in ("0", "0.1", "0.5", "1"):
        before, after = (
            evaluation("mini", model, temperature) for model in ("apr+drawn-sft", "apr+drawn-rl")
        )
        every_step = (evaluation("mini", model, temperature) for model in ("apr-sft", "apr-rl"))
        published = (
            find_row(tables["table3"], "model", model)["cells"][temperature]["paper"]
            for model in ("apr/sft", "apr/rl")
        )
        rows.append(
            [
                temperature,
                _accuracy_children_tokens(before),
                _accuracy_children_tokens(after),
                ", ".join(percent(score["accuracy"]["mean"]) for score in every_step),
                ", ".join(f"{accuracy:.1f}%" for accuracy in published),
                whole(before["accuracy"]["n"]),
            ]
        )
    return rows


def _accuracy_children_tokens(score: Record) -> str:
    """Writes accuracy, children and total tokens of an evaluation: `79.2%, 16.3, 1,536`."""
    accuracy = percent(score["accuracy"]["mean"])
    return f"{accuracy}, {tenths(score['children'])}, {whole(score['total_tokens'])}"


@number
def mini_solved_by_serial_demonstrations() -> str:
    """Writes how many test problems the demonstrator of SoS+ solves at mini."""
    return percent(results("mini")["oracle"]["sos+"]["accuracy"]["mean"])


@number
def mini_solved_by_tree_demonstrations() -> str:
    """Writes how many test problems the demonstrator of APR solves at mini."""
    return percent(results("mini")["oracle"]["apr"]["accuracy"]["mean"])


@table
def mini_decode_slots() -> Rows:
    """Shows what a tree of mini takes on n decode slots, by the cost model."""
    cost_rows = results("mini")["cost"]["rows"]
    one_slot = cost_rows[0]["step_seconds"]
    head = ["decode slots", "steps of a tree", "a step", "a tree"]
    rows = [[*head, "a tree, if a step took as long as on one decode slot"]]
    for row in cost_rows:
        rows.append(
            [
                str(row["slots"]),
                whole(row["steps"]),
                f"{1000 * row['step_seconds']:.2f} ms",
                f"{row['seconds']:.2f} s",
                f"{row['steps'] * one_slot:.2f} s",
            ]
        )
    return rows


def _engine_seconds() -> float:
    """Returns the engine's own seconds of a tree, on the problems of the cost model."""
    seconds = results("mini")["latency"]["apr-rl"]["seconds"]
    return statistics.mean(seconds[problem] for problem in results("mini")["cost"]["problems"])


@number
def mini_engine_seconds() -> str:
    """Writes the seconds that the engine takes for a tree of mini."""
    return f"{_engine_seconds():.2f} s"


@number
def mini_engine_saves() -> str:
    """Writes how many times as long a tree takes on one decode slot as in the engine."""
    return f"{results('mini')['cost']['rows'][0]['seconds'] / _engine_seconds():.1f}"


@number
def mini_steps_saved() -> str:
    """Writes how many times as many steps a tree takes on one decode slot as on the most."""
    first, *_, last = results("mini")["cost"]["rows"]
    return f"{first['steps'] / last['steps']:.1f}"


# Tasks besides the paper's.

EQUAL = {  # What is equal in a comparison of methods -> the head of its column.
    "window": "same window",
    "tokens": "same total tokens",
    "parallel chain": "the chain of the parallel method",
    "serial chain": "the chain of the serial method",
}


def is_measured(task: str) -> bool:
    """Tells whether the experiment of a task was run and its results kept."""
    return (EXPERIMENTS / task / "results.json").is_file()


def method_models(task: str) -> Rows:
    """Returns a row for each model of a task's experiment, as `models` does for a scale."""
    return models(task) if is_measured(task) else _NOT_MEASURED


def parallel_against_serial(task: str) -> Rows:
    """Returns a row for each pair of methods and each stage, with a column for what is equal."""
    if not is_measured(task):
        return _NOT_MEASURED
    comparisons = results(task)["comparisons"]
    columns = dict.fromkeys(map(_head, comparisons))  # Each once.
    pairs: dict[str, dict[str, str]] = {}
    for row in comparisons:
        parallel, serial = row["methods"]
        after = " after RL" if row["stage"] == "rl" else ""
        cells = pairs.setdefault(f"{parallel} against {serial}{after}", {})
        cells[_head(row)] = _method_cell(row)
    body = [[pair, *(cells.get(column, "") for column in columns)] for pair, cells in pairs.items()]
    return [["", *columns], *body]


def _head(row: Record) -> str:
    """Writes the head of the column in which a comparison of methods stands."""
    window = f" ({row['limit']})" if row["equal"] == "window" else ""
    return f"{EQUAL[row['equal']]}{window}"


def _method_cell(row: Record) -> str:
    """Writes a comparison of methods: `84.1, cons@3 80.0: +4.1 (1.0 to 7.2)`."""
    cells = comparison_cells(row)
    rival = f"{row['note']} {cells['other']}".strip()
    within = f" within {row['limit']}" if row["equal"].endswith("chain") else ""
    return f"{cells['one']}, {rival}{within}: {gap_cell(row)}"


for _task in ("arithmetic", "path_star", "sudoku", "countdown_all", "smollm2"):
    _name = _task.replace("_", "-")
    TABLES[f"{_name}-models"] = functools.partial(method_models, _task)
    TABLES[f"{_name}-parallel-against-serial"] = functools.partial(parallel_against_serial, _task)


# A pretrained model: `make smollm2`.


def smollm2_course(training: str) -> list[Record]:
    """Returns the places of a training that the results of `make smollm2` have."""
    found: list[Record] = results("smollm2")["courses"][training]
    return found


@table
def smollm2_examples() -> Rows:
    """Shows how right greedy answers are after how many examples, pretrained and from scratch.

    Examples are rounded to hundreds; of two validations that meet there the later one is shown.
    """
    if not is_measured("smollm2"):
        return _NOT_MEASURED
    columns = [
        {
            round(row["examples"], -2): percent(row["validation_accuracy"])
            for row in smollm2_course(training)
            if "validation_accuracy" in row
        }
        for training in ("countdown/apr/sft", "nano/apr/sft")
    ]
    head = ["examples seen", "SmolLM2-135M-Instruct", "nano, from scratch"]
    examples = sorted({place for column in columns for place in column})
    return [head, *([whole(n), *(column.get(n, "") for column in columns)] for n in examples)]


@table
def smollm2_losses() -> Rows:
    """Shows the loss of each supervised training along its way."""
    if not is_measured("smollm2"):
        return _NOT_MEASURED
    trainings = {
        "countdown/apr/sft": "Countdown",
        "nano/apr/sft": "Countdown, nano from scratch",
        "legs/serial/sft": "legs, one thread",
        "legs/parallel/sft": "legs, a child for each item",
        "legs/lora/sft": "the same, LoRA",
    }
    shares = [place / 5 for place in range(6)]
    head = ["way of the training", "begin", *(f"{100 * share:.0f}%" for share in shares[1:])]
    rows = [head]
    for training, label in trainings.items():
        course = smollm2_course(training)
        places = [
            min(course, key=lambda row: abs(row["step"] - share * course[-1]["step"]))
            for share in shares
        ]
        rows.append([label, *(f"{row['loss']:.3f}" for row in places)])
    return rows


@table
def smollm2_gains_by_rl() -> Rows:
    """Shows what RL over whole trees changed."""
    if not is_measured("smollm2"):
        return _NOT_MEASURED
    found = results("smollm2")["rl"]
    rows = [["", "before", "after", "gain, points (95%)", "children (gain, 95%)", "problems"]]
    for how, gain in found["gains"].items():
        before, after = (found["rows"][how][when] for when in ("before", "after"))
        rows.append(
            [
                f"{found['title']}, {how}",
                percent(before["accuracy"]),
                percent(after["accuracy"]),
                _gap_of(gain["accuracy"], scale=100, digits=1),
                f"{before['children']:.2f} to {after['children']:.2f}"
                f" ({_gap_of(gain['children'], digits=2)})",
                whole(gain["accuracy"]["n"]),
            ]
        )
    return rows


def _gap_of(gap: Record, scale: float = 1.0, digits: int = 0) -> str:
    """Writes a paired gap of the results of `make smollm2` with its interval."""
    return gap_and_interval((gap["gap"], gap["low"], gap["high"]), scale, digits)


@number
def smollm2_lora() -> str:
    """Writes how much more often adapters are right than a training of all weights, in points."""
    if not is_measured("smollm2"):
        return "not measured yet"
    return _gap_of(results("smollm2")["lora"]["accuracy"], scale=100, digits=1)


@number
def smollm2_hours() -> str:
    """Writes how long the stages of `make smollm2` took."""
    if not is_measured("smollm2"):
        return "not measured yet"
    return f"{sum(results('smollm2')['seconds'].values()) / 3600:.1f} hours"


# All scales.


@table
def best_of_several() -> Rows:
    """Shows how much too high the best of several equal candidates scores."""
    rows = [
        [
            "candidates that are right independently",
            "problems",
            "accuracy of each",
            "the best scores too high by",
        ]
    ]
    for candidates, problems, accuracy in (
        (2, 160, 0.8),
        (12, 160, 0.8),
        (12, 160, 0.85),
        (12, 1000, 0.85),
    ):
        points = 100 * optimism(candidates, problems, accuracy)
        rows.append(
            [str(candidates), whole(problems), f"{100 * accuracy:.0f}%", f"{points:.1f} points"]
        )
    return rows


@number
def scales_chosen_by_test_problems() -> str:
    """Writes the scales whose test problems also chose the best of several."""
    scales = [
        scale
        for scale in ("mini", "nano")
        if any(row["chosen"].startswith(ON_TEST) for row in results(scale)["comparisons"])
    ]
    return " and ".join(scales) or "no scale"


# Packages.


def oldest_version(package: str) -> str:
    """Returns the oldest version of a package that setup.py allows."""
    requirement = re.search(rf'"{package}>=([\w.]+),', (ROOT / "setup.py").read_text())
    if requirement is None:
        raise FiguresError(f"setup.py names no oldest version of {package!r}")
    return requirement[1]


@number
def jax_version() -> str:
    """Writes the oldest version of JAX that setup.py allows."""
    return oldest_version("jax")


@number
def libtpu_version() -> str:
    """Writes the oldest version of libtpu that setup.py allows."""
    return oldest_version("libtpu")


# Documents.

BEGIN = re.compile(r"<!-- figures: (\S+) -->")
END = "<!-- end -->"
NUMBER_BEGIN = "<!--="
NUMBER_END = "<!---->"
NUMBER = re.compile(f"{NUMBER_BEGIN}(.*?)-->(.*?){NUMBER_END}")
# What Markdown takes for the start of a block of HTML, in which nothing is formatted.
STARTS_A_BLOCK = re.compile(rf"^[\s>]*([-*+]\s+|\d+\.\s+)?{NUMBER_BEGIN}")


def fill(text: str, document: str) -> str:
    """Returns the text of a document with all its tables and numbers made anew.

    Args:
      text: the document, in Markdown.
      document: its name, for errors.

    Raises:
      FiguresError: if a marker is unknown, misplaced or not closed, or a result file lacks what a
        figure needs. The message begins with the document's name and the line.
    """
    filled: list[str] = []
    table_begins_at = 0  # The line of the open marker; 0 outside of tables.
    for line_number, line in enumerate(text.splitlines(), start=1):
        where = f"{document}:{line_number}"
        begin = BEGIN.fullmatch(line)
        if begin:
            if table_begins_at:
                raise FiguresError(f"{where}: the table of line {table_begins_at} has no {END}")
            table_begins_at = line_number
            rows = _compute(TABLES, begin[1], where)
            filled += [line, "", *_markdown(rows), "", END]
        elif line == END:
            if not table_begins_at:
                raise FiguresError(f"{where}: no table ends here")
            table_begins_at = 0
        elif not table_begins_at:
            filled.append(_fill_numbers(line, where))
    if table_begins_at:
        raise FiguresError(f"{document}:{table_begins_at}: the table has no {END}")
    return "\n".join(filled) + "\n"


def _fill_numbers(line: str, where: str) -> str:
    """Returns a line with the numbers between its markers made anew."""
    if NUMBER_BEGIN not in line:
        return line
    if line.count(NUMBER_BEGIN) != len(NUMBER.findall(line)):
        raise FiguresError(f"{where}: a number needs {NUMBER_END} behind it, in the same line")
    if STARTS_A_BLOCK.match(line):
        raise FiguresError(f"{where}: put a word before the number, or GitHub formats nothing here")

    def replaced(marker: re.Match[str]) -> str:
        value = _compute(NUMBERS, marker[1], where)
        return f"{NUMBER_BEGIN}{marker[1]}-->{value}{NUMBER_END}"

    return NUMBER.sub(replaced, line)


def _compute(figures: dict[str, Callable[[], Any]], name: str, where: str) -> Any:
    """Calls the function of a figure; its errors say which marker asked for it."""
    if name not in figures:
        known = ", ".join(sorted(figures))
        raise FiguresError(f"{where}: no figure is called {name!r}; there are {known}")
    try:
        return figures[name]()
    except FiguresError as error:
        raise FiguresError(f"{where}: figure {name!r}: {error}") from error


def _markdown(rows: Rows) -> Iterator[str]:
    """Yields the lines of a table."""
    head, *body = rows
    for cells in (head, ["---"] * len(head), *body):
        yield "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def changed_lines(old: str, new: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yields each place where two texts differ: its first line in `old`, the old and new lines."""
    before = old.splitlines()
    after = new.splitlines()
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for kind, start, stop, new_start, new_stop in matcher.get_opcodes():
        if kind != "equal":
            yield start + 1, before[start:stop], after[new_start:new_stop]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Runs the script on the documents below `root`, and returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    options = parser.parse_args(arguments)

    texts = {
        path: path.read_text() for path in [root / "README.md", *sorted(root.glob("docs/**/*.md"))]
    }
    try:  # All documents before the first is written: an error leaves them as they are.
        filled = {path: fill(text, str(path.relative_to(root))) for path, text in texts.items()}
    except FiguresError as error:
        print(error, file=sys.stderr)
        return 2

    outdated = [path for path, text in texts.items() if filled[path] != text]
    for path in outdated:
        for line, before, after in changed_lines(texts[path], filled[path]):
            print(f"{path.relative_to(root)}:{line}:")
            for text in before:
                print(f"  - {text}")
            for text in after:
                print(f"  + {text}")
        if not options.check:
            path.write_text(filled[path])
    if options.check and outdated:
        print("out of date: run `make figures`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
