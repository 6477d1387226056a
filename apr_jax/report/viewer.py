"""The HTML page: anything on top, and the viewer of thread trees below it.

A page is one file and loads nothing from anywhere. Its parts are in `assets/`: `page.html`, two
style sheets, and the scripts in the order of `_SCRIPTS`. The page's own security policy forbids
every request and every script but that one, whatever a model wrote into a tree.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from apr_jax.evaluate.scores import Trace
from apr_jax.evaluate.trace import unpack_streams
from apr_jax.io.storage import write_text
from apr_jax.report.templates import html_templates

_SCRIPTS = (
    "tree.js",
    "lanes.js",
    "text.js",
    "clock.js",
    "opening.js",
    "chooser.js",
    "viewer.js",
)
_STYLES = ("page.css", "viewer.css")
_TEMPLATES = html_templates("apr_jax.report", "assets")

_MOST_TOKENS = 600_000  # Tokens of all trees of a page, which then has some 5 MB.
_MOST_RIGHT = 24  # Problems that the first evaluation got right.
_MOST_EXAMPLES = 8  # Examples of each kind of failure of each evaluation.

_OPENING_FIELDS = ("problem", "trees")  # What `opening.js` reads.

# Fields of a traced thread that the viewer reads as they are.
_THREAD_FIELDS = ("thread_index", "parent", "round", "depth", "status", "start", "end")


def page(
    title: str,
    summary: str,
    evaluations: Mapping[str, Sequence[Trace]],
    opening: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Returns the whole page as HTML.

    Args:
      title: the title, as text.
      summary: HTML that stands above the viewer.
      evaluations: name -> traces, as `select` gives them. A trace may have a `failure`: its kind of
        failure, or "" if the answer is right.
      opening: a tree that plays in the element of `summary` with the id "opening": its `problem`,
        and `trees`, name on a button -> evaluation. Without it there is none.
    """
    script = _assets(_SCRIPTS)
    fingerprint = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
        f" script-src 'sha256-{fingerprint}'"
    )
    return _TEMPLATES.get_template("page.html").render(
        title=title,
        summary=summary,
        style=_assets(_STYLES),
        script=script,
        policy=policy,
        data={
            "evaluations": [_embedded(name, traces) for name, traces in evaluations.items()],
            "opening": {field: opening[field] for field in _OPENING_FIELDS if field in opening},
        },
    )


def select(traces: Mapping[str, Sequence[Trace]], always: str = "") -> dict[str, list[Trace]]:
    """Chooses the problems of a page, the same for all evaluations.

    They are examples of each kind of failure of each evaluation, and some problems that were
    answered right. One problem of each kind is taken at a time, until the page is full.

    Args:
      traces: evaluation -> its traces. Only the first sample of each problem is shown.
      always: the id of a problem that is taken in any case; "" is none.

    Returns:
      evaluation -> its traces of the chosen problems.
    """
    shown = {
        name: {trace["id"]: trace for trace in lines if trace["sample"] == 0}
        for name, lines in traces.items()
    }
    chosen: set[str] = set()
    room = _MOST_TOKENS
    first = [[always]] if always else []
    for problem in _by_turns(first + _failed(shown) + _right(shown)):
        size = sum(_tokens(of_one[problem]) for of_one in shown.values() if problem in of_one)
        if problem not in chosen and (size <= room or not chosen):
            chosen.add(problem)
            room -= size
    return {
        name: [trace for trace in of_one.values() if trace["id"] in chosen]
        for name, of_one in shown.items()
    }


def _failed(shown: Mapping[str, Mapping[str, Trace]]) -> list[list[str]]:
    """Returns ids of problems: a list for each kind of failure of each evaluation."""
    lists: list[list[str]] = []
    for of_one in shown.values():
        kinds: dict[str, list[str]] = {}
        for trace in of_one.values():
            if not trace["correct"]:
                kinds.setdefault(trace.get("failure", ""), []).append(trace["id"])
        lists += [ids[:_MOST_EXAMPLES] for ids in kinds.values()]
    return lists


def _right(shown: Mapping[str, Mapping[str, Trace]]) -> list[list[str]]:
    """Returns ids of problems that were answered right, in three lists, so that they come oftener.

    They are problems of APR, if it was evaluated, and else of the first evaluation.
    """
    lead = next(
        (name for start in ("apr-rl", "apr-sft") for name in shown if name.startswith(start)),
        next(iter(shown)),
    )
    right = [trace["id"] for trace in shown[lead].values() if trace["correct"]][:_MOST_RIGHT]
    return [right[::3], right[1::3], right[2::3]]


def _by_turns(lists: list[list[str]]) -> Iterator[str]:
    """Yields the first of each list, then the second of each list that has one, and so on."""
    for turn in itertools.zip_longest(*lists):
        yield from filter(None, turn)


def link(evaluation: str, *, show: str | None = None, problem: str | None = None) -> str:
    """Returns the address, within the page, of what the viewer shall show.

    The address may hold an "&", so it must be escaped in HTML, as templates do.

    Args:
      evaluation: name of the evaluation on the left.
      show: which problems to choose from: "all", "right", "wrong", or a kind of failure.
      problem: id of the problem to open; by default the first of these.
    """
    fields = {"left": evaluation, "show": show, "problem": problem}
    given = {name: value for name, value in fields.items() if value is not None}
    return "#" + urllib.parse.urlencode(given)


def write_tree_page(trace: dict[str, Any], name: str, path: Path) -> None:
    """Writes a page with the viewer of one tree.

    Args:
      trace: the tree.
      name: name of the model that grew it.
      path: the file to write.
    """
    write_text(path, page(f"apr_jax: {trace['problem']}", "", {name: [trace]}))


def _assets(names: Sequence[str]) -> str:
    """Returns the texts of some files in `assets/`, one after the other."""
    folder = resources.files("apr_jax.report") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _tokens(trace: Trace) -> int:
    """Counts the tokens of a tree, those of prompts included."""
    return sum(sum(thread["lengths"]) for thread in trace["threads"])


def _embedded(name: str, traces: Sequence[Trace]) -> dict[str, Any]:
    """Returns an evaluation as `viewer.js` reads it.

    The text of a token stands there once for all trees, as one of the `pieces`.
    """
    pieces = {token: text for trace in traces for token, text in trace["pieces"].items()}
    return {"name": name, "pieces": pieces, "traces": [_embedded_trace(trace) for trace in traces]}


def _embedded_trace(trace: Trace) -> dict[str, Any]:
    """Returns a trace as `tree.js` reads it: with ids and log-probs in place of texts."""
    threads = []
    for thread, (ids, logprobs) in zip(trace["threads"], unpack_streams(trace), strict=True):
        kinds = [kind for kind, _ in thread["spans"]]
        threads.append(
            {
                **{field: thread[field] for field in _THREAD_FIELDS},
                "spans": [list(span) for span in zip(kinds, thread["lengths"], strict=True)],
                "ids": ids.tolist(),
                "logprobs": [_short(value) for value in logprobs],
            }
        )
    kept = {field: value for field, value in trace.items() if field not in ("pieces", "streams")}
    return kept | {"threads": threads}


def _short(logprob: float) -> float:
    """Rounds a log-prob to the stored decimals, and turns 0.0, the most frequent, into 0.

    In JSON, 0 takes one character less than 0.0.
    """
    return round(float(logprob), 3) or 0
