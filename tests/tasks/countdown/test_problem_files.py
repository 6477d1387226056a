"""What users type and save: every mistake gets one line that names it."""

import dataclasses
import json

import pytest
from helpers.puzzles import countdown, read_problems

from apr_jax.errors import UsageError
from apr_jax.tasks import flatten, save_problems
from apr_jax.tasks.countdown.config import MAX_NUMBERS, MAX_VALUE, CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.problems import draw, solve
from apr_jax.tasks.countdown.puzzle import Puzzle, make_problem, problem_key
from apr_jax.tasks.countdown.solvers import METHODS
from apr_jax.tasks.countdown.task import Countdown


@pytest.mark.parametrize("text", ["22 26 2 -> 46", "22,26,2->46", "  22, 26  2 ->46 "])
def test_parse(text):
    problem = Countdown().parse(text)
    assert (Puzzle.of(problem).numbers, Puzzle.of(problem).target) == ((22, 26, 2), 46)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("22 26 2 46", "has no '->'"),
        ("", "has no '->'"),
        ("22 26 2 ->", "0 targets"),
        ("22 26 2 -> 4 6", "2 targets"),
        ("22 x 2 -> 46", "number 'x' must be a whole number in 1..999999"),
        ("22 -3 2 -> 46", "number '-3'"),
        ("22 2.5 2 -> 46", "number '2.5'"),
        ("22 0 2 -> 46", "number '0'"),
        ("22 ٣ 2 -> 46", "number '٣'"),
        ("22 26 2 -> " + "9" * 5000, "target '9999"),
        ("22 -> 22", "has 1 numbers, must be 2 to 6"),
        ("1 2 3 4 5 6 7 -> 9", "has 7 numbers"),
    ],
)
def test_parse_mistakes(text, message):
    with pytest.raises(UsageError) as error:
        Countdown().parse(text)
    assert message in str(error.value) and '"22 26 2 -> 46"' in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_unsolvable():
    Countdown().parse("22 26 2 -> 46")
    with pytest.raises(UsageError, match="2 2 2 -> 97: has no solution"):
        Countdown().parse("2 2 2 -> 97")


def test_files_come_back(tmp_path):
    problems = [make_problem("a", (22, 26, 2), 46), make_problem("ß", (5, 5), 10)]
    path = tmp_path / "p.jsonl"
    save_problems(problems, path)
    assert read_problems(path) == problems
    assert json.loads(path.read_text().splitlines()[0]) == {
        "id": "a",
        "numbers": [22, 26, 2],
        "target": 46,
    }
    path.write_bytes(b'{"id": "a", "numbers": [1, 2], "target": 3, "note": "extra"}\r\n\r\n')
    assert read_problems(path) == [make_problem("a", (1, 2), 3)]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    """Editors on Windows write it; the line that it begins looks exactly like the one that is
    expected.
    """
    lines = [
        b'{"id": "a", "numbers": [1, 2], "target": 3}\r\n',
        b'{"id": "b", "numbers": [1, 3], "target": 4}\n',
    ]
    mark = b"\xef\xbb\xbf"
    path = tmp_path / "p.jsonl"

    for contents in (
        mark + lines[0] + lines[1],
        mark + lines[0] + mark + lines[1],
        mark + b"\n" + lines[0] + lines[1],
    ):
        path.write_bytes(contents)
        assert read_problems(path) == [make_problem("a", (1, 2), 3), make_problem("b", (1, 3), 4)]

    path.write_bytes(mark)
    with pytest.raises(UsageError, match="holds no problem"):
        read_problems(path)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("numbers", MAX_NUMBERS + 1, "must be from 2 to 6"),
        ("numbers", 1, "must be from 2 to 6"),
        ("high", MAX_VALUE + 1, "must be at most 999999"),
        ("target_high", MAX_VALUE + 1, "must be at most 999999"),
    ],
)
def test_task_refuses_problems_that_files_may_not_hold(field, value, rule):
    with pytest.raises(ValueError, match=f"task.{field}={value} {rule}"):
        CountdownConfig(**{field: value})


@pytest.mark.parametrize(
    "task",
    [
        CountdownConfig(numbers=2, low=MAX_VALUE - 1, high=MAX_VALUE, target_low=1, target_high=1),
        CountdownConfig(
            numbers=3, low=333_333, high=333_333, target_low=MAX_VALUE, target_high=MAX_VALUE
        ),
        CountdownConfig(
            numbers=MAX_NUMBERS, low=MAX_VALUE, high=MAX_VALUE, target_low=1, target_high=2
        ),
    ],
)
@pytest.mark.parametrize("render", ["compact", "sos"])
def test_every_later_stage_takes_what_a_task_allows(task, render, tmp_path):
    """At the ends of what a config allows: problems are written and read, demonstrated, written in
    known characters, judged.
    """
    config = task
    task = countdown(task, SolverConfig(render=render, condition=1.0))
    problems = [draw(config, seed) for seed in range(2)]
    save_problems(problems, tmp_path / "validation.jsonl")
    assert read_problems(tmp_path / "validation.jsonl") == problems
    for problem in problems:
        puzzle = Puzzle.of(problem)
        assert Puzzle.of(task.parse(task.show(problem))) == puzzle
        answer = ",".join(solve(puzzle.numbers, puzzle.target) or ())
        assert task.score(problem, answer).correct
        for method in METHODS:
            for place, thread in enumerate(flatten(task.demonstrate(problem, method, 0))):
                texts = [
                    thread.prompt,
                    thread.answer,
                    *(part for part in thread.body if isinstance(part, str)),
                ]
                assert set("".join(texts)) <= set(task.alphabet)
                reading = task.diagnose(
                    problem, thread if place else dataclasses.replace(thread, prompt="")
                )
                assert reading is None or not reading.faults


GOOD = '{"id": "a", "numbers": [22, 26, 2], "target": 46}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("22 26 2 -> 46", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"id": "b", "numbers": [1' + "0" * 5000 + ', 2], "target": 3}', "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ('{"numbers": [1, 2], "target": 3}', 'has no field "id"'),
        ('{"id": "b", "target": 3}', 'has no field "numbers"'),
        ('{"id": "b", "numbers": [1, 2]}', 'has no field "target"'),
        ('{"id": 7, "numbers": [1, 2], "target": 3}', '"id" 7 must be a non-empty string'),
        ('{"id": "", "numbers": [1, 2], "target": 3}', '"id" ""'),
        ('{"id": "b", "numbers": "1, 2", "target": 3}', '"numbers" "1, 2" must be a list'),
        ('{"id": "b", "numbers": [1, true], "target": 3}', '"numbers" holds true'),
        ('{"id": "b", "numbers": [1, 2.0], "target": 3}', '"numbers" holds 2.0'),
        ('{"id": "b", "numbers": [1, 0], "target": 3}', '"numbers" holds 0'),
        ('{"id": "b", "numbers": [1], "target": 3}', '"numbers" has 1 numbers, must be 2 to 6'),
        (
            '{"id": "b", "numbers": [1, 2], "target": "3"}',
            '"target" "3" must be a whole number in 1..999999',
        ),
        ('{"id": "b", "numbers": [1, 2], "target": NaN}', '"target" NaN'),
        (GOOD, "\"id\" 'a' is taken by line 1"),
    ],
)
def test_mistakes_name_file_line_field_value_and_rule(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(UsageError) as error:
        read_problems(path)
    assert message in str(error.value) and f"{path}, line 3" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_problems(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="directory"):
        read_problems(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="holds no problem"):
        read_problems(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_problems(tmp_path / "binary.jsonl")


def test_key_forgets_the_order():
    assert (
        problem_key(make_problem("a", (22, 26, 2), 46))
        == problem_key(make_problem("b", (2, 22, 26), 46))
        == ((2, 22, 26), 46)
    )
    assert problem_key(make_problem("a", (22, 26, 2), 46)) != problem_key(
        make_problem("a", (22, 26, 2), 47)
    )
