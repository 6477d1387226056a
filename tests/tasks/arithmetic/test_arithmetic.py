"""Arithmetic: expressions, demonstrations and scores, held against Python's own evaluation."""

import dataclasses
import functools
import json
import re

import pytest

from apr_jax.errors import UsageError
from apr_jax.tasks import Problem, Spawn, TaskConfig, flatten, load_problems, make_task
from apr_jax.tasks.arithmetic import expression as expressions
from apr_jax.tasks.arithmetic.expression import MAX_HEIGHT, MAX_LENGTH
from apr_jax.text.sentence_piece import SentencePieceTokenizer

SETTINGS = [
    {"height": 2, "fullness": 0.5, "modulus": 10},
    {"height": 3, "fullness": 0.5, "modulus": 7},
    {"height": 4, "fullness": 0.7, "modulus": 10},
    {"height": 5, "fullness": 0.0, "modulus": 2},
    {"height": 3, "fullness": 1.0, "modulus": 10},
]


def arithmetic(**settings):
    return make_task(TaskConfig("arithmetic", **settings))


def problem(text):
    return Problem("p", {"expression": text})


@dataclasses.dataclass
class Remainder:
    """A number of which only the remainder is kept, and the levels of operations that made it."""

    number: int
    modulus: int
    levels: int = 0

    def _after(self, other, number):
        levels = 1 + max(self.levels, other.levels)
        return Remainder(number % self.modulus, self.modulus, levels)

    def __add__(self, other):
        return self._after(other, self.number + other.number)

    def __sub__(self, other):
        return self._after(other, self.number - other.number)

    def __mul__(self, other):
        return self._after(other, self.number * other.number)


@functools.lru_cache(maxsize=4096)
def by_python(text, modulus):
    """Python works out the expression; every result on the way is reduced."""
    return eval(re.sub(r"(\d+)", r"number(\1)", text), {"number": lambda n: Remainder(n, modulus)})


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_method_works_out_what_python_does(settings):
    task = arithmetic(**settings)
    shapes = set()
    for seed in range(400):
        drawn = task.draw(seed)
        text = drawn.data["expression"]
        right = by_python(text, settings["modulus"])
        assert right.levels == settings["height"]
        assert task.check(drawn) == drawn and task.draw(seed) == drawn
        shapes.add(re.sub(r"\d", "d", re.sub(r"[+*]", "-", text)))

        for method, description in task.methods.items():
            tree = task.demonstrate(drawn, method, seed)
            assert tree.prompt == task.prompt(drawn) == f"{text}="
            assert task.score(drawn, tree.answer).correct and tree.answer == str(right.number)
            assert depth(tree) <= description.depth
            threads = flatten(tree)
            for thread in threads:
                expression = thread.prompt.removesuffix("=")
                assert thread.answer == str(by_python(expression, settings["modulus"]).number)
                for line in steps(thread):
                    left, _, result = line.partition("=")
                    assert str(by_python(left, settings["modulus"]).number) == result
                diagnosis = task.diagnose(drawn, as_read(thread, tree), cut=False)
                assert not diagnosis.faults and diagnosis.hopeful
                assert diagnosis.found == (thread is tree)
            work = sum(len(steps(thread)) for thread in threads)
            assert work == len(re.findall(r"[+\-*]", text)), "each operation is done once"
    assert len(shapes) == 1 if settings["fullness"] == 1 else len(shapes) > 2


def depth(thread):
    spawned = [child for part in thread.body if isinstance(part, Spawn) for child in part.children]
    return 1 + max(map(depth, spawned)) if spawned else 0


def steps(thread):
    texts = [part for part in thread.body if isinstance(part, str)]
    return [step for text in texts for step in text.split(",")]


def as_read(thread, root):
    """The thread as it is read from a trace: a root has an empty prompt."""
    return dataclasses.replace(thread, prompt="") if thread is root else thread


def test_demonstrations_by_hand():
    task = arithmetic()
    told = problem("(3+4)*(2-(5*6))")
    serial = task.demonstrate(told, "serial", 0)
    assert serial.body == ("3+4=7,5*6=0,2-0=2,7*2=4",) and serial.answer == "4"

    parallel = task.demonstrate(told, "parallel", 0)
    spawn, own = parallel.body
    assert [child.prompt for child in spawn.children] == ["3+4", "2-(5*6)"]
    assert [child.body for child in spawn.children] == [("3+4=7",), ("5*6=0,2-0=2",)]
    assert own == "7*2=4"

    nested = task.demonstrate(told, "nested", 0)
    below = nested.body[0].children[1]
    assert [child.prompt for child in below.body[0].children] == ["5*6"]
    assert below.body[1] == "2-0=2" and below.answer == "2"

    flat = task.demonstrate(problem("8-9"), "nested", 0)
    assert flat.body == ("8-9=9",), "nothing is left to spawn"
    with pytest.raises(ValueError, match="'apr' must be one of serial, parallel, nested"):
        task.demonstrate(told, "apr", 0)


def test_a_full_tree_has_a_thread_for_each_operation():
    task = arithmetic(height=4, fullness=1.0)
    drawn = task.draw(0)
    sizes = {method: len(flatten(task.demonstrate(drawn, method, 0))) for method in task.methods}
    assert sizes == {"serial": 1, "parallel": 3, "nested": 15}
    assert depth(task.demonstrate(drawn, "nested", 0)) == task.methods["nested"].depth == 3


def test_brackets_and_an_operator_are_one_token():
    task = arithmetic(height=4, fullness=1.0)
    text = task.prompt(task.draw(0))
    tokenizer = SentencePieceTokenizer.train([text], task.phrases, task.alphabet)
    operations = 15
    assert len(tokenizer.encode(text)) == (operations + 1) + operations + 2 + 1
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "8",
        "15",
        "5 ",
        " 5",
        "05",
        "5=",
        "\u0665",
        "²",
        "五",
        "-5",
        "5" * 10_000,
        "<join>",
        "\x00",
    ],
)
def test_all_but_the_digit_is_wrong(answer):
    score = arithmetic().score(problem("3+(4*8)"), answer)
    assert not score.correct and score.reward == 0 and score.reason
    assert (score.stated is None) == (answer == "")
    assert len(score.stated or "") <= 60


def test_the_digit_is_right():
    score = arithmetic().score(problem("3+(4*8)"), "5")
    assert score.correct and score.reward == 1 and score.stated == "5" and not score.reason


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        (None, "must be a text like"),
        (7, "must be a text like"),
        (["3+4"], "must be a text like"),
        ("", "has the end at character 1, must have a digit"),
        ("7", "has the end at character 2, must have an operator"),
        ("(3+4)", "has the end at character 6, must have an operator"),
        ("3+4=", "has '=' at character 4, must have its end there"),
        ("1+2+3", r"has '\+' at character 4, must have its end there"),
        ("1+-2", "has '-' at character 3, must have a digit"),
        ("10+2", "has '0' at character 2, must have an operator"),
        ("3/4", "has '/' at character 2, must have an operator"),
        ("(3+4)*(2-5", r"has the end at character 11, must have \)"),
        ("3+٤", "has '٤' at character 3, must have a digit"),
        ("3+²", "has '²' at character 3, must have a digit"),
        ("3 + 4", "has ' ' at character 2, must have an operator"),
        ("3+\n4", r"has '\\n' at character 3"),
        ("__import__('os')", "has '_' at character 1"),
        ("(" * MAX_HEIGHT + "1+1", f"has more than {MAX_HEIGHT} levels"),
        ("(" * 100_000, f"has 100000 characters, must have at most {MAX_LENGTH}"),
        ("\ud800", "at character 1"),
    ],
)
def test_what_is_no_expression_is_refused_in_one_line(expression, reason, tmp_path):
    task = arithmetic()
    with pytest.raises(ValueError, match=reason) as caught:
        task.check(problem(expression))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250

    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"id": "a", "expression": expression}) + "\n")
    with pytest.raises(UsageError, match=f"line 1.*{reason}"):
        load_problems(file, task)


def test_missing_expression_and_too_large_digits_are_refused():
    with pytest.raises(ValueError, match='has no field "expression"; expected {"id"'):
        arithmetic().check(Problem("p", {"expresion": "3+4"}))
    with pytest.raises(ValueError, match=r"'3\+7' has '7' at character 3.*from 0 to 6"):
        arithmetic(modulus=7).check(problem("3+7"))


def test_the_largest_expression_is_read():
    task = arithmetic(height=MAX_HEIGHT, fullness=1.0)
    drawn = task.draw(0)
    assert len(drawn.data["expression"]) == MAX_LENGTH
    assert task.check(drawn) == drawn
    text = drawn.data["expression"]
    assert expressions.write(expressions.read(text, 10)) == text


def test_the_command_line_takes_spaces_and_an_x():
    task = arithmetic()
    parsed = task.parse(" (3+4) x (2 - 5) = ")
    assert parsed.data == {"expression": "(3+4)*(2-5)"}
    assert task.show(parsed) == "(3+4)*(2-5)="
    for text in ("", "3+", "{}", "3+4;", "9" * 100_000):
        with pytest.raises(UsageError, match=r"^problem.*write it like '\(3\+4\)\*\(2-5\)'$"):
            task.parse(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 1}, "task.height=1 must be from 2 to 8"),
        ({"height": 9}, "task.height=9 must be from 2 to 8"),
        ({"fullness": 1.5}, "task.fullness=1.5 must be from 0 to 1"),
        ({"modulus": 11}, "task.modulus=11 must be from 2 to 10"),
        ({"modulus": "x"}, "task.modulus='x'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        TaskConfig("arithmetic", **settings)


def test_no_two_parts_of_a_split_share_an_expression():
    task = arithmetic(height=2, fullness=0.5)
    split = task.split(train=400, heldout=100, seed=0)
    keys = [{task.key(one) for one in part} for part in vars(split).values()]
    assert [len(part) for part in keys] == [400, 100, 100]
    assert len(set.union(*keys)) == 600
