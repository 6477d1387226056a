"""Diagnoses of sudoku: demonstrations, pieces that are changed in them, and hostile text."""

import dataclasses
import random
import re

import pytest
from helpers.diagnoses import kinds

from apr_jax.tasks import Spawn, TaskConfig, Thread, flatten, make_task

TASK = make_task(TaskConfig("sudoku"))
DRAWN = [TASK.draw(seed) for seed in range(25)]
PIECE = re.compile(r"(?:\?[1-6]*)?[a-f][1-6]=[1-6]|!|>")


def as_read(thread, root):
    """The thread as it is read from a trace: a root has an empty prompt."""
    return dataclasses.replace(thread, prompt="") if thread is root else thread


def solution_of(problem):
    return TASK.demonstrate(problem, "serial", 0).answer


def serial(problem):
    """The root of a serial demonstration, with its text alone."""
    thread = TASK.demonstrate(problem, "serial", 0)
    return as_read(thread, thread), thread.body[0]


def with_text(thread, text, **changes):
    return dataclasses.replace(thread, body=(text,), **changes)


def other(digit):
    return str(int(digit) % 6 + 1)


@pytest.mark.parametrize("method", ["serial", "parallel", "nested"])
def test_demonstrations_have_no_fault(method):
    hopeful = set()
    for problem in DRAWN:
        right = solution_of(problem)
        tree = TASK.demonstrate(problem, method, 0)
        for thread in flatten(tree):
            diagnosis = TASK.diagnose(problem, as_read(thread, tree), False)
            assert not diagnosis.faults, diagnosis.faults
            spawned = any(isinstance(part, Spawn) for part in thread.body)
            assert diagnosis.found == (thread.answer == right and not spawned)
            assert diagnosis.hopeful == (thread.answer == right)
            hopeful.add(diagnosis.hopeful)
            # Stopped anywhere in its text, the thread has left things undone and none is a fault.
            for stop in range(0, len(thread.body[0]) if not spawned else 0, 7):
                cut = with_text(as_read(thread, tree), thread.body[0][:stop], answer="")
                assert not TASK.diagnose(problem, cut, True).faults
    assert hopeful == ({True} if method == "serial" else {True, False})


def test_changed_step_has_its_kind_and_counts_first():
    seen = set()
    for problem in DRAWN:
        root, text = serial(problem)
        first = PIECE.search(text)
        if first[0].startswith("?"):
            continue
        cell, digit = first[0][:2], first[0][3]
        given = TASK.prompt(problem)[:4]
        changed = {
            "conflict": f"{cell}={other(digit)}",  # The digit was the only one that is allowed.
            "overwritten": given[:3] + other(given[3]),
            "unreadable": "b4",
            "contradiction": "!",
        }
        for kind, piece in changed.items():
            diagnosis = TASK.diagnose(problem, with_text(root, piece + text), False)
            assert (kinds(diagnosis)[0], diagnosis.faults[0].text) == (kind, piece)
            assert diagnosis.faults[0].decisive == (kind != "unreadable")
            seen.add(kind)
    assert len(seen) == 4


def test_guesses_are_held_to_the_candidates():
    for problem in DRAWN:
        root, text = serial(problem)
        guess = re.search(r"\?([1-6]+)([a-f][1-6])=([1-6])", text)
        before, after = text[: guess.start()], text[guess.end() :]
        unmarked = f"{guess[2]}={guess[3]}"
        right = unmarked in solution_of(problem)
        diagnosis = TASK.diagnose(problem, with_text(root, before + unmarked + after), False)
        assert kinds(diagnosis)[0] == "propagation"
        assert diagnosis.faults[0].decisive == (not right)

        fewer = f"?{unmarked}"
        diagnosis = TASK.diagnose(problem, with_text(root, before + fewer + after), False)
        assert kinds(diagnosis)[0] == "guess" and diagnosis.faults[0].text == fewer
        assert diagnosis.faults[0].decisive == (not right)


def test_way_back_to_another_board_is_found():
    looked_at = 0
    for problem in DRAWN:
        root, text = serial(problem)
        before, mark, back = text.partition("!>")
        if not mark:
            continue
        looked_at += 1
        changed = back[:3] + other(back[3]) + back[4:]  # A given.
        diagnosis = TASK.diagnose(problem, with_text(root, before + mark + changed), False)
        assert kinds(diagnosis)[0] == "back"
        # The thread goes on with the board that it called dead; or goes back from one that is not.
        onward = TASK.diagnose(problem, with_text(root, f"{before}!{back}"), False)
        assert kinds(onward)[0] == "back"
        early = TASK.diagnose(problem, with_text(root, f"{before}>{back}"), False)
        assert kinds(early)[0] == "back" and len(early.faults) == 1
    assert looked_at > 5


def test_messages_try_every_digit_of_one_cell():
    for problem in DRAWN:
        tree = TASK.demonstrate(problem, "nested", 0)
        root = as_read(tree, tree)
        *text, spawn = tree.body
        first, second = spawn.children
        one = dataclasses.replace(root, body=(*text, Spawn((first,))))
        diagnosis = TASK.diagnose(problem, one, False)
        assert kinds(diagnosis) == ["left out"]
        assert diagnosis.faults[0].text == second.prompt[-4:]
        assert diagnosis.faults[0].decisive == bool(second.answer)

        wrongs = [
            "",
            "x",
            first.prompt,
            second.prompt[4:],
            second.prompt[:3] + other(second.prompt[3]) + second.prompt[4:],
            second.prompt[:-4],
        ]
        for wrong in wrongs:
            told = Spawn((first, Thread(wrong, (), "")))
            diagnosis = TASK.diagnose(problem, dataclasses.replace(root, body=(*text, told)), False)
            assert kinds(diagnosis) == ["message"] and diagnosis.faults[0].text == wrong
            assert diagnosis.faults[0].decisive == bool(second.answer)


def test_answers_are_held_to_the_board():
    problem = DRAWN[0]
    root, text = serial(problem)
    right = root.answer
    wrong = right[:3] + other(right[3]) + right[4:]
    for answer in (wrong, right[:-4], "x", ""):
        diagnosis = TASK.diagnose(problem, with_text(root, text, answer=answer), False)
        assert kinds(diagnosis) == ["answer"] and diagnosis.faults[0].decisive and diagnosis.found
    assert not TASK.diagnose(problem, with_text(root, "", answer=right), False).faults
    assert kinds(TASK.diagnose(problem, with_text(root, "", answer=""), False)) == ["answer"]

    tree = TASK.demonstrate(problem, "nested", 0)
    spawned = as_read(tree, tree)
    given = TASK.prompt(problem)[:4]
    changed = right.replace(given, given[:3] + other(given[3]))
    for answer, expected in [(right, []), ("", []), (changed, ["answer"]), ("x", ["answer"])]:
        diagnosis = TASK.diagnose(problem, dataclasses.replace(spawned, answer=answer), False)
        assert kinds(diagnosis) == expected and not diagnosis.found


def test_hostile_text_never_raises():
    rng = random.Random(0)
    pieces = ["a1=1", "b2=3", "?3c4=2", "?c4=2", "!", ">", "x", "=", "\ud800", "\u0661", "?", "a1="]
    for _ in range(400):
        texts = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(5)]
        told = Spawn((Thread(texts[1], (), ""), Thread(texts[2], (), "")))
        thread = Thread(
            rng.choice(["", "a1=1b2=2", texts[4]]), (texts[0], told, texts[3]), texts[1]
        )
        for cut in (False, True):
            TASK.diagnose(DRAWN[0], thread, cut)
    assert TASK.diagnose(DRAWN[0], Thread("", ("!>" * 2_000,), ""), False).faults
    unreadable = TASK.diagnose(DRAWN[0], Thread("a1=1a1=2", ("!",), ""), False)
    assert not unreadable.faults and not unreadable.hopeful
