"""The folder of an evaluation: `settings.json`, `traces.jsonl` and `summary.json`.

`settings.json` says what was asked, and is written first. `traces.jsonl` grows by one line for each
tree, in the order of the problems and their samples. `summary.json` is computed from the lines when
all are there. An evaluation that was interrupted goes on after the lines that it wrote.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apr_jax.errors import UsageError, UserError
from apr_jax.evaluate.cells import print_warnings
from apr_jax.evaluate.scores import Trace, known
from apr_jax.io.json_files import write_json
from apr_jax.tasks import Problem

TRACES = "traces.jsonl"
SUMMARY = "summary.json"
SETTINGS = "settings.json"

Sample = tuple[Problem, int]  # A problem, and the number of one of its samples.


def read_answers(folder: Path) -> tuple[dict[str, Any], list[Trace]]:
    """Reads the summary of a finished evaluation and its traces.

    Traces without a verdict are left out, because no score may count them.

    Raises:
      UserError: a file is missing or damaged, or the traces are not those that the summary was
        computed from.
    """
    remedy = f"delete {folder} and evaluate again"
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder / SUMMARY}: no such file; run `apr eval` first") from None
    except ValueError:
        raise UserError(f"{folder / SUMMARY}: is damaged; {remedy}") from None

    traces = read_traces(folder / TRACES)
    answered = {(trace.get("id"), trace.get("sample")) for trace in traces}
    expected = summary["n"] * summary["samples"]
    if not len(traces) == len(answered) == expected:
        raise UserError(
            f"{folder / TRACES}: has {len(traces)} lines with answers to {len(answered)} samples of"
            f" problems, but {SUMMARY} is of {expected}; {remedy}"
        )
    return summary, known(traces)


def read_traces(path: Path) -> list[Trace]:
    """Reads all lines of a traces file.

    Raises:
      UserError: the file is missing, or a line is damaged; the message names the line.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `apr eval` first") from None
    return parse_lines(path, text, "delete the folder and evaluate again")


def parse_lines(path: Path, text: str, remedy: str) -> list[Any]:
    """Parses a text of JSON lines.

    Args:
      path: the file that holds the text, for messages.
      text: lines of JSON, one value each.
      remedy: what a user is told to do about a damaged line.

    Raises:
      UserError: a line is not JSON; the message names it.
    """
    values = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}, line {number}: is not JSON; {remedy}") from None
    return values


def reserve_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder and writes the settings into it, unless they are there already.

    Raises:
      UsageError: the folder holds an evaluation with other settings.
      UserError: its settings file is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if not path.is_file():
        write_json(path, settings)
        return

    try:
        old = json.loads(path.read_text())
    except json.JSONDecodeError:
        raise UserError(f"{path}: is damaged; delete {folder} and evaluate again") from None
    for name, value in settings.items():
        if old.get(name) != value:
            raise UsageError(
                f"{folder}: holds an evaluation with {name}={old.get(name)!r}, not {value!r};"
                " choose another --out"
            )


def keep_answers(traces: Path, samples: Sequence[Sample]) -> int:
    """Cuts a traces file off at the first line that is not the answer expected there.

    All answers from there on are given anew. A tree is the same whenever it is decoded, so the file
    ends with the bytes of an evaluation that was never interrupted. Unless the first wrong line is
    merely incomplete, because the process was killed while it wrote, a warning names it.

    Args:
      traces: the file; it may be missing.
      samples: what the lines must answer, in their order.

    Returns:
      the number of lines that are kept.
    """
    if not traces.is_file():
        return 0

    kept = 0
    size = 0  # Bytes of the kept lines.
    is_incomplete = False
    with traces.open("rb") as file:
        for line in file:
            is_incomplete = not line.endswith(b"\n")
            if is_incomplete or kept == len(samples) or not _is_answer(line, *samples[kept]):
                break
            kept += 1
            size += len(line)

    if size < traces.stat().st_size:
        if not is_incomplete:
            expected = "no answer any more"
            if kept < len(samples):
                problem, sample = samples[kept]
                expected = f"sample {sample} of problem {problem.id!r}"
            warning = (
                f"{traces}, line {kept + 1}: must be {expected}, and is not; answering anew from"
                " there"
            )
            print_warnings([warning])
        os.truncate(traces, size)
    return kept


def _is_answer(line: bytes, problem: Problem, sample: int) -> bool:
    """Whether a line of a traces file is the tree of this sample of the problem."""
    try:
        trace = json.loads(line)
        answered = (trace["id"], trace["sample"], trace["data"])
    except (ValueError, KeyError, TypeError):
        return False
    return bool(answered == (problem.id, sample, dict(problem.data)))
