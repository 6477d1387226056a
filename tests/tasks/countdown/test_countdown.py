"""The verifier against wrong paths made by hand, against chance, and against the clock."""

import time

import hypothesis
import pytest
from helpers.puzzles import countdown
from hypothesis import strategies

from apr_jax.tasks.base import Task
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.problems import draw, solve
from apr_jax.tasks.countdown.puzzle import Puzzle, make_problem

PROBLEM = make_problem("p", (22, 26, 2), 46)
TASK = countdown(CountdownConfig())

RIGHT = [
    "22+26=48,48-2=46",
    "26+22=48,48-2=46",
    "26-2=24,22+24=46",
    "26-2=24,24+22=46",
    "22-2=20,20+26=46",
]
WRONG = {
    "22+26=48": "has 1 steps",
    "22+26=48,48-2=46,": "has 3 steps",
    "22+26=48,48-2=46,46*1=46": "has 3 steps",
    "22+26=48,48-3=45": "3 is not there",
    "22+26=48,22+26=48": "22 is not there",
    "22+22=44,44+2=46": "22 is not there",
    "22+26=47,47-2=45": "is 48",
    "22+26=48,48-2=45": "is 46",
    "22+26=48,48+2=50": "ends at 50",
    "2-22=20,26+20=46": "negative",
    "26/22=1,2*1=2": "not an exact division",
    "22+26=48,48-2=46 ": "not an equation",
    " 22+26=48,48-2=46": "not an equation",
    "22+26=48\n,48-2=46": "not an equation",
    "22 + 26=48,48-2=46": "not an equation",
    "22+26=+48,48-2=46": "not an equation",
    "22+26=48;48-2=46": "has 1 steps",
    "22+26=48,48-2=46.0": "not an equation",
    "٢٢+26=48,48-2=46": "not an equation",
    "22+26-2=46,46*1=46": "not an equation",
    "22+26==48,48-2=46": "not an equation",
    "22^26=48,48-2=46": "not an equation",
    "22+26=48,": "not an equation",
    ",": "not an equation",
    "no solution": "has 1 steps",
}


def test_right_paths():
    for answer in RIGHT:
        verdict = TASK.score(PROBLEM, answer)
        assert verdict.correct and verdict.reward == 1 and not verdict.reason
        assert verdict.stated == answer.replace(",", ", ")


@pytest.mark.parametrize("answer", WRONG)
def test_wrong_paths(answer):
    verdict = TASK.score(PROBLEM, answer)
    assert not verdict.correct and verdict.reward == 0
    assert WRONG[answer] in verdict.reason
    assert verdict.stated == answer.replace(",", ", ")


def test_no_claim():
    verdict = TASK.score(PROBLEM, "")
    assert verdict.stated is None and not verdict.reward and not verdict.correct


@pytest.mark.parametrize(
    ("numbers", "target", "answer", "correct"),
    [
        ((5, 5, 3), 13, "5+5=10,10+3=13", True),
        ((5, 3, 2), 13, "5+5=10,10+3=13", False),  # One five only.
        ((5, 5, 7), 7, "5-5=0,0+7=7", True),
        ((5, 5, 7), 7, "5-5=0,0*7=0", False),
        ((5, 5, 7), 7, "5-5=0,7/0=7", False),  # Never a division by zero.
        ((8, 4, 2), 4, "8/4=2,2+2=4", True),
        ((8, 3, 2), 4, "8/3=2,2+2=4", False),
        ((3, 4), 12, "3*4=12", True),
        ((12, 1, 12), 12, "12*1=12,12/12=1", False),  # The goal came and went.
        ((7,), 7, "7", False),
    ],
)
def test_each_number_once_and_exact(numbers, target, answer, correct):
    assert TASK.score(make_problem("p", numbers, target), answer).correct is correct


@hypothesis.given(strategies.text() | strategies.text(alphabet="0123456789+-*/=,"))
@hypothesis.settings(max_examples=400, deadline=None)
def test_never_raises_and_never_believes(answer):
    # A target that these numbers cannot make: whatever is said, it is wrong.
    assert solve((2, 2, 2), 97) is None
    assert not TASK.score(make_problem("p", (2, 2, 2), 97), answer).correct


@hypothesis.given(
    seed=strategies.integers(0, 10**6),
    place=strategies.integers(0, 200),
    digit=strategies.sampled_from("0123456789"),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_one_changed_digit_is_noticed(seed, place, digit):
    problem = draw(TASK.config, seed)
    path = solve(Puzzle.of(problem).numbers, Puzzle.of(problem).target)
    assert path is not None
    answer = ",".join(path)
    assert TASK.score(problem, answer).correct
    digits = [at for at, character in enumerate(answer) if character.isdigit()]
    at = digits[place % len(digits)]
    changed = answer[:at] + digit + answer[at + 1 :]
    # Operands are the given numbers and all results but the last, so no other path is one digit
    # away.
    assert TASK.score(problem, changed).correct == (changed == answer)


@pytest.mark.parametrize(
    "piece", ["1", ",", "1+", "=", "1+1=2,", "9=", "22+26=48", "1,1", "\ud800", " "]
)
def test_a_megabyte_is_judged_at_once(piece):
    answer = piece * (1_000_000 // len(piece))
    start = time.perf_counter()
    verdict = TASK.score(PROBLEM, answer)
    assert not verdict.correct and len(verdict.reason) < 300
    assert time.perf_counter() - start < 0.5
    numbers = (22,) * (answer.count(",") + 2)
    start = time.perf_counter()
    TASK.score(make_problem("p", numbers[:7], 46), ",".join([answer] * 6))
    assert time.perf_counter() - start < 2


def test_prompts():
    assert TASK.prompt(PROBLEM) == "22,26,2:46"
    assert TASK.prompt(PROBLEM, 3) == "22,26,2:46#3"
    assert TASK.prompt(PROBLEM, 0) == "22,26,2:46#0"
    sos = countdown(CountdownConfig(), SolverConfig(render="sos"))
    assert sos.prompt(PROBLEM) == "Current State: 46:[22, 26, 2], Operations: []\n"
    assert sos.prompt(PROBLEM, 3).startswith("Sub Call Budget: 3 Current State: 46:[22")


def test_countdown_is_a_task():
    task: Task = TASK
    assert task.prompt(PROBLEM)
