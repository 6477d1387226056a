"""Diagnoses of path-star: corrupted demonstrations, threads by hand, and hostile text."""

import dataclasses
import random

import pytest
from helpers.diagnoses import kinds, told

from apr_jax.tasks import Problem, TaskConfig, Thread, flatten, make_task
from apr_jax.tasks.path_star.graph import NODES

TASK = make_task(TaskConfig("path_star"))
PROBLEM = Problem("p", {"graph": "bc,sd,de,xy,sb,sx,c:s"})  # sbc is right, sde and sxy are not.
RIGHT = "bc,de,xy,c:sb"
OTHER = "bc,de,xy,c:sd"
LAST = "bc,de,xy,c:sx"


def diagnose(*body, answer="sbc", prompt="", cut=False):
    return TASK.diagnose(PROBLEM, Thread(prompt, body, answer), cut)


@pytest.mark.parametrize(
    ("body", "answer", "expected", "decisive"),
    [
        # At once.
        ((), "sbc", [], []),
        ((), "", [], []),
        ((), "sde", ["goal"], [True]),
        ((), "sdc", ["edge"], [True]),
        ((), "dbc", ["edge"], [True]),
        # Arm after arm.
        (("de.bc!",), "sbc", [], []),
        (("de.xy.",), "", [], []),
        (("de.bc",), "sbc", ["end"], [True]),
        (("dc!",), "sdc", ["edge"], [False]),
        (("de!",), "sde", ["goal"], [False]),
        (("d.bc!",), "sbc", ["end"], [False]),
        (("b.xy.",), "", ["end"], [True]),
        (("bc.xy.",), "", ["goal"], [True]),
        (("be.xy.",), "", ["edge"], [True]),
        (("de.xy.",), "sde", ["answer"], [True]),
        (("de!bc!",), "sxy", ["goal", "answer"], [False, True]),
        (("de!",), "", ["goal", "answer"], [False, True]),
        (("..bc!",), "sbc", ["end", "end"], [False, False]),
        # A child's answer is believed; what it is told is not.
        ((told(OTHER, LAST, RIGHT),), "sbc", [], []),
        ((told(OTHER, LAST, RIGHT),), "sde", [], []),
        ((told(OTHER),), "", [], []),
        ((told("de,xy,c:sb", OTHER),), "", ["message"], [True]),
        ((told("bc,de,xy,e:sb"),), "", ["message"], [True]),
        ((told("bc,bd,de,xy,c:sb"),), "sbc", ["message"], [False]),
        ((told("bc,c:sb"),), "sbc", [], []),
        ((told("bc,de,xy,c:se", RIGHT),), "sbc", ["message"], [False]),
        ((told("", "sb", RIGHT),), "sbc", ["message", "message"], [False, False]),
        ((told("", "sb"),), "", ["message", "message"], [True, True]),
    ],
)
def test_the_root_by_hand(body, answer, expected, decisive):
    diagnosis = diagnose(*body, answer=answer)
    assert kinds(diagnosis) == expected and diagnosis.hopeful
    assert [fault.decisive for fault in diagnosis.faults] == decisive


@pytest.mark.parametrize(
    ("body", "found"),
    [(("de.bc!",), True), (("bc.",), False), (("bc",), False), (("de!",), False), ((), False)],
)
def test_a_solution_is_an_arm_that_is_said_to_end_in_the_goal(body, found):
    assert diagnose(*body, answer="").found == found


def test_children_are_read_by_their_messages():
    good = diagnose("c!", prompt=RIGHT)
    assert not good.faults and good.hopeful and good.found
    wrong_arm = diagnose("e.", prompt=OTHER, answer="")
    assert not wrong_arm.faults and not wrong_arm.hopeful and not wrong_arm.found

    lost = diagnose("e.", prompt=RIGHT, answer="")
    assert kinds(lost) == ["edge"] and lost.faults[0].decisive and lost.faults[0].text == "be"
    lie = diagnose("e!", prompt=OTHER, answer="sde")
    assert kinds(lie) == ["goal"] and not lie.faults[0].decisive
    assert kinds(diagnose("c!", prompt=RIGHT, answer="sde")) == ["answer"]
    assert kinds(diagnose("c!", prompt=RIGHT, answer="")) == ["answer"]
    assert kinds(diagnose(prompt=RIGHT, answer="")) == ["end"]
    # The edge is not the problem's, but the child was told it: the fault is its parent's.
    astray = diagnose("e!", prompt="be,e:sb", answer="sbe")
    assert not astray.faults and not astray.hopeful and not astray.found


@pytest.mark.parametrize("prompt", ["<msg>", "s", ",", "sb:c", "\ud800", "9" * 100_000, "aa,a:a"])
def test_hostile_text_is_read(prompt):
    for text in ("c!", "." * 500, "bc" * 1_000, "\ud800!", "<spawn>", "b c."):
        for cut in (False, True):
            for answer in ("", "s", "bc" * 1_000, "\ud800"):
                diagnosis = diagnose(text, prompt=prompt, answer=answer, cut=cut)
                assert not diagnosis.hopeful and not diagnosis.found
                assert diagnose(text, told(prompt), answer=answer, cut=cut).hopeful


def test_what_a_cut_thread_left_undone_is_no_fault():
    full = "de.xy.bc!"
    for stop in range(len(full) + 1):
        diagnosis = diagnose(full[:stop], answer="", cut=True)
        assert not diagnosis.faults
        assert diagnosis.found == (stop == len(full))
    assert kinds(diagnose("de.xc", answer="", cut=True)) == ["edge"]
    assert kinds(diagnose("de", told(RIGHT), answer="", cut=True)) == ["end"]


def texts(thread):
    return [part for part in thread.body if isinstance(part, str)]


def as_read(thread, tree):
    """The thread as a trace shows it: a root has no prompt, children are messages only."""
    body = tuple(
        part if isinstance(part, str) else told(*(child.prompt for child in part.children))
        for part in thread.body
    )
    return dataclasses.replace(thread, prompt="" if thread is tree else thread.prompt, body=body)


@pytest.mark.parametrize("method", list(TASK.methods))
def test_demonstrations_have_no_fault(method):
    for seed in range(100):
        problem = TASK.draw(seed)
        tree = TASK.demonstrate(problem, method, seed)
        for thread in flatten(tree):
            diagnosis = TASK.diagnose(problem, as_read(thread, tree), cut=False)
            assert not diagnosis.faults
            assert diagnosis.found == ("!" in "".join(texts(thread)))


@pytest.mark.parametrize("method", ["serial", "parallel"])
def test_corrupted_demonstrations_have_the_fault_that_was_made(method):
    rng = random.Random(method)
    for seed in range(200):
        problem = TASK.draw(seed)
        tree = TASK.demonstrate(problem, method, 0)
        thread = rng.choice(flatten(tree)[1:] or [tree])
        read = as_read(thread, tree)
        (text,) = read.body

        def with_text(text, read=read, problem=problem):
            wrong = TASK.diagnose(problem, dataclasses.replace(read, body=(text,)), False)
            return wrong.faults[0]

        place = rng.choice([place for place, piece in enumerate(text) if piece.isalpha()])
        other = rng.choice([node for node in NODES if node not in problem.data["graph"]])
        invented = with_text(text[:place] + other + text[place + 1 :])
        assert invented.kind == "edge" and invented.text[1] == other

        flipped = with_text(text[:-1] + ("." if text[-1] == "!" else "!"))
        assert flipped.kind == "goal" and flipped.decisive == (text[-1] == "!")
        given_up = with_text(text[:-2] + ".")
        assert given_up.kind == "end" and given_up.decisive == (text[-1] == "!")
