"""`check_task` finds nothing wrong with our own tasks, and each fault that an author may make."""

import dataclasses
import itertools
import random
import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from apr_jax.data.task_check import HOSTILE_ANSWERS, check_task
from apr_jax.tasks import Condition, Method, Problem, Score, Spawn, Task, TaskConfig, Thread
from apr_jax.tasks.base import Bounds
from apr_jax.tasks.registry import make_task

ROOT = Path(__file__).parents[2]
_calls = itertools.count()  # A task that keeps state in its module, as a careless one does.


def findings(task, count=30, bounded=False):
    return list(check_task(task, count, 0, time_limit=2.0, memory_limit=4.0, bounded=bounded))


def faults(task, **settings):
    return [finding for finding in findings(task, **settings) if finding.level == "fault"]


class Doubles(Task):
    """A task without a fault: the double of a number, which two children halve."""

    alphabet = "0123456789+="
    methods: Mapping[str, Method] = {
        "split": Method(parallel=True, depth=1, condition=Condition("children", 1, 2))
    }

    def draw(self, seed):
        return Problem("any", {"number": random.Random(f"doubles {seed}").randrange(10_000)})

    def prompt(self, problem, condition=None):
        stated = "" if condition is None else f"={condition}"
        return f"{problem.data['number']}{stated}"

    def demonstrate(self, problem, method, seed):
        number = str(problem.data["number"])
        children = tuple(Thread(f"{number}+", (), number) for _ in range(2))
        answer = str(2 * problem.data["number"])
        return Thread(self.prompt(problem), (number, Spawn(children)), answer)

    def score(self, problem, answer):
        correct = answer.strip() == str(2 * problem.data["number"])
        return Score(float(correct), correct, answer or None, "" if correct else "is no double")


@pytest.mark.parametrize(
    "kind",
    ["hidden_digit", "countdown", f"{ROOT}/examples/anagrams.py:Anagrams"],
    ids=["hidden_digit", "countdown", "anagrams"],
)
def test_our_own_tasks_have_no_fault(kind):
    found = findings(make_task(TaskConfig(kind)))
    assert {finding.level for finding in found} <= {"ok", "note"}
    subjects = {finding.subject for finding in found}
    assert {"problems", "split", "prompts", "scores"} <= subjects


def test_sound_task_gets_one_note_and_no_fault():
    found = findings(Doubles())
    (note,) = [finding for finding in found if finding.level != "ok"]
    assert note.level == "note" and note.text.startswith("one spelling only")
    assert re.search(r"are wrong with a full stop \('\d+\.'\)$", note.text)
    assert "limits that hold them all: window=" in " ".join(finding.text for finding in found)


class Bare(Doubles):
    methods: Mapping[str, Method] = {}


class DrawsByTheClock(Doubles):
    def draw(self, seed):
        return Problem("any", {"number": next(_calls)})


class DrawsOneProblem(Doubles):
    def draw(self, seed):
        return Problem("any", {"number": 7})


class DrawsNoProblem(Doubles):
    def draw(self, seed):
        return {"number": 7}


class HoldsATuple(Doubles):
    def draw(self, seed):
        return Problem("any", {"number": 7, "pair": (seed, 2)})


class RefusesItsOwn(Doubles):
    def check(self, problem):
        raise ValueError('"number" must be odd')


class PromptsNothing(Doubles):
    def prompt(self, problem, condition=None):
        return ""


class PromptsOtherCharacters(Doubles):
    def prompt(self, problem, condition=None):
        return f"twice {problem.data['number']}"


class StatesNoCondition(Doubles):
    def prompt(self, problem, condition=None):
        return str(problem.data["number"])


class DemonstratesAtRandom(Doubles):
    def demonstrate(self, problem, method, seed):
        thread = super().demonstrate(problem, method, seed)
        return dataclasses.replace(thread, body=(str(next(_calls)), *thread.body))


class DemonstratesAnotherPrompt(Doubles):
    def demonstrate(self, problem, method, seed):
        return dataclasses.replace(super().demonstrate(problem, method, seed), prompt="1")


class DemonstratesDeeper(Doubles):
    methods: Mapping[str, Method] = {"split": Method(parallel=True)}


class DemonstratesInALine(Doubles):
    methods: Mapping[str, Method] = {"split": Method(parallel=False, depth=1)}


class DemonstratesAText(Doubles):
    def demonstrate(self, problem, method, seed):
        return self.prompt(problem)


class DemonstratesWrongAnswers(Doubles):
    def demonstrate(self, problem, method, seed):
        return dataclasses.replace(super().demonstrate(problem, method, seed), answer="1")


class ScoresBeyondOne(Doubles):
    def score(self, problem, answer):
        return dataclasses.replace(super().score(problem, answer), reward=2.0)


class ReadsNumbersOnly(Doubles):
    def score(self, problem, answer):
        correct = int(answer) == 2 * problem.data["number"]
        return Score(float(correct), correct, answer)


class AcceptsTheEmptyAnswer(Doubles):
    def score(self, problem, answer):
        return super().score(problem, answer) if answer else Score(1.0, True, "nothing")


class Hangs(Doubles):
    def score(self, problem, answer):
        while answer.startswith("9**"):
            time.sleep(1)
        return super().score(problem, answer)


class ScoresByTheClock(Doubles):
    def score(self, problem, answer):
        score = super().score(problem, answer)
        return dataclasses.replace(score, reason=score.reason or str(next(_calls)))


class SplitsOneProblemTwice(Doubles):
    def split(self, *arguments, **settings):
        split = super().split(*arguments, **settings)
        return dataclasses.replace(split, test=split.train[:1])


@pytest.mark.parametrize(
    ("task", "subject", "text", "remedy"),
    [
        (DrawsByTheClock, "problems", "draw(0) gives {'number': ", "alone; a set has no fixed"),
        (DrawsOneProblem, "problems", "30 drawn, 1 different, in 1 groups", "`key` and `group`"),
        (DrawsNoProblem, "problems", "draw(0) returns {'number': 7}", "return a Problem"),
        (HoldsATuple, "problems", "'pair': [0, 2]} when it comes back", "lists instead of tuples"),
        (RefusesItsOwn, "problems", 'ValueError: "number" must be odd', "mend the task there"),
        (PromptsNothing, "prompts", "a prompt is ''", "not empty"),
        (PromptsOtherCharacters, "prompts", "holds ' ', which the task's alphabet lacks", "add it"),
        (StatesNoCondition, "prompts", "a condition of 1 children changes nothing", "'split'"),
        (DemonstratesAtRandom, "demonstrations split", "differs from one process", "seed alone"),
        (DemonstratesAnotherPrompt, "demonstrations split", "root's prompt is '1'", "self.prompt"),
        (DemonstratesDeeper, "demonstrations split", "Method.depth is 0", "Method(..., depth=1)"),
        (DemonstratesInALine, "demonstrations split", "not parallel spawns", "parallel=True"),
        (DemonstratesAText, "demonstrations split", "demonstrate returns '", "return a Thread"),
        (DemonstratesWrongAnswers, "demonstrations split", "0 of 30 give a right answer", "wrong"),
        (ScoresBeyondOne, "scores", "no verdict on ", "have `score` return Score(0.0"),
        (ReadsNumbersOnly, "scores", "no verdict on a full stop ('", "it cannot read"),
        (AcceptsTheEmptyAnswer, "scores", "the empty text ('') counts as right", "RL will find"),
        (Hangs, "scores", "no verdict on a power of powers", "have `score` return Score(0.0"),
        (ScoresByTheClock, "scores", "is scored differently the second time", "answer alone"),
        (SplitsOneProblemTwice, "split", "is in train and in test", "keep the problems of a group"),
    ],
)
def test_a_fault_is_found_and_says_its_remedy(task, subject, text, remedy):
    found = faults(task())
    assert subject in {fault.subject for fault in found}
    fault = next(fault for fault in found if fault.subject == subject)
    assert text in fault.text
    assert remedy in fault.remedy
    assert "\n" not in fault.text


def test_fault_of_tight_limits_names_sufficient_limits():
    task = Doubles(bounds=Bounds(max_threads=2))
    (fault,) = faults(task, bounded=True)
    assert "30 of 30 would be dropped: 30 by limits.max_threads" in fault.text
    assert "max_threads=3" in fault.remedy


def test_limits_that_hold_everything_do():
    told = next(finding.text for finding in findings(Doubles()) if "hold them" in finding.text)
    values = dict(part.split("=") for part in told.rpartition(": ")[2].split(", "))
    bounds = Bounds(**{name: int(value) for name, value in values.items()})
    assert not faults(Doubles(bounds=bounds), bounded=True)
    tight = dataclasses.replace(bounds, window=bounds.window - 2)
    assert any(
        "would be dropped" in finding.text
        for finding in findings(Doubles(bounds=tight), bounded=True)
    )


def test_a_task_without_demonstrations_is_whole():
    found = findings(Bare())
    assert not [finding for finding in found if finding.level == "fault"]
    assert any("the task has none" in finding.text for finding in found)


def test_hostile_answers_are_what_they_say():
    assert HOSTILE_ANSWERS["the empty text"] == ""
    assert all(isinstance(answer, str) for answer in HOSTILE_ANSWERS.values())
