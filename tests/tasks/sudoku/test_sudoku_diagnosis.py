"""Diagnoses of sudoku: demonstrations, pieces that are changed in them, and hostile text."""

import dataclasses
import random
import re

import pytest
from helpers.diagnoses import kinds

from apr_jax.tasks import Spawn, TaskConfig, Thread, flatten, make_task

TASK = make_task(TaskConfig("sudoku"))
DRAWN = [TASK.draw(seed) for seed in range(25)]
MARK = re.compile(r"([a-f][1-6]):([1-6]+|!)")


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


def given_of(problem):
    """A cell that has a digit from the beginning, and the digit."""
    return re.search(r"([a-f][1-6])=([1-6])", TASK.prompt(problem)).groups()


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


def test_changed_mark_has_its_kind_and_counts_first():
    for problem in DRAWN:
        root, text = serial(problem)
        first = MARK.match(text)
        cell, allowed = first.groups()
        right = re.search(f"{cell}=([1-6])", solution_of(problem))[1]
        wrong = next(digit for digit in "123456" if digit not in allowed)
        given, digit = given_of(problem)
        changed = {
            "conflict": (f"{cell}:{''.join(sorted(allowed + wrong))}", False),
            "contradiction": (f"{cell}:!", True),
            "overwritten": (f"{given}:{other(digit)}", True),
            "unmarked": (f"{cell}={wrong}", True),
            "unreadable": ("b4", False),
        }
        if len(allowed) > 1:
            changed["excluded"] = (f"{cell}:{allowed.replace(right, '')}", True)
        for kind, (piece, is_loss) in changed.items():
            told = with_text(root, piece + text[first.end() :])
            diagnosis = TASK.diagnose(problem, told, False)
            assert (kinds(diagnosis)[0], diagnosis.faults[0].text) == (kind, piece)
            assert diagnosis.faults[0].decisive == is_loss

        kept = with_text(root, f"{cell}:{right}" + text[first.end() :])
        diagnosis = TASK.diagnose(problem, kept, False)
        assert kinds(diagnosis)[:1] == (["excluded"] if len(allowed) > 1 else [])
        assert not any(fault.decisive for fault in diagnosis.faults[:1])


def test_guesses_are_held_to_the_candidates():
    for problem in DRAWN:
        root, text = serial(problem)
        guess = re.search(r"\?([1-6]+)([a-f][1-6])=([1-6])", text)
        before, after = text[: guess.start()], text[guess.end() :]
        unmarked = f"{guess[2]}={guess[3]}"
        right = unmarked in solution_of(problem)
        diagnosis = TASK.diagnose(problem, with_text(root, before + unmarked + after), False)
        assert kinds(diagnosis)[0] == "unmarked"
        assert diagnosis.faults[0].decisive == (not right)

        fewer = f"?{unmarked}"
        diagnosis = TASK.diagnose(problem, with_text(root, before + fewer + after), False)
        assert kinds(diagnosis)[0] == "guess" and diagnosis.faults[0].text == fewer
        assert diagnosis.faults[0].decisive == (not right)


def test_guess_that_follows_a_wrong_mark_counts_once():
    for problem in DRAWN:
        root, text = serial(problem)
        guess = re.search(r"\?([1-6]+)([a-f][1-6])=([1-6])", text)
        place = text.rindex(f"{guess[2]}:", 0, guess.start())
        mark = MARK.match(text, place)
        more = next(digit for digit in "123456" if digit not in mark[2])
        before = text[: mark.start()] + f"{mark[0]}{more}" + text[mark.end() : guess.start()]
        wrong = before + f"?{guess[1]}{more}{guess[2]}={guess[3]}"
        diagnosis = TASK.diagnose(problem, with_text(root, wrong), True)
        assert kinds(diagnosis) == ["conflict"] and not diagnosis.faults[0].decisive


def test_way_back_to_another_board_is_found():
    looked_at = 0
    for problem in DRAWN:
        root, text = serial(problem)
        before, mark, back = text.partition("!>")
        if not mark:
            continue
        looked_at += 1
        given, digit = given_of(problem)
        changed = back.replace(f"{given}={digit}", f"{given}={other(digit)}", 1)
        diagnosis = TASK.diagnose(problem, with_text(root, before + mark + changed), False)
        assert kinds(diagnosis)[0] == "back"
        # The thread goes on with the board that it called dead; or goes back from one that is not.
        behind_board = back[back.index("?") :]
        onward = TASK.diagnose(problem, with_text(root, f"{before}!{behind_board}"), False)
        assert kinds(onward)[0] == "back"
        whole = before[: before.rindex(":") - 2]  # Without the mark of the dead cell.
        early = TASK.diagnose(problem, with_text(root, f"{whole}>{back}"), False)
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
            second.prompt[:-4],
            second.prompt + first.prompt[-4:],
            re.sub("=([1-6])", lambda match: "=" + other(match[1]), second.prompt, count=1),
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
    given, digit = given_of(problem)
    changed = right.replace(f"{given}={digit}", f"{given}={other(digit)}")
    for answer, expected in [(right, []), ("", []), (changed, ["answer"]), ("x", ["answer"])]:
        diagnosis = TASK.diagnose(problem, dataclasses.replace(spawned, answer=answer), False)
        assert kinds(diagnosis) == expected and not diagnosis.found


def test_hostile_text_never_raises():
    rng = random.Random(0)
    pieces = ["a1=1", "b2:3", "b2:13", "c1:!", "a1=.", "?3c4=2", "?c4=2", "!", ">", "/", "x", "="]
    pieces += ["\ud800", "\u0661", "?", "a1=", "a1:"]
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
