"""Files of problems, one JSON object a line: the `id` of a problem and the fields of its data."""

import json
from collections.abc import Iterable
from pathlib import Path

from apr_jax.errors import UsageError
from apr_jax.io.json_files import json_line
from apr_jax.io.storage import as_path, write_text
from apr_jax.tasks.base import Problem, Task


def load_problems(path: str | Path, task: Task) -> list[Problem]:
    """Reads a problems file; blank lines are skipped.

    Args:
      path: the file, here or in a bucket.
      task: the task of the problems, which checks each of them.

    Raises:
      UsageError: the file cannot be read, or a line is wrong; the message names file, line and
        field, the value, and the rule that it breaks.
    """
    path = as_path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"problems file {path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UsageError(
            f"problems file {path}: {error.strerror}; expected lines like {task.example}"
        ) from None

    problems: list[Problem] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        # Editors on Windows begin a file with a byte order mark; after `cat` it may stand anywhere.
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        where = f"problems file {path}, line {number}"
        problem = _read_line(line, where, task)
        if problem.id in line_of_id:
            raise UsageError(
                f'{where}: "id" {problem.id!r} is taken by line {line_of_id[problem.id]}; ids must'
                " be unique"
            )
        line_of_id[problem.id] = number
        problems.append(problem)

    if not problems:
        raise UsageError(
            f"problems file {path}: holds no problem; expected lines like {task.example}"
        )
    return problems


def save_problems(problems: Iterable[Problem], path: str | Path) -> None:
    """Writes a problems file that `load_problems` reads back."""
    write_text(as_path(path), problem_lines(problems))


def problem_lines(problems: Iterable[Problem]) -> str:
    """Returns the contents of a problems file."""
    return "".join(json_line(problem.to_json()) for problem in problems)


def _read_line(line: str, where: str, task: Task) -> Problem:
    """Reads one line of a problems file.

    Args:
      line: the text of the line.
      where: file and number of the line, for messages.
      task: the task, which checks the problem.

    Raises:
      UsageError: the line is wrong.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: is not JSON: {cut(line)}; expected {task.example}") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: is not a JSON object: {cut(line)}; expected {task.example}")
    if "id" not in record:
        raise UsageError(f'{where}: has no field "id"; expected {task.example}')
    problem_id = record.pop("id")
    if not isinstance(problem_id, str) or not problem_id:
        raise UsageError(f'{where}: "id" {cut(json.dumps(problem_id))} must be a non-empty string')
    try:
        return task.check(Problem(problem_id, record))
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def cut(text: str) -> str:
    """Returns the text, or its beginning if it has more than 60 characters."""
    return text if len(text) <= 60 else text[:57] + "..."
