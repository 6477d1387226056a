"""The page: one HTML file with whatever stands on top and the thread-tree viewer below, nothing
loaded from anywhere.

Its parts are in `assets/`: `page.html`, two style sheets, and the scripts in the order of
`_SCRIPTS`. The page itself forbids every request and every script but that one, whatever a model
wrote."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import string
import urllib.parse
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from apr_jax.evaluate.scores import Trace
from apr_jax.evaluate.trace import unpack_streams
from apr_jax.io.storage import write_text

_SCRIPTS = ("tree.js", "lanes.js", "text.js", "chooser.js", "viewer.js")
_STYLES = ("page.css", "viewer.css")
_TOKENS = 600_000  # That a page carries, some 5 MB.
_RIGHT = 24  # Problems at most that the first evaluation got right.
_EXAMPLES = 8  # Of each kind of failure of each evaluation, at most.


def page(title: str, summary: str, evaluations: Mapping[str, Sequence[Trace]]) -> str:
    """The whole page.

    Args:
      summary: HTML that stands above the viewer.
      evaluations: name -> traces, as `select` gives them. A trace may carry `failure`: "" if it is
        right, else what kind of failure it is.
    """
    script = _assets(_SCRIPTS)
    fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {"evaluations": [_embedded(name, traces) for name, traces in evaluations.items()]}
    return string.Template(_assets(("page.html",))).substitute(
        title=html.escape(title),
        summary=summary,
        style=_assets(_STYLES),
        script=script,
        policy=(
            "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src"
            f" 'sha256-{fingerprint}'"
        ),
        # A "<" could end the script element or open a comment in it.
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def select(traces: Mapping[str, Sequence[Trace]]) -> dict[str, list[Trace]]:
    """The same problems for all evaluations: examples of each kind of failure of each, and some
    that were right.

    One example a kind at a time, until the page is full.

    Args:
      traces: of each evaluation; only first samples are shown.
    """
    first = {
        name: {trace["id"]: trace for trace in lines if trace["sample"] == 0}
        for name, lines in traces.items()
    }
    queues: list[list[str]] = []
    for shown in first.values():
        kinds: dict[str, list[str]] = {}
        for trace in shown.values():
            if not trace["correct"]:
                kinds.setdefault(trace.get("failure", ""), []).append(trace["id"])
        queues += [ids[:_EXAMPLES] for ids in kinds.values()]
    lead = next((name for name in ("apr-rl", "apr-sft") if name in first), next(iter(first)))
    right = [trace["id"] for trace in first[lead].values() if trace["correct"]][:_RIGHT]
    queues += [right[::3], right[1::3], right[2::3]]
    wanted: set[str] = set()
    room = _TOKENS
    for problem in filter(None, itertools.chain(*itertools.zip_longest(*queues))):
        size = sum(_size(shown[problem]) for shown in first.values() if problem in shown)
        if problem not in wanted and (size <= room or not wanted):
            wanted.add(problem)
            room -= size
    return {
        name: [trace for trace in shown.values() if trace["id"] in wanted]
        for name, shown in first.items()
    }


def link(evaluation: str, *, show: str | None = None, problem: str | None = None) -> str:
    """The address, within the page, of what the viewer shows: `<a
    href="{html.escape(link(...))}">`.

    Args:
      evaluation: name of the left one.
      show: "all", "right", "wrong", or a kind of failure (`trace["failure"]`): which problems to
        choose from.
      problem: id of the one to open; by default the first of those.
    """
    chosen = {"left": evaluation, "show": show, "problem": problem}
    return "#" + urllib.parse.urlencode(
        {name: value for name, value in chosen.items() if value is not None}
    )


def write_tree_page(trace: dict[str, Any], name: str, path: Path) -> None:
    """The viewer of one tree, for `apr solve --html`."""
    write_text(path, page(f"apr_jax: {trace['problem']}", "", {name: [trace]}))


def _assets(names: Sequence[str]) -> str:
    folder = resources.files("apr_jax.report") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _size(trace: Trace) -> int:
    return sum(sum(thread["lengths"]) for thread in trace["threads"])


def _embedded(name: str, traces: Sequence[Trace]) -> dict[str, Any]:
    """An evaluation as `viewer.js` reads it: texts once, as the pieces of all its trees."""
    pieces = {token: text for trace in traces for token, text in trace["pieces"].items()}
    return {"name": name, "pieces": pieces, "traces": [_embedded_trace(trace) for trace in traces]}


def _embedded_trace(trace: Trace) -> dict[str, Any]:
    threads = []
    for thread, (ids, logprobs) in zip(trace["threads"], unpack_streams(trace), strict=True):
        spans = [
            [kind, length]
            for (kind, _), length in zip(thread["spans"], thread["lengths"], strict=True)
        ]
        kept = {
            key: thread[key]
            for key in ("thread_index", "parent", "round", "depth", "status", "start", "end")
        }
        threads.append(
            {
                **kept,
                "spans": spans,
                "ids": ids.tolist(),
                "logprobs": [_short(value) for value in logprobs],
            }
        )
    return {
        **{key: value for key, value in trace.items() if key not in ("pieces", "streams")},
        "threads": threads,
    }


def _short(logprob: float) -> float:
    """With the three decimals that were kept; zeros, which most are, as one character."""
    return round(float(logprob), 3) or 0
