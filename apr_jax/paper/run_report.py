"""The report of a run: one HTML file with comparisons, tables, figures and thread trees.

The page loads nothing from anywhere. It is made from files alone: RUN/config.json, RUN/eval/*,
RUN/*/{sft,rl}/metrics.jsonl and RUN/data. Evaluations that were not run are listed.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from apr_jax.evaluate.cells import comparison_cells, spent, write
from apr_jax.evaluate.folder import parse_lines
from apr_jax.evaluate.scores import MEASURES, Trace, summarize, warnings
from apr_jax.io.storage import write_text
from apr_jax.paper import charts, controls, figures, published_figures, suite, tables
from apr_jax.paper.comparisons import comparisons
from apr_jax.paper.figure_parts import Drawn, method_name
from apr_jax.paper.kinds import KINDS
from apr_jax.paper.results import Results, read_run
from apr_jax.report.viewer import link, page, select

_MEASURED = tuple(title for title, _ in MEASURES.values())  # Titles of columns.

# The project's log. It exists in a clone, but not where only the library is installed.
_LOG = Path(__file__).parents[2] / "docs" / "log.md"

_TITLES = {
    "table1": "Table 1: SoS and SoS+ by temperature",
    "table2": "Table 2: demonstrations that SoS+ is trained on",
    "table3": "Table 3: every model by temperature",
}


def write_run_report(run: Path, data: Path) -> dict[str, Any]:
    """Writes RUN/report.html and RUN/figures/*.{png,svg}.

    Args:
      run: folder of the run.
      data: the run's data, with the test problems and the tokenizer for their demonstrations.

    Returns:
      every number of the report, for results.json.

    Raises:
      UserError: the run has no evaluations.
    """
    results = read_run(run, data)
    possible = [draw(results) for draw in (*figures.FIGURES, *controls.CONTROLS)]
    drawn = [figure for figure in possible if figure]
    drawn += controls.draw_training(training(run))
    for figure in drawn:
        charts.save(figure.figure, run / "figures" / figure.name)

    latencies = {
        name: answered.latency for name, answered in results.answered.items() if answered.latency
    }
    numbers = {
        "experiment": results.config.name,
        "seed": results.config.seed,
        "comparisons": comparisons(results),
        "main": tables.main_table(results),
        "sampled": tables.sampled_failures(results),
        "oracle": tables.oracle_table(results),
        "tables": tables.all_tables(results),
        "scores": tables.every_score(results),
        "cost": results.get("apr/rl") and results.answered["apr-rl"].slots,
        "latency": latencies,
        "missing": results.missing,
        "warnings": _warnings(results),
        "paper": published_figures.SOURCE,
    }

    shown = select({name: answered.traces for name, answered in results.plain().items()})
    text = page(f"apr_jax: {run.name}", _summary(results, numbers, drawn, shown), shown)
    write_text(run / "report.html", text)
    return numbers


def _summary(
    results: Results,
    numbers: dict[str, Any],
    drawn: Sequence[Drawn],
    shown: Mapping[str, Sequence[Trace]],
) -> str:
    """Returns the part of the page above the viewer, which holds the trees `shown`."""
    log = tried(results.config.name)
    where = "stands below" if log else "is in the project's docs/log.md"
    parts = [
        _about(results),
        *(f'<p class="warning">{html.escape(line)}</p>' for line in numbers["warnings"]),
        "<h2>The paper's comparisons, here</h2>",
        _comparisons(numbers["comparisons"]),
        _reached(numbers["comparisons"], where),
        log,
        "<h2>Greedy answers</h2>",
        _main(numbers),
        "<h2>What went wrong</h2>",
        _failures(numbers["main"], shown),
        _failures(numbers["sampled"], {}) if numbers["sampled"] else "",
        "<h2>Figures</h2>",
        '<div class="figures">',
        *(_figure(figure) for figure in drawn),
        "</div>",
        "<h2>Tables</h2>",
        *(_temperatures(_TITLES[name], rows) for name, rows in numbers["tables"].items()),
        _every(numbers["scores"]),
    ]
    if numbers["missing"]:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in numbers["missing"])
        parts.append(f"<h2>Not run</h2><ul>{lines}</ul>")
    return "".join(parts)


def _figure(figure: Drawn) -> str:
    """Returns a figure with its caption as HTML."""
    return (
        f'<figure><div class="plot">{charts.to_svg(figure.figure, figure.caption)}</div>'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )


def _about(results: Results) -> str:
    """Returns the paragraph that says what was trained and how intervals are computed."""
    config = results.config
    return (
        f'<p class="soft">Experiment {html.escape(config.name)}, seed {config.seed}:'
        f" {config.model.layers} layers x {config.model.width}, window {config.limits.window:,}, up"
        f" to {config.limits.children} children a spawn. Intervals are of 95% and of the test"
        " problems alone: Wilson for shares, a bootstrap over problems for other means and,"
        " paired, for gaps; p is McNemar's exact test. The paper:"
        f" {html.escape(published_figures.SOURCE)}; 228M parameters, one training each.</p>"
    )


def _comparisons(rows: list[dict[str, Any]]) -> str:
    """Returns the table of comparisons."""
    if not rows:
        return '<p class="soft">None: a comparison needs both methods.</p>'
    body = []
    for row in rows:
        cells = comparison_cells(row)
        title = html.escape(cells["comparison"])
        title += _under(html.escape(cells["note"])) + _under(html.escape(cells["chosen"]))
        body.append(
            (
                title,
                cells["one"] + _under(spent(row["one_spent"])),
                cells["other"] + _under(spent(row["other_spent"])),
                f"<b>{cells['gap']}</b> {_soft(cells['interval'])}",
                html.escape(cells["p"]),
                cells["n"],
                cells["paper"] + _under(cells["verdict"]),
            )
        )
    return _table(("", "one", "other", "gap", "p", "problems", "the paper"), body)


def _reached(rows: list[dict[str, Any]], where: str) -> str:
    """Says how many of the paper's gaps are reached, and what that means, in a paragraph.

    `where` says where to read what was tried for the other gaps.
    """
    verdicts = [row["reached"] for row in rows if row["reached"] is not None]
    if not verdicts:
        return ""
    return (
        f'<p class="soft">{sum(verdicts)} of {len(verdicts)} of the paper\'s gaps are reached:'
        " ours is at least as large, whatever its interval; in the same window APR's score too; of"
        f" sequential tokens fewer, at higher accuracy. What was tried for the others {where}; why"
        " answers are wrong, under What went wrong.</p>"
    )


def tried(scale: str) -> str:
    """Returns the entries of docs/log.md whose headings name the scale, folded away.

    Links are left out, because their targets need not exist where the report is read.

    Returns:
      HTML; "" if there is no such entry.
    """
    if not _LOG.is_file():
        return ""
    markdown = MarkdownIt("commonmark", {"html": False}).disable(["link", "image", "autolink"])
    tokens = markdown.parse(_LOG.read_text(encoding="utf-8"))

    kept = []
    entries = 0
    is_wanted = False
    for index, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag in ("h1", "h2"):
            heading = tokens[index + 1].content
            is_wanted = re.search(rf"\b{re.escape(scale)}\b", heading) is not None
            if is_wanted:
                entries += 1
        if is_wanted:
            if token.type.startswith("heading"):
                token.tag = f"h{int(token.tag[1]) + 1}"  # It stands under a heading of the report.
            kept.append(token)
    if not kept:
        return ""

    rendered = markdown.renderer.render(kept, markdown.options, {})
    summary = f"What was tried at {html.escape(scale)}: {entries} entries of docs/log.md"
    return f'<details class="log"><summary>{summary}</summary>{rendered}</details>'


def _main(numbers: dict[str, Any]) -> str:
    """Returns the table of plain greedy evaluations, followed by the demonstrations."""
    body: list[Sequence[Any]] = []
    for name, row in numbers["main"].items():
        low, high = row["ci95"]
        body.append(
            (
                f'<a href="{html.escape(link(name))}">{html.escape(row["label"])}</a>',
                _score({"mean": row["accuracy"], "low": low, "high": high}),
                *(_measured(row["measures"][key], key) for key in MEASURES),
                f"{row['thread_tokens']:.0f}",
                f"{row['spawned']:.1%}",
                f"{row['truncated']:.1%}",
                row["n"],
            )
        )
    for method, row in numbers["oracle"].items():
        name = method_name(method)
        body.append(
            (
                f"<i>{name} demonstrations: the oracle</i>",
                _score(row["accuracy"]),
                *(write(key, row[key]) for key in MEASURES),
                "",
                "",
                "",
                row["accuracy"]["n"],
            )
        )
    titles = (
        "",
        "accuracy (%)",
        *_MEASURED,
        "tokens a thread",
        "spawned",
        "truncated",
        "problems",
    )
    return _table(titles, body)


def _failures(rows: dict[str, dict[str, Any]], shown: Mapping[str, Sequence[Trace]]) -> str:
    """Returns the table of failures: a row for each kind, a column for each evaluation.

    Args:
      rows: name -> an evaluation's `label`, `n` and `failures`.
      shown: name -> the trees that the viewer holds; a number links to its examples among these.
    """
    kinds = [kind for kind in KINDS if any(kind in row["failures"] for row in rows.values())]
    if not kinds:
        return '<p class="soft">Nothing.</p>'

    body = []
    for kind in kinds:
        title = f"<b>{kind}</b>" + _under(html.escape(KINDS[kind]))
        cells = [_failure_cell(kind, name, row, shown) for name, row in rows.items()]
        body.append((title, *cells))

    titles = [html.escape(row["label"]) + _under(f"{row['n']:,} answers") for row in rows.values()]
    table = _table(("", *titles), body)
    if not shown:
        return table
    trees = max(map(len, shown.values()), default=0)
    problems = max(row["n"] for row in rows.values())
    where = (
        f"A number leads to its examples: below stand the trees of {trees:,} of"
        f" {problems:,} problems. The run's eval/*/traces.jsonl has all."
    )
    return f'<p class="soft">{where}</p>' + table


def _failure_cell(
    kind: str, name: str, row: dict[str, Any], shown: Mapping[str, Sequence[Trace]]
) -> str:
    """Says how often an evaluation failed in a way, with a link to examples in the viewer."""
    count = row["failures"].get(kind, 0)
    if not count:
        return ""
    cell = f"{count} <span class='soft'>({count / row['n']:.1%})</span>"
    if not shown:
        return cell
    examples = sum(trace["failure"] == kind for trace in shown.get(name, ()))
    if examples:
        cell = f'<a href="{html.escape(link(name, show=kind))}">{cell}</a>'
    return cell + _under(f"{examples} of {count} shown")


def _temperatures(title: str, rows: list[dict[str, Any]]) -> str:
    """Returns one of Tables 1 to 3: a row for each model, a column for each temperature."""
    temperatures = list(rows[0]["cells"])
    body = []
    for row in rows:
        steps = "" if row["step"] is None else f"{row['step']:,} steps"
        cells = [_temperature_cell(row["cells"][temperature]) for temperature in temperatures]
        body.append((html.escape(row["label"]) + _under(steps), *cells))
    head = (
        "accuracy (%), tokens and children of a tree; problems",
        *(f"T = {temperature}" for temperature in temperatures),
    )
    return f"<h3>{title}</h3>" + _table(head, body)


def _temperature_cell(cell: dict[str, Any]) -> str:
    """Returns our score, with the paper's below it."""
    ours = cell["ours"]
    paper = cell["paper"]
    text = ""
    if ours:
        text = _score(ours) + _under(f"{spent(ours)}; {ours['n']:,} problems")
    elif paper is not None:
        text = "not run"
    if paper is not None:
        text += _under(f"paper {paper:.1f}")
    return text


def _every(rows: list[dict[str, Any]]) -> str:
    """Returns the table of every evaluation with what its threads did, folded away."""
    body = [
        (
            html.escape(row["label"]),
            _score(row["accuracy"]),
            *(write(key, row[key]) for key in MEASURES),
            f"{row['spawned']:.1%}",
            f"{row['truncated']:.1%}",
            row["samples"],
            row["accuracy"]["n"],
        )
        for row in rows
    ]
    titles = ("", "accuracy (%)", *_MEASURED, "spawned", "truncated", "samples", "problems")
    return (
        f"<details><summary>All {len(rows)} evaluations</summary>{_table(titles, body)}</details>"
    )


def _table(head: Iterable[str], body: Iterable[Sequence[Any]]) -> str:
    """Returns a table as HTML; its cells are HTML already."""
    titles = "".join(f"<th>{title}</th>" for title in head)
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="card">{table}</div>'


def _score(cell: dict[str, Any]) -> str:
    """Returns an accuracy in percent with its interval."""
    mean, low, high = (f"{100 * cell[key]:.1f}" for key in ("mean", "low", "high"))
    return f"{mean} {_soft(f'{low} to {high}')}"


def _measured(cell: dict[str, Any], measure: str) -> str:
    """Returns a measure with its interval, unless the interval is a point."""
    mean, low, high = (write(measure, cell[key]) for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} {_soft(f'{low} to {high}')}"


def _soft(interval: str) -> str:
    """Returns an interval in brackets and in a fainter colour."""
    return f'<span class="soft">[{interval}]</span>'


def _under(text: str) -> str:
    """Returns a smaller line below; "" if there is no text."""
    return f'<br><span class="soft under">{text}</span>' if text else ""


def _warnings(results: Results) -> list[str]:
    """Lists every warning of the run's evaluations.

    They are computed from the traces, because a `summary.json` may be older than a warning. Where
    no child was wanted, there is no warning that none was spawned.
    """
    lines = []
    for answered in results.answered.values():
        decoding = answered.evaluation.decoding
        # Only traces with a verdict were read. The summary knows how many had none.
        unknown = answered.summary.get("unknown", 0)
        summary = summarize(answered.traces) | {"unknown": unknown}
        parallel = suite.parallel(answered.summary["method"]) and not decoding.childless
        for text in warnings(summary, parallel, decoding.forced):
            lines.append(f"{answered.label}: {text}")
    return lines


def training(run: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Reads the metrics of the run's trainings.

    Returns:
      stage -> method -> the lines of its metrics.jsonl. A half line at the end, which a killed
      process leaves, is left out.

    Raises:
      UserError: a line is damaged.
    """
    metrics: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for stage in ("sft", "rl"):
        for path in sorted(run.glob(f"*/{stage}/metrics.jsonl")):
            text = path.read_text(encoding="utf-8", errors="replace")
            whole_lines = text[: text.rfind("\n") + 1]
            lines = parse_lines(path, whole_lines, "delete the line")
            if lines:
                method = path.parent.parent.name
                metrics.setdefault(stage, {})[method] = lines
    return metrics
