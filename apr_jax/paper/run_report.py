"""The report of a run: one HTML file with a thread tree, figures, comparisons and tables.

The page loads nothing from anywhere. It is made from files alone: RUN/config.json, RUN/eval/*,
RUN/*/{sft,rl}/metrics.jsonl and RUN/data. Evaluations that were not run are listed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from apr_jax.evaluate.cells import comparison_cells, spent, write
from apr_jax.evaluate.scores import MEASURES, Trace, summarize, warnings
from apr_jax.io.storage import write_text
from apr_jax.paper import charts, controls, figures, published_figures, suite, tables
from apr_jax.paper.comparisons import comparisons
from apr_jax.paper.figure_parts import Drawn, method_name
from apr_jax.paper.kinds import KINDS
from apr_jax.paper.opening import opening, overview
from apr_jax.paper.results import Results, read_run
from apr_jax.paper.trainings import read_metrics, trainings
from apr_jax.report.templates import html_templates
from apr_jax.report.viewer import link, page, select
from apr_jax.train.metrics.recorder import FILE

# The project's log. It exists in a clone, but not where only the library is installed.
_LOG = Path(__file__).parents[2] / "docs" / "log.md"

TEMPLATES = html_templates("apr_jax.paper", "templates")

_TITLES = {
    "table1": "Table 1: SoS and SoS+ by temperature",
    "table2": "Table 2: demonstrations that SoS+ is trained on",
    "table3": "Table 3: every model by temperature",
}


def write_run_report(run: Path, data: Path, models: Path) -> dict[str, Any]:
    """Writes RUN/report.html and RUN/figures/*.{png,svg}.

    Args:
      run: folder of the run.
      data: the run's data, with the test problems and the tokenizer for their demonstrations.
      models: folder of the run that trained the models, as a rule `run` itself.

    Returns:
      every number of the report, for results.json.

    Raises:
      UserError: the run has no evaluations.
    """
    results = read_run(run, data)
    is_compared = results.config.evaluate.compared
    published = figures.FIGURES if is_compared else ()
    possible = [draw(results) for draw in (overview, *published, *controls.CONTROLS)]
    drawn = [figure for figure in possible if figure]
    drawn += controls.draw_training(training(run))
    for figure in drawn:
        charts.save(figure.figure, run / "figures" / figure.name)

    latencies = {
        name: answered.latency for name, answered in results.answered.items() if answered.latency
    }
    reinforced = results.get("apr/rl")
    first = opening(results)
    numbers = {
        "experiment": results.config.name,
        "seed": results.config.seed,
        "opening": first,
        "comparisons": comparisons(results) if is_compared else [],
        "main": tables.main_table(results),
        "trainings": trainings(
            models,
            {one.evaluation.model: one.summary["step"] for one in results.headline().values()},
        ),
        "sampled": tables.sampled_failures(results),
        "oracle": tables.oracle_table(results),
        "tables": tables.all_tables(results) if is_compared else {},
        "scores": tables.every_score(results),
        "cost": reinforced.slots if reinforced else None,
        "latency": latencies,
        "missing": results.missing,
        "warnings": _warnings(results),
        "paper": published_figures.SOURCE,
    }

    traces = {name: answered.traces for name, answered in results.headline().items()}
    shown = select(traces, always=first["problem"])
    summary = _summary(results, numbers, drawn, shown)
    text = page(f"apr_jax: {run.name}", summary, shown, first)
    write_text(run / "report.html", text)
    return numbers


def _summary(
    results: Results,
    numbers: dict[str, Any],
    drawn: Sequence[Drawn],
    shown: Mapping[str, Sequence[Trace]],
) -> str:
    """Returns the part of the page above the viewer, which holds the trees `shown`, as HTML."""
    rows = numbers["comparisons"]
    return TEMPLATES.get_template("report.html").render(
        config=results.config,
        numbers=numbers,
        comparisons=[(row, comparison_cells(row)) for row in rows],
        verdicts=[row["reached"] for row in rows if row["reached"] is not None],
        log=tried(results.config.name),
        figures=[(charts.to_svg(part.figure, part.caption), part.caption) for part in drawn],
        shown=shown,
        titles=_TITLES,
        measures={key: title for key, (title, _) in MEASURES.items()},
    )


def _kinds_in(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the kinds of failure that occur in some rows, with what they mean."""
    failures = [row["failures"] for row in rows.values()]
    return {
        kind: meaning
        for kind, meaning in KINDS.items()
        if any(kind in of_one for of_one in failures)
    }


def _percent(share: float) -> str:
    """Writes a share in percent."""
    return f"{100 * share:.1f}"


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
    return TEMPLATES.get_template("log.html").render(scale=scale, entries=entries, text=rendered)


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
      stage -> method -> the lines of its metrics.jsonl.

    Raises:
      UserError: a line is damaged.
    """
    metrics: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for stage in ("sft", "rl"):
        for path in sorted(run.glob(f"*/{stage}/{FILE}")):
            lines = read_metrics(path.parent)
            if lines:
                method = path.parent.parent.name
                metrics.setdefault(stage, {})[method] = lines
    return metrics


# What the templates call.
TEMPLATES.globals |= {
    "kinds_in": _kinds_in,
    "link": link,
    "method_name": method_name,
    "percent": _percent,
    "spent": spent,
    "write": write,
}
