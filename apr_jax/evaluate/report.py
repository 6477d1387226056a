"""The report: one HTML file with table, figures and the thread-tree viewer, nothing loaded from anywhere.

It is drawn from files alone: OUT/eval/*/{traces.jsonl,summary.json}, OUT/*/{sft,rl}/metrics.jsonl, OUT/config.json.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from apr_jax.errors import UserError
from apr_jax.evaluate import figures
from apr_jax.evaluate.metrics import warnings
from apr_jax.evaluate.run import SUMMARY, TRACES, read_traces
from apr_jax.evaluate.viewer import page, select

_COLUMNS = (
    ("accuracy", "accuracy", "{:.1%}"),
    ("total_tokens", "total tokens", "{:.0f}"),
    ("sequential_tokens", "sequential tokens", "{:.0f}"),
    ("children", "children", "{:.2f}"),
    ("max_thread_tokens", "longest thread", "{:.0f}"),
    ("truncated", "truncated", "{:.1%}"),
)


def write_run_report(run: Path) -> Path:
    """Writes RUN/report.html and RUN/accuracy_against_*.{png,svg}; returns the page's path.

    Raises:
      UserError: the run has no evaluations.
    """
    folders = sorted(path.parent for path in run.glob(f"eval/*/{SUMMARY}"))
    if not folders:
        raise UserError(f"{run}: has no eval/*/{SUMMARY}; run `apr reproduce --out {run}` first")
    traces = {folder.name: read_traces(folder / TRACES) for folder in folders}
    summaries = {folder.name: json.loads((folder / SUMMARY).read_text()) for folder in folders}
    drawn = {measure: figures.accuracy_against(measure, traces) for measure in figures.LABELS}
    figures.save(drawn["max_thread_tokens"], run / "accuracy_against_window")
    pictures = [figures.to_svg(figure) for figure in drawn.values()] + _training(run)
    summary = "".join(
        [
            _about(run),
            *(f'<p class="warning">{html.escape(f"{name}: {text}")}</p>' for name, text in _warned(summaries)),
            "<h2>Results</h2>",
            _table(summaries),
            "<h2>Figures</h2>",
            '<div class="figures">' + "".join(f"<figure>{svg}</figure>" for svg in pictures) + "</div>",
        ]
    )
    path = run / "report.html"
    path.write_text(page(f"apr_jax: {run.name}", summary, select(traces)), encoding="utf-8")
    return path


def _table(summaries: dict[str, dict[str, Any]]) -> str:
    head = "".join(f"<th>{title}</th>" for title in ("evaluation", *(title for _, title, _ in _COLUMNS), "problems"))
    body = []
    for name, summary in summaries.items():
        cells = [form.format(summary[key]) for key, _, form in _COLUMNS]
        low, high = summary["ci95"]
        cells[0] += f' <span class="soft">[{100 * low:.1f}, {100 * high:.1f}]</span>'
        row = "".join(f"<td>{cell}</td>" for cell in (html.escape(name), *cells, summary["n"]))
        body.append(f"<tr>{row}</tr>")
    return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _warned(summaries: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(name, text) for name, summary in summaries.items() for text in warnings(summary, summary["method"])]


def _about(run: Path) -> str:
    path = run / "config.json"
    if not path.is_file():
        return ""
    config = json.loads(path.read_text())
    model, limits = config["model"], config["limits"]
    return (
        f'<p class="soft">experiment {html.escape(config["name"])}, seed {config["seed"]}: {model["layers"]} layers x '
        f"{model['width']}, window {limits['window']}, up to {limits['children']} children a spawn. "
        "Accuracy is of held-out problems, with a 95% Wilson interval.</p>"
    )


def _training(run: Path) -> list[str]:
    """Curves of the loss and of the reward, where the run has them."""
    found = []
    for stage, metric, label in (("sft", "loss", "supervised loss"), ("rl", "reward", "reward of a tree")):
        runs = {}
        for path in sorted(run.glob(f"*/{stage}/metrics.jsonl")):
            runs[f"{path.parent.parent.name}-{stage}"] = [json.loads(line) for line in path.read_text().splitlines()]
        if runs:
            found.append(figures.to_svg(figures.training_curves(runs, metric, label)))
    return found
