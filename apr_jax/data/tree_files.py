"""Files of thread trees: demonstrations that a person, another model or another program has made.

One JSON object a line holds a problem, the tree of threads that solves it, and the number that the
prompt states, if it states one:

    {"problem": {"id": "a", "letters": "drib"},
     "thread": {"prompt": "drib:",
                "body": ["two tries", {"spawn": [{"prompt": "b", "body": ["r?"], "answer": "bird"},
                                                 {"prompt": "d", "body": ["i?"], "answer": ""}]}],
                "answer": "bird"},
     "condition": 2}

`SCHEMA` is this form as a JSON schema. It cannot say all that `load_trees` checks: the problem must
be one of the task, the root's prompt must be the one that the task writes for it, and the task's
alphabet must hold every character.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NoReturn

from apr_jax.errors import UsageError
from apr_jax.io.json_files import json_line
from apr_jax.io.storage import as_path, write_text
from apr_jax.tasks.base import Method, Problem, Spawn, Task, Thread
from apr_jax.tasks.problem_files import cut

METHOD = "file"  # The name of the method whose demonstrations are those of a file.

# Deeper trees than this are a mistake of the program that wrote the file; no rollout makes them.
DEEPEST = 64

# SentencePiece writes this character for a space, so no tokenizer can give it back.
_SPACE = "\u2581"

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A line of a file of thread trees",
    "type": "object",
    "properties": {
        "problem": {
            "description": "A line of a problems file: the fields of the task's data, and a name.",
            "type": "object",
            "properties": {"id": {"type": "string", "minLength": 1}},
            "required": ["id"],
        },
        "thread": {
            "description": "The root thread; its prompt is the one that the task writes.",
            "$ref": "#/$defs/thread",
        },
        "condition": {
            "description": "The number that the root's prompt states, if it states one.",
            "type": "integer",
        },
    },
    "required": ["problem", "thread"],
    "additionalProperties": False,
    "$defs": {
        "thread": {
            "type": "object",
            "properties": {
                "prompt": {
                    "description": "The text that the thread is given: of a child, its message.",
                    "type": "string",
                },
                "body": {
                    "description": "The texts and spawns that the thread writes, in order.",
                    "type": "array",
                    "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/spawn"}]},
                },
                "answer": {
                    "description": 'The answer that the thread joins; "" if it found none.',
                    "type": "string",
                },
            },
            "required": ["prompt", "body", "answer"],
            "additionalProperties": False,
        },
        "spawn": {
            "type": "object",
            "properties": {
                "spawn": {
                    "description": "The children, which run side by side.",
                    "type": "array",
                    "items": {"$ref": "#/$defs/thread"},
                    "minItems": 1,
                }
            },
            "required": ["spawn"],
            "additionalProperties": False,
        },
    },
}

_EXAMPLE = '{"problem": {"id": "a", ...}, "thread": {"prompt": "", "body": [], "answer": ""}}'


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A line of a file of thread trees.

    Attributes:
      problem: the problem, as the task uses it.
      thread: the root thread, with the condition of the line.
    """

    problem: Problem
    thread: Thread


class _WrongTreeError(Exception):
    """A line holds no thread tree; the message names the place in the tree and the reason."""


def load_trees(path: str | Path, task: Task) -> list[Demonstration]:
    """Reads a file of thread trees; blank lines are skipped.

    Args:
      path: the file, here or in a bucket.
      task: the task of the problems, which checks each of them and writes its prompt.

    Raises:
      UsageError: the file cannot be read, or a line is wrong; the message names file, line, place
        in the tree, and the rule that is broken.
    """
    path = as_path(path)
    alphabet = frozenset(characters(task))
    demonstrations: list[Demonstration] = []
    line_of_id: dict[str, int] = {}
    problem_of_id: dict[str, Problem] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        # Editors on Windows begin a file with a byte order mark; after `cat` it may stand anywhere.
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            demonstration = _read_line(line, task, alphabet)
            problem = demonstration.problem
            first = problem_of_id.setdefault(problem.id, problem)
            if first.data != problem.data:
                raise _WrongTreeError(
                    f"problem.id: {problem.id!r} is another problem in line"
                    f" {line_of_id[problem.id]}; give each problem an id of its own"
                )
        except _WrongTreeError as error:
            raise UsageError(f"thread trees {path}, line {number}: {error}") from None
        line_of_id.setdefault(problem.id, number)
        demonstrations.append(demonstration)

    if not demonstrations:
        raise UsageError(
            f"thread trees {path}: holds no thread tree; expected lines like {_EXAMPLE}"
        )
    return demonstrations


def save_trees(demonstrations: Iterable[Demonstration], path: str | Path) -> None:
    """Writes a file of thread trees that `load_trees` reads back."""
    lines = [json_line(to_json(demonstration)) for demonstration in demonstrations]
    write_text(as_path(path), "".join(lines))


def checksum(path: str | Path) -> str:
    """Returns the SHA-256 of a file of thread trees.

    Raises:
      UsageError: the file cannot be read.
    """
    return hashlib.sha256(_read_bytes(as_path(path))).hexdigest()


def method_of(demonstrations: Iterable[Demonstration]) -> Method:
    """Returns the method of which the demonstrations are: how deep any of their threads spawns."""
    depth = max(_depth(demonstration.thread) for demonstration in demonstrations)
    return Method(parallel=depth > 0, depth=depth)


def characters(task: Task) -> str:
    """Returns the characters that the texts of a task's thread trees may hold."""
    return "".join(sorted(set(task.alphabet).union(*task.phrases)))


def _depth(thread: Thread) -> int:
    """Returns the number of levels of threads below a thread."""
    spawns = (part for part in thread.body if isinstance(part, Spawn))
    children = (child for spawn in spawns for child in spawn.children)
    return max((1 + _depth(child) for child in children), default=0)


def to_json(demonstration: Demonstration) -> dict[str, Any]:
    """Returns the JSON object of a demonstration's line."""
    thread = demonstration.thread
    line: dict[str, Any] = {
        "problem": demonstration.problem.to_json(),
        "thread": _thread_to_json(thread),
    }
    if thread.condition is not None:
        line["condition"] = thread.condition
    return line


def _thread_to_json(thread: Thread) -> dict[str, Any]:
    body: list[str | dict[str, Any]] = []
    for part in thread.body:
        if isinstance(part, Spawn):
            body.append({"spawn": [_thread_to_json(child) for child in part.children]})
        else:
            body.append(part)
    return {"prompt": thread.prompt, "body": body, "answer": thread.answer}


def _read_lines(path: Path) -> list[str]:
    """Reads the lines of a file, which must be UTF-8 text."""
    try:
        return _read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"thread trees {path}: is not UTF-8 text (byte {error.start})") from None


def _read_bytes(path: Path) -> bytes:
    """Reads a file; raises UsageError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"thread trees {path}: {error.strerror}; data.demonstrations must be a number, or a"
            f" file of lines like {_EXAMPLE}"
        ) from None


def _read_line(line: str, task: Task, alphabet: Collection[str]) -> Demonstration:
    """Reads one line.

    Args:
      line: the text of the line.
      task: the task of the problem.
      alphabet: the characters that texts may hold.

    Raises:
      _WrongTreeError: the line is wrong.
    """
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except ValueError as error:
        raise _WrongTreeError(f"is not JSON ({error}): {cut(line)}") from None
    except RecursionError:
        raise _WrongTreeError(f"is nested too deeply: {cut(line)}") from None
    if not isinstance(record, dict):
        raise _WrongTreeError(f"must be a JSON object like {_EXAMPLE}, is {_show(record)}")
    _check_fields(record, "", required=("problem", "thread"), optional=("condition",))

    problem = _read_problem(record["problem"], task)
    condition = record.get("condition")
    if "condition" in record and type(condition) is not int:
        raise _WrongTreeError(f"condition: must be an integer, is {_show(condition)}")
    thread = _read_thread(record["thread"], "thread", 0, alphabet)
    thread = dataclasses.replace(thread, condition=condition)
    _check_prompt(problem, thread, task)
    return Demonstration(problem, thread)


def _refuse_constant(name: str) -> NoReturn:
    """Refuses NaN and the infinities, which Python's reader takes though JSON has none."""
    raise ValueError(f"{name} is no JSON value")


def _check_fields(
    record: dict[str, Any], place: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    """Refuses an object that lacks a field or has an unknown one.

    Args:
      record: the object.
      place: its place in the line; empty for the line itself.
      required: fields that it must have.
      optional: fields that it may have.
    """
    start = f"{place}: " if place else ""
    for name in required:
        if name not in record:
            raise _WrongTreeError(f'{start}has no field "{name}"')
    for name in record:
        if name not in (*required, *optional):
            known = ", ".join((*required, *optional))
            raise _WrongTreeError(f"{start}has an unknown field {_show(name)}; known are {known}")


def _read_problem(record: Any, task: Task) -> Problem:
    """Reads a problem, as a line of a problems file holds it, and lets the task check it."""
    if not isinstance(record, dict):
        raise _WrongTreeError(f"problem: must be an object, is {_show(record)}")
    if "id" not in record:
        raise _WrongTreeError('problem: has no field "id"')
    data = dict(record)
    problem_id = data.pop("id")
    if not isinstance(problem_id, str) or not problem_id:
        raise _WrongTreeError(f"problem.id: must be a non-empty string, is {_show(problem_id)}")
    try:
        return task.check(Problem(problem_id, data))
    except ValueError as error:
        raise _WrongTreeError(f"problem: {error}") from None


def _read_thread(record: Any, place: str, depth: int, alphabet: Collection[str]) -> Thread:
    """Reads a thread and all threads below it.

    Args:
      record: the thread's JSON value.
      place: its place in the line, for messages, such as `thread.body[1].spawn[0]`.
      depth: the number of threads above it.
      alphabet: the characters that texts may hold.
    """
    if not isinstance(record, dict):
        raise _WrongTreeError(f"{place}: must be an object, is {_show(record)}")
    if depth > DEEPEST:
        raise _WrongTreeError(f"{place:.60}...: threads are nested more than {DEEPEST} deep")
    _check_fields(record, place, required=("prompt", "body", "answer"))
    if not isinstance(record["body"], list):
        raise _WrongTreeError(f"{place}.body: must be a list, is {_show(record['body'])}")

    prompt = _read_text(record["prompt"], f"{place}.prompt", alphabet)
    body: list[str | Spawn] = []
    for index, part in enumerate(record["body"]):
        part_place = f"{place}.body[{index}]"
        if isinstance(part, str):
            body.append(_read_text(part, part_place, alphabet))
        else:
            body.append(_read_spawn(part, part_place, depth, alphabet))
    answer = _read_text(record["answer"], f"{place}.answer", alphabet)
    return Thread(prompt, tuple(body), answer)


def _read_spawn(record: Any, place: str, depth: int, alphabet: Collection[str]) -> Spawn:
    """Reads a spawn of a thread at `depth`."""
    if not isinstance(record, dict):
        raise _WrongTreeError(
            f'{place}: must be a string or {{"spawn": [thread, ...]}}, is {_show(record)}'
        )
    _check_fields(record, place, required=("spawn",))
    children = record["spawn"]
    if not isinstance(children, list):
        raise _WrongTreeError(f"{place}.spawn: must be a list, is {_show(children)}")
    if not children:
        raise _WrongTreeError(f"{place}.spawn: is empty; a spawn starts at least one thread")
    return Spawn(
        tuple(
            _read_thread(child, f"{place}.spawn[{index}]", depth + 1, alphabet)
            for index, child in enumerate(children)
        )
    )


def _read_text(value: Any, place: str, alphabet: Collection[str]) -> str:
    """Reads a text, whose characters must be in the alphabet."""
    if not isinstance(value, str):
        raise _WrongTreeError(f"{place}: must be a string, is {_show(value)}")
    for character in value:
        if character == _SPACE:
            raise _WrongTreeError(
                f"{place}: holds the character {character!r}, which stands for a space inside the"
                " tokenizer"
            )
        if character not in alphabet:
            raise _WrongTreeError(
                f"{place}: holds the character {character!a}, which is not in the task's"
                " `alphabet`; add it there or leave it out"
            )
    return value


def _check_prompt(problem: Problem, thread: Thread, task: Task) -> None:
    """Refuses a root whose prompt is not the one that the task writes."""
    try:
        prompt = task.prompt(problem, thread.condition)
    # The task may be a user's, and its default check takes every problem.
    except Exception as error:
        raise _WrongTreeError(
            f"problem: the task {task.kind!r} cannot write its prompt"
            f" ({type(error).__name__}: {error}); expected {task.example}"
        ) from None
    if thread.prompt != prompt:
        stated = "" if thread.condition is None else f" with condition {thread.condition}"
        raise _WrongTreeError(
            f"thread.prompt: is {_show(thread.prompt)}, but the task writes {_show(prompt)} for"
            f" this problem{stated}"
        )


def _show(value: Any) -> str:
    """Returns a JSON value, or its beginning, for a message."""
    return cut(json.dumps(value))
