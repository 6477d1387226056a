"""The report: one HTML file with comparisons, tables, figures and the thread-tree viewer, nothing
loaded from anywhere.

It is drawn from files alone: RUN/config.json, RUN/eval/*, RUN/*/{sft,rl}/metrics.jsonl, RUN/data.
What was not run is listed."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from apr_jax.evaluate import failures
from apr_jax.evaluate.cells import comparison_cells, spent, write
from apr_jax.evaluate.runner import parse_lines
from apr_jax.evaluate.scores import MEASURES, Trace, summarize, warnings
from apr_jax.io.storage import write_text
from apr_jax.paper import charts, controls, figures, published_figures, tables
from apr_jax.paper.comparisons import comparisons
from apr_jax.paper.figure_parts import Drawn, method_name
from apr_jax.paper.results import Results, read_run
from apr_jax.report.viewer import link, page, select

_MEASURED = tuple(title for title, _ in MEASURES.values())
# Of the clone; the library alone is installed without it.
_LOG = Path(__file__).parents[2] / "docs" / "log.md"
_TITLES = {
    "table1": "Table 1: SoS and SoS+ by temperature",
    "table2": "Table 2: what SoS+ is trained on (wide beams: up to 15)",
    "table3": "Table 3: every model by temperature",
}


def write_run_report(run: Path, data: Path) -> dict[str, Any]:
    """Writes RUN/report.html and RUN/figures/*.{png,svg}; returns every number in it, for
    results.json.

    Args:
      data: the run's; the oracle's problems and tokenizer are there.

    Raises:
      UserError: the run has no evaluations.
    """
    results = read_run(run, data)
    drawn = [
        one for figure in (*figures.FIGURES, *controls.CONTROLS) if (one := figure(results))
    ] + controls.draw_training(training(run))
    for one in drawn:
        charts.save(one.figure, run / "figures" / one.name)
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
        "latency": {name: one.latency for name, one in results.answered.items() if one.latency},
        "missing": results.missing,
        "warnings": _warned(results),
        "paper": published_figures.SOURCE,
    }
    shown = select({name: one.traces for name, one in results.plain().items()})
    text = page(f"apr_jax: {run.name}", _summary(results, numbers, drawn, shown), shown)
    write_text(run / "report.html", text)
    return numbers


def _summary(
    results: Results,
    numbers: dict[str, Any],
    drawn: Sequence[Drawn],
    shown: Mapping[str, Sequence[Trace]],
) -> str:
    """What stands above the viewer, which holds the trees `shown`."""
    log = tried(results.config.name)
    parts = [
        _about(results),
        *(f'<p class="warning">{html.escape(line)}</p>' for line in numbers["warnings"]),
        "<h2>The paper's comparisons, here</h2>",
        _comparisons(numbers["comparisons"]),
        _reached(
            numbers["comparisons"], "stands below" if log else "is in the project's docs/log.md"
        ),
        log,
        "<h2>Greedy answers</h2>",
        _main(numbers),
        "<h2>What went wrong</h2>",
        _failures(numbers["main"], shown),
        _failures(numbers["sampled"], {}) if numbers["sampled"] else "",
        "<h2>Figures</h2>",
        '<div class="figures">',
        *(
            f'<figure><div class="plot">{charts.to_svg(one.figure, one.caption)}</div>'
            f"<figcaption>{html.escape(one.caption)}</figcaption></figure>"
            for one in drawn
        ),
        "</div>",
        "<h2>Tables</h2>",
        *(_temperatures(_TITLES[name], rows) for name, rows in numbers["tables"].items()),
        _every(numbers["scores"]),
    ]
    if numbers["missing"]:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in numbers["missing"])
        parts.append(f"<h2>Not run</h2><ul>{lines}</ul>")
    return "".join(parts)


def _about(results: Results) -> str:
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
    if not rows:
        return '<p class="soft">None: a comparison needs both methods.</p>'
    body = []
    for row in rows:
        cells = comparison_cells(row)
        body.append(
            (
                html.escape(cells["comparison"])
                + _under(html.escape(cells["note"]))
                + _under(html.escape(cells["chosen"])),
                *(cells[side] + _under(spent(row[f"{side}_spent"])) for side in ("one", "other")),
                f"<b>{cells['gap']}</b> {_soft(cells['interval'])}",
                html.escape(cells["p"]),
                cells["n"],
                cells["paper"] + _under(cells["verdict"]),
            )
        )
    return _table(("", "one", "other", "gap", "p", "problems", "the paper"), body)


def _reached(rows: list[dict[str, Any]], where: str) -> str:
    """What the verdicts mean, how many fail, and where it says what was tried."""
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
    """The entries of docs/log.md whose headings name the scale, folded away, with no link that
    could die; "" of none.
    """
    if not _LOG.is_file():
        return ""
    markdown = MarkdownIt("commonmark", {"html": False}).disable(["link", "image", "autolink"])
    tokens = markdown.parse(_LOG.read_text(encoding="utf-8"))
    kept, entries, named = [], 0, False
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and token.tag in ("h1", "h2"):
            named = (
                after is not None
                and re.search(rf"\b{re.escape(scale)}\b", after.content) is not None
            )
            entries += named
        if named:
            if token.type.startswith("heading"):
                token.tag = f"h{int(token.tag[1]) + 1}"  # It stands under a heading of the report.
            kept.append(token)
    if not kept:
        return ""
    shown = markdown.renderer.render(kept, markdown.options, {})
    what = f"What was tried at {html.escape(scale)}: {entries} entries of docs/log.md"
    return f'<details class="log"><summary>{what}</summary>{shown}</details>'


def _main(numbers: dict[str, Any]) -> str:
    body: list[Sequence[Any]] = []
    for name, row in numbers["main"].items():
        body.append(
            (
                f'<a href="{html.escape(link(name))}">{html.escape(row["label"])}</a>',
                _score({"mean": row["accuracy"], "low": row["ci95"][0], "high": row["ci95"][1]}),
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
    """Kinds by evaluation; a number leads to its examples in the viewer, which holds the trees
    `shown`, and says how many.
    """
    kinds = [
        kind for kind in failures.KINDS if any(kind in row["failures"] for row in rows.values())
    ]
    if not kinds:
        return '<p class="soft">Nothing.</p>'
    body = []
    for kind in kinds:
        cells = []
        for name, row in rows.items():
            count, some = (
                row["failures"].get(kind, 0),
                sum(trace["failure"] == kind for trace in shown.get(name, ())),
            )
            share = f"{count} <span class='soft'>({count / row['n']:.1%})</span>"
            linked = (
                f'<a href="{html.escape(link(name, show=kind))}">{share}</a>' if some else share
            )
            cells.append(
                linked + _under(f"{some} of {count} shown" if shown else "") if count else ""
            )
        body.append((f"<b>{kind}</b>" + _under(html.escape(failures.KINDS[kind])), *cells))
    held = max(map(len, shown.values()), default=0)
    where = (
        f"A number leads to its examples: below stand the trees of {held:,} of"
        f" {max(row['n'] for row in rows.values()):,} problems. The run's eval/*/traces.jsonl has"
        " all."
    )
    head = (
        "",
        *(html.escape(row["label"]) + _under(f"{row['n']:,} answers") for row in rows.values()),
    )
    return (f'<p class="soft">{where}</p>' if shown else "") + _table(head, body)


def _temperatures(title: str, rows: list[dict[str, Any]]) -> str:
    temperatures = list(rows[0]["cells"])
    body = []
    for row in rows:
        cells = []
        for temperature in temperatures:
            found = row["cells"][temperature]
            ours = "not run" if found["paper"] is not None else ""
            if found["ours"]:
                ours = _score(found["ours"]) + _under(
                    f"{spent(found['ours'])}; {found['ours']['n']:,} problems"
                )
            cells.append(
                ours + _under("" if found["paper"] is None else f"paper {found['paper']:.1f}")
            )
        steps = "" if row["step"] is None else f"{row['step']:,} steps"
        body.append((html.escape(row["label"]) + _under(steps), *cells))
    head = (
        "accuracy (%), tokens and children of a tree; problems",
        *(f"T = {temperature}" for temperature in temperatures),
    )
    return f"<h3>{title}</h3>" + _table(head, body)


def _every(rows: list[dict[str, Any]]) -> str:
    """Every evaluation with its threads, folded away."""
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
    titles = "".join(f"<th>{title}</th>" for title in head)
    rows = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return (
        "<div"
        f' class="card"><table><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _score(cell: dict[str, Any]) -> str:
    mean, low, high = (f"{100 * cell[key]:.1f}" for key in ("mean", "low", "high"))
    return f"{mean} {_soft(f'{low} to {high}')}"


def _measured(cell: dict[str, Any], measure: str) -> str:
    mean, low, high = (write(measure, cell[key]) for key in ("mean", "low", "high"))
    return mean + ("" if low == high else f" {_soft(f'{low} to {high}')}")


def _soft(interval: str) -> str:
    return f'<span class="soft">[{interval}]</span>'


def _under(text: str) -> str:
    """A smaller line below; none of no text."""
    return f'<br><span class="soft under">{text}</span>' if text else ""


def _warned(results: Results) -> list[str]:
    """Every warning, but not that no tree spawned where none should.

    Of the traces: a `summary.json` may be older than what is warned of.
    """
    found = []
    for one in results.answered.values():
        # The traces that are read are those with a verdict; how many there were without one, the
        # summary knows.
        summary = summarize(one.traces) | {"unknown": one.summary.get("unknown", 0)}
        method = "" if one.evaluation.decoding.childless else one.summary["method"]
        found += [
            f"{one.label}: {text}"
            for text in warnings(summary, method, one.evaluation.decoding.forced)
        ]
    return found


def training(run: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Stage -> method -> the lines of its metrics.jsonl, where the run has them; without the half
    line that a kill leaves.

    Raises:
      UserError: a line is damaged.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for stage in ("sft", "rl"):
        for path in sorted(run.glob(f"*/{stage}/metrics.jsonl")):
            text = path.read_text(encoding="utf-8", errors="replace")
            whole = text[: text.rfind("\n") + 1]
            if lines := parse_lines(path, whole, "delete the line"):
                found.setdefault(stage, {})[path.parent.parent.name] = lines
    return found
