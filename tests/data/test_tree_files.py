"""Files of thread trees: what is written is read back, and no wrong line passes."""

import copy
import json

import jsonschema
import pytest
from helpers.anagrams import TASK, some_demonstrations
from helpers.small_data import small

from apr_jax.data.tree_files import (
    DEEPEST,
    SCHEMA,
    Demonstration,
    checksum,
    load_trees,
    method_of,
    save_trees,
    to_json,
)
from apr_jax.errors import UsageError
from apr_jax.tasks import Method, Problem, Spawn, Thread, make_task

LINE = {
    "problem": {"id": "a", "letters": "dac"},
    "thread": {
        "prompt": "dac:",
        "body": [
            "two,",
            {
                "spawn": [
                    {"prompt": "a-dc", "body": ["acd!"], "answer": "acd"},
                    {"prompt": "c-da", "body": [], "answer": ""},
                ]
            },
        ],
        "answer": "cad",
    },
    "condition": 2,
}


@pytest.fixture(scope="module")
def task():
    return make_task(TASK)


def changed(path, value):
    """The line with a value at a path in it; `...` takes the field away."""
    line = copy.deepcopy(LINE)
    inner = line
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return line


def refusal(path, task):
    with pytest.raises(UsageError) as caught:
        load_trees(path, task)
    message = str(caught.value)
    assert message.startswith(f"thread trees {path}") and "\n" not in message
    return message.removeprefix(f"thread trees {path}")


def test_demonstrations_are_written_and_read_back(task, tmp_path):
    made = some_demonstrations(task, 40)
    save_trees(made, tmp_path / "trees.jsonl")
    assert load_trees(tmp_path / "trees.jsonl", task) == made
    assert method_of(made) == Method(parallel=True, depth=1)
    assert method_of(made[::2]) == Method(parallel=False, depth=0)


def test_countdown_trees_with_conditions_come_back(tmp_path):
    config = small()
    countdown = make_task(
        config.task.replace(solver={"condition": 0.5}),
        config.limits,
    )
    made = []
    for seed in range(30):
        problem = countdown.draw(seed)
        made.append(Demonstration(problem, countdown.demonstrate(problem, "apr", seed)))
    save_trees(made, tmp_path / "trees.jsonl")
    read = load_trees(tmp_path / "trees.jsonl", countdown)
    assert read == made
    conditions = [demonstration.thread.condition for demonstration in made]
    assert [demonstration.thread.condition for demonstration in read] == conditions
    assert None in conditions and len(set(conditions)) > 2
    for demonstration in made:
        jsonschema.validate(to_json(demonstration), SCHEMA)


def test_a_line_by_hand_is_the_tree_that_it_says(task, tmp_path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(LINE, SCHEMA)
    children = (Thread("a-dc", ("acd!",), "acd"), Thread("c-da", (), ""))
    expected = Demonstration(
        Problem("a", {"letters": "dac"}), Thread("dac:", ("two,", Spawn(children)), "cad")
    )
    path = tmp_path / "trees.jsonl"
    # A byte order mark, line ends of Windows, and blank lines.
    path.write_bytes(b"\xef\xbb\xbf\r\n" + json.dumps(LINE).encode() + b"\r\n \r\n\n")
    (read,) = load_trees(path, task)
    assert read == expected and read.thread.condition == 2
    assert to_json(read) == LINE


SPAWN = ("thread", "body", 1)
CHILD = (*SPAWN, "spawn", 1)


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("problem",), ..., 'has no field "problem"'),
        (("problem",), "dac", 'problem: must be an object, is "dac"'),
        (("problem", "id"), ..., 'problem: has no field "id"'),
        (("problem", "id"), 3, "problem.id: must be a non-empty string, is 3"),
        (("problem", "id"), "", "problem.id: must be a non-empty string"),
        (("thread",), ..., 'has no field "thread"'),
        (("thread",), ["dac:"], "thread: must be an object"),
        (("anwser",), "x", 'has an unknown field "anwser"'),
        (("condition",), "2", 'condition: must be an integer, is "2"'),
        (("condition",), True, "condition: must be an integer, is true"),
        (("condition",), None, "condition: must be an integer, is null"),
        (("thread", "prompt"), 7, "thread.prompt: must be a string, is 7"),
        (("thread", "body"), "text", 'thread.body: must be a list, is "text"'),
        (("thread", "answer"), ..., 'thread: has no field "answer"'),
        (("thread", "anwser"), "", 'thread: has an unknown field "anwser"'),
        (("thread", "body", 0), 5, "thread.body[0]: must be a string or"),
        (("thread", "body", 0), None, "thread.body[0]: must be a string or"),
        (SPAWN, {"spawns": []}, 'thread.body[1]: has no field "spawn"'),
        ((*SPAWN, "spawn"), [], "thread.body[1].spawn: is empty"),
        ((*SPAWN, "spawn"), {}, "thread.body[1].spawn: must be a list"),
        ((*SPAWN, "also"), 1, 'thread.body[1]: has an unknown field "also"'),
        (CHILD, "c-da", "thread.body[1].spawn[1]: must be an object"),
        ((*CHILD, "body"), ..., 'thread.body[1].spawn[1]: has no field "body"'),
        ((*CHILD, "answer"), 1, "thread.body[1].spawn[1].answer: must be a string, is 1"),
    ],
)
def test_a_wrong_form_is_refused_by_its_place(task, tmp_path, path, value, place):
    line = changed(path, value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(line, SCHEMA)
    file = tmp_path / "trees.jsonl"
    file.write_text(f"\n{json.dumps(LINE)}\n{json.dumps(line)}\n")
    message = refusal(file, task)
    assert message.startswith(f", line 3: {place}")


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        # The task of the example has no check of its own, so the prompt cannot be written.
        (("problem",), {"id": "a", "digits": [3, 4]}, "problem: the task "),
        (("problem", "letters"), "add", 'thread.prompt: is "dac:", but the task writes "add:"'),
        (("thread", "prompt"), "dac", 'thread.prompt: is "dac", but the task writes "dac:"'),
        (
            ("thread", "answer"),
            "\N{LATIN SMALL LETTER E WITH ACUTE}",
            r"thread.answer: holds the character '\xe9'",
        ),
        ((*CHILD, "prompt"), "\ud800", r"thread.body[1].spawn[1].prompt: holds the character"),
        (("thread", "body", 0), "a b", "thread.body[0]: holds the character ' '"),
    ],
)
def test_what_the_task_cannot_use_is_refused(task, tmp_path, path, value, place):
    line = changed(path, value)
    jsonschema.validate(line, SCHEMA)  # The schema knows no task.
    file = tmp_path / "trees.jsonl"
    file.write_text(json.dumps(line))
    assert refusal(file, task).startswith(f", line 1: {place}")


def test_a_problem_that_the_task_refuses_is_refused(tmp_path):
    digits = make_task(TASK.__class__("hidden_digit"))
    line = {
        "problem": {"id": "a", "digits": [3, 14]},
        "thread": {"prompt": "3+14", "body": [], "answer": "7"},
    }
    file = tmp_path / "trees.jsonl"
    file.write_text(json.dumps(line))
    assert refusal(file, digits).startswith(', line 1: problem: "digits" [3, 14] must be')


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"{", ", line 1: is not JSON"),
        (b'\n{"problem": NaN}', ", line 2: is not JSON (NaN is no JSON value)"),
        (b"[1, 2]", ", line 1: must be a JSON object"),
        (b"[" * 100_000, ", line 1: is nested too deeply"),
        (b"", ": holds no thread tree"),
        (b"\n \n\xef\xbb\xbf\n", ": holds no thread tree"),
        (b'{"a": "\xff"}', ": is not UTF-8 text (byte 7)"),
    ],
)
def test_a_file_without_trees_is_refused(task, tmp_path, contents, message):
    file = tmp_path / "trees.jsonl"
    file.write_bytes(contents)
    assert refusal(file, task).startswith(message)


def test_a_missing_file_and_a_folder_are_refused(task, tmp_path):
    assert "No such file" in refusal(tmp_path / "none.jsonl", task)
    assert "Is a directory" in refusal(tmp_path, task)
    with pytest.raises(UsageError, match="No such file"):
        checksum(tmp_path / "none.jsonl")


def test_threads_may_nest_only_so_deep(task, tmp_path):
    def nested(levels):
        thread = {"prompt": "dac:", "body": [], "answer": ""}
        for _ in range(levels):
            thread = {"prompt": "dac:", "body": [{"spawn": [thread]}], "answer": ""}
        return json.dumps({"problem": LINE["problem"], "thread": thread})

    file = tmp_path / "trees.jsonl"
    file.write_text(nested(DEEPEST))
    assert method_of(load_trees(file, task)).depth == DEEPEST
    file.write_text(nested(DEEPEST + 1))
    assert f"nested more than {DEEPEST} deep" in refusal(file, task)


def test_an_id_may_repeat_for_the_same_problem_only(task, tmp_path):
    file = tmp_path / "trees.jsonl"
    save_trees([load_one(task, tmp_path)] * 2, file)
    assert len(load_trees(file, task)) == 2
    other = changed(("problem", "letters"), "cda")
    other["thread"]["prompt"] = "cda:"
    file.write_text(f"{json.dumps(LINE)}\n{json.dumps(other)}\n")
    assert refusal(file, task).startswith(", line 2: problem.id: 'a' is another problem in line 1")


def load_one(task, folder):
    path = folder / "one.jsonl"
    path.write_text(json.dumps(LINE))
    (demonstration,) = load_trees(path, task)
    return demonstration
