"""The page: one HTML file with whatever stands on top and the thread-tree viewer below, nothing loaded from anywhere."""

from __future__ import annotations

import html
import json
import string
import urllib.parse
from importlib import resources
from pathlib import Path
from typing import Any

_EMBEDDED = 60  # Problems that the viewer carries, the same for all evaluations.


def page(title: str, summary: str, evaluations: dict[str, list[dict[str, Any]]]) -> str:
    """The whole page.

    Args:
      summary: HTML that stands above the viewer.
      evaluations: name -> traces, as `select` gives them.
    """
    assets = resources.files("apr_jax.evaluate") / "assets"
    # A "<" could end the script element or open a comment in it, whatever a model wrote.
    embedded = json.dumps({"evaluations": evaluations}, separators=(",", ":")).replace("<", "\\u003c")
    return string.Template((assets / "report.html").read_text()).substitute(
        title=html.escape(title),
        summary=summary,
        style=(assets / "report.css").read_text(),
        script=(assets / "report.js").read_text(),
        traces=embedded,
    )


def select(traces: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The same problems for all: some that the parallel model got wrong, then others."""
    lead = next((name for name in ("apr-rl", "apr-sft") if name in traces), next(iter(traces)))
    first = [trace for trace in traces[lead] if trace["sample"] == 0]
    wrong = [trace["id"] for trace in first if not trace["correct"]][: _EMBEDDED // 3]
    right = [trace["id"] for trace in first if trace["correct"]][: _EMBEDDED - len(wrong)]
    wanted = {*wrong, *right}
    return {
        name: [trace for trace in lines if trace["id"] in wanted and trace["sample"] == 0]
        for name, lines in traces.items()
    }


def link(evaluation: str, *, show: str | None = None, problem: str | None = None) -> str:
    """The address, within the page, of what the viewer shows: `<a href="{html.escape(link(...))}">`.

    Args:
      evaluation: name of the left one.
      show: "all", "right", "wrong", or a kind of failure (`trace["failure"]`): which problems to choose from.
      problem: id of the one to open; by default the first of those.
    """
    chosen = {"left": evaluation, "show": show, "problem": problem}
    return "#" + urllib.parse.urlencode({name: value for name, value in chosen.items() if value is not None})


def write_tree_page(trace: dict[str, Any], name: str, path: Path) -> None:
    """The viewer of one tree, for `apr solve --html`."""
    problem = f"{' '.join(map(str, trace['numbers']))} -> {trace['target']}"
    path.write_text(page(f"apr_jax: {problem}", "", {name: [trace]}), encoding="utf-8")
