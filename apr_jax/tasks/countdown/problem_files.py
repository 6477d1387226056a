"""Problems that users write: on the command line (`22 26 2 -> 46`) and in JSON-lines files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apr_jax.errors import UsageError
from apr_jax.io.storage import as_path
from apr_jax.tasks.base import Problem
from apr_jax.tasks.countdown.config import MAX_NUMBERS, MAX_VALUE
from apr_jax.tasks.countdown.problems import solve

_EXAMPLE = '"22 26 2 -> 46"'
_LINE_EXAMPLE = '{"id": "x-0", "numbers": [22, 26, 2], "target": 46}'


def parse_problem(text: str) -> Problem:
    """Reads `22 26 2 -> 46` (commas are as good as spaces); the id is the text.

    Raises:
      UsageError: says what is wrong with which part, and how to write it.
    """
    shown = text if len(text) <= 80 else text[:77] + "..."
    left, arrow, right = text.partition("->")
    if not arrow:
        raise UsageError(
            f"problem {shown!r}: has no '->' between numbers and target; write it like {_EXAMPLE}"
        )
    words = left.replace(",", " ").split()
    numbers = tuple(_parse_integer(word, shown, "number") for word in words)
    targets = right.split()
    if len(targets) != 1:
        raise UsageError(
            f"problem {shown!r}: has {len(targets)} targets after '->', must be one; write it like"
            f" {_EXAMPLE}"
        )
    problem = Problem(shown, numbers, _parse_integer(targets[0], shown, "target"))
    if wrong := _wrong_size(problem.numbers):
        raise UsageError(f"problem {shown!r}: {wrong}; write it like {_EXAMPLE}")
    return problem


def require_solvable(problem: Problem) -> None:
    """Raises UsageError if no combination of all the numbers hits the target."""
    if solve(problem.numbers, problem.target) is None:
        numbers = " ".join(map(str, problem.numbers))
        raise UsageError(
            f"problem {numbers} -> {problem.target}: has no solution that uses every number once "
            "(exact divisions, no negative numbers); choose another target"
        )


def load_problems(path: str | Path) -> list[Problem]:
    """Reads a problems file, a line a problem; blank lines and unknown fields are passed over.

    Raises:
      UsageError: names the file, the line, the field, the value seen and the rule.
    """
    path = as_path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"problems file {path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UsageError(
            f"problems file {path}: {error.strerror}; expected lines like {_LINE_EXAMPLE}"
        ) from None
    problems: list[Problem] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        # Editors on Windows begin a file with a byte order mark; after `cat` it may stand anywhere.
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        where = f"problems file {path}, line {number}"
        problem = _read_line(line, where)
        if problem.id in first_line:
            raise UsageError(
                f'{where}: "id" {problem.id!r} is taken by line {first_line[problem.id]}; ids must'
                " be unique"
            )
        first_line[problem.id] = number
        problems.append(problem)
    if not problems:
        raise UsageError(
            f"problems file {path}: holds no problem; expected lines like {_LINE_EXAMPLE}"
        )
    return problems


def save_problems(problems: Iterable[Problem], path: str | Path) -> None:
    """Writes a problems file that `load_problems` reads back."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(
            json.dumps(
                {"id": problem.id, "numbers": list(problem.numbers), "target": problem.target}
            )
            + "\n"
            for problem in problems
        )


def _parse_integer(word: str, shown: str, role: str) -> int:
    # isdigit alone would let other scripts' digits through.
    if word.isascii() and word.isdigit() and len(word) <= 9 and 1 <= int(word) <= MAX_VALUE:
        return int(word)
    raise UsageError(
        f"problem {shown!r}: {role} {word[:20]!r} must be a whole number in 1..{MAX_VALUE}; write"
        f" it like {_EXAMPLE}"
    )


def _wrong_size(numbers: tuple[int, ...]) -> str:
    if 2 <= len(numbers) <= MAX_NUMBERS:
        return ""
    return f"has {len(numbers)} numbers, must be 2 to {MAX_NUMBERS}"


def _read_line(line: str, where: str) -> Problem:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: is not JSON: {_cut(line)}; expected {_LINE_EXAMPLE}") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: is not a JSON object: {_cut(line)}; expected {_LINE_EXAMPLE}")
    for field in ("id", "numbers", "target"):
        if field not in record:
            raise UsageError(f'{where}: has no field "{field}"; expected {_LINE_EXAMPLE}')
    name, numbers, target = record["id"], record["numbers"], record["target"]
    if not isinstance(name, str) or not name:
        raise UsageError(f'{where}: "id" {_cut(json.dumps(name))} must be a non-empty string')
    if not isinstance(numbers, list):
        raise UsageError(
            f'{where}: "numbers" {_cut(json.dumps(numbers))} must be a list like [22, 26, 2]'
        )
    for value in numbers:
        if not _in_range(value):
            raise UsageError(
                f'{where}: "numbers" holds {_cut(json.dumps(value))}; each must be a whole number'
                f" in 1..{MAX_VALUE}"
            )
    if wrong := _wrong_size(tuple(numbers)):
        raise UsageError(f'{where}: "numbers" {wrong}')
    if not _in_range(target):
        raise UsageError(
            f'{where}: "target" {_cut(json.dumps(target))} must be a whole number in 1..{MAX_VALUE}'
        )
    return Problem(name, tuple(numbers), target)


def _in_range(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_VALUE


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
