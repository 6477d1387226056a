"""Diagnoses of arithmetic: corrupted demonstrations, threads by hand, and hostile text."""

import dataclasses
import random

import pytest
from helpers.diagnoses import kinds, told

from apr_jax.evaluate.failures import failure
from apr_jax.tasks import Problem, TaskConfig, Thread, flatten, make_task

TASK = make_task(TaskConfig("arithmetic", height=4, fullness=0.7))
PROBLEM = Problem("p", {"expression": "(3+4)*(2-(5*6))"})  # 7*(2-0) = 4
MESSAGES = ("3+4", "2-(5*6)")


def diagnose(*body, answer="4", prompt="", cut=False):
    return TASK.diagnose(PROBLEM, Thread(prompt, body, answer), cut)


@pytest.mark.parametrize(
    ("body", "answer", "expected"),
    [
        (("3+4=7,5*6=0,2-0=2,7*2=4",), "4", []),
        # One slip counts once: what follows from it is believed.
        (("3+4=8,5*6=0,2-0=2,8*2=6",), "6", ["arithmetic"]),
        (("3+4=7,5*6=1,2-1=1,7*1=7",), "7", ["arithmetic"]),
        (("3+4=7,5*6=0,2-0=2,7*2=4",), "7", ["answer"]),
        # Another operation first, a digit misread, a result miscopied.
        (("5*6=0,3+4=7,2-0=2,7*2=4",), "4", ["order"]),
        (("3+5=8,5*6=0,2-0=2,8*2=6",), "6", ["order"]),
        (("3+4=7,5*6=0,2-1=1,7*1=7",), "7", ["order"]),
        (("3+4=7,5*6=0,2-0=2,7*2=4,7*2=4",), "4", ["order"]),
        (("3+4=7,5*6=0",), "7", ["order"]),
        (("3+4=7;5*6=0,2-0=2,7*2=4",), "4", ["order", "order", "order"]),
        (("3+4=7",), "4", []),  # To join the right digit early does no harm.
        ((), "4", []),
        ((), "", ["order"]),
        # A child's answer may be any digit; what is done with it may not.
        ((told(*MESSAGES), "7*2=4"), "4", []),
        ((told(*MESSAGES), "8*3=4"), "4", []),
        ((told(*MESSAGES), "8*3=5"), "5", ["arithmetic"]),
        ((told(*MESSAGES), "7+2=9"), "9", ["order"]),
        ((told("2-(5*6)"), "3+4=7,7*2=4"), "4", []),
        ((told("3+4"), "5*6=0,2-0=2,7*2=4"), "4", []),
        ((told("3+4", "2-(5*7)"), "5*6=0,2-0=2,7*2=4"), "4", ["message"]),
        ((told("3+4", "3+4", "2-(5*6)"), "7*2=4"), "4", ["message"]),
        ((told("(3+4)", "5*6", ""), "7*2=4"), "4", ["message", "message", "message", "order"]),
    ],
)
def test_the_root_by_hand(body, answer, expected):
    diagnosis = diagnose(*body, answer=answer)
    assert kinds(diagnosis) == expected
    assert all(fault.decisive for fault in diagnosis.faults) and diagnosis.hopeful


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (("3+4=7,5*6=0,2-0=2,7*2=4",), True),
        (("3+4=7,5*6=0,2-0=2,7*2=5",), False),
        (("3+4=7,5*6=0,2-0=2",), False),
        (("3+7=4",), False),  # The digit is that of the problem, and the operation is not its last.
        ((told(*MESSAGES), "7*2=4"), True),
        ((told(*MESSAGES), "4*2=8"), False),
        ((), False),
    ],
)
def test_solution_is_found_by_the_last_operations_digit(body, found):
    assert diagnose(*body, answer="").found == found


def test_children_are_read_by_their_messages():
    good = diagnose("5*6=0,2-0=2", prompt="2-(5*6)", answer="2")
    assert not good.faults and good.hopeful and not good.found
    slip = diagnose("5*6=3,2-3=9", prompt="2-(5*6)", answer="9")
    assert kinds(slip) == ["arithmetic"] and slip.faults[0].decisive
    # Its message is no part of the problem: nothing that it does can help or harm.
    stray = diagnose("5*7=4,2-4=8", prompt="2-(5*7)", answer="8")
    assert kinds(stray) == ["arithmetic"] and not stray.hopeful and not stray.faults[0].decisive
    for prompt in ("<msg>", "3", "(3+4)", "((((((((((", "\ud800", "9" * 100_000):
        diagnosis = diagnose("5*6=3", prompt=prompt)
        assert not diagnosis.faults and not diagnosis.hopeful and not diagnosis.found


def test_what_a_cut_thread_left_undone_is_no_fault():
    full = "3+4=7,5*6=0,2-0=2,7*2=4"
    for stop in range(len(full) + 1):
        diagnosis = diagnose(full[:stop], answer="", cut=True)
        assert not diagnosis.faults
        assert diagnosis.found == (stop == len(full))
    assert kinds(diagnose("3+4=8,5*", answer="", cut=True)) == ["arithmetic"]
    assert kinds(diagnose("3+4,5*", answer="", cut=True)) == ["order"]


def as_read(thread, is_root):
    """The thread as a trace shows it: a root has no prompt, children are messages only."""
    body = tuple(
        part if isinstance(part, str) else told(*(child.prompt for child in part.children))
        for part in thread.body
    )
    return dataclasses.replace(thread, prompt="" if is_root else thread.prompt, body=body)


def other(rng, character):
    """Another character of the same kind."""
    choices = "0123456789" if character.isdigit() else "+-*"
    return rng.choice([choice for choice in choices if choice != character])


@pytest.mark.parametrize("method", ["serial", "parallel", "nested"])
def test_corrupted_demonstrations_have_the_fault_that_was_made(method):
    rng = random.Random(method)
    for seed in range(300):
        problem = TASK.draw(seed)
        tree = TASK.demonstrate(problem, method, 0)
        thread = rng.choice(flatten(tree))
        read = as_read(thread, thread is tree)
        *before, text = read.body
        step = rng.randrange(len(text.split(",")))
        at = 6 * step

        result = text[: at + 4] + other(rng, text[at + 4]) + text[at + 5 :]
        wrong = TASK.diagnose(problem, dataclasses.replace(read, body=(*before, result)), False)
        assert wrong.faults[0].kind == "arithmetic"
        assert wrong.faults[0].text == result[at : at + 5]

        # Of an operation on answers of children only the operator is known.
        place = 1 if before else rng.randrange(3)
        misread = text[: at + place] + other(rng, text[at + place]) + text[at + place + 1 :]
        wrong = TASK.diagnose(problem, dataclasses.replace(read, body=(*before, misread)), False)
        assert wrong.faults[0].kind == "order"
        assert wrong.faults[0].text == misread[at : at + 5]

        joined = dataclasses.replace(read, answer=other(rng, read.answer))
        assert kinds(TASK.diagnose(problem, joined, False)) == ["answer"]

        if before:
            messages = [child.prompt for child in before[0].children]
            bad = rng.randrange(len(messages))
            at = rng.choice([i for i, char in enumerate(messages[bad]) if char.isdigit()])
            changed = other(rng, messages[bad][at])
            messages[bad] = messages[bad][:at] + changed + messages[bad][at + 1 :]
            # By chance the message may be the other operand.
            if messages[bad] not in (child.prompt for child in before[0].children):
                wrong = TASK.diagnose(
                    problem, dataclasses.replace(read, body=(told(*messages), text)), False
                )
                assert wrong.faults[0].kind == "message"
                assert wrong.faults[0].text == messages[bad]


def test_hostile_text_never_raises():
    rng = random.Random(0)
    characters = "0123456789+-*()=,,==x\n\x00٣²\ud800<>"
    for _ in range(1_000):
        texts = ["".join(rng.choices(characters, k=rng.randrange(30))) for _ in range(5)]
        body = (texts[0], told(texts[1], texts[2]), texts[3])
        thread = Thread(rng.choice(["", "3+4", texts[4]]), body, texts[1])
        for cut in (False, True):
            TASK.diagnose(PROBLEM, thread, cut)
        TASK.score(PROBLEM, texts[0])
    assert TASK.diagnose(PROBLEM, Thread("", ("3+4=8," * 50_000,), ""), False).faults


def trace(answer, text, child_answers):
    """A root that asks for both operands; `child_answers` are what they join."""
    block = "<spawn>" + "".join(f"<msg>{message}" for message in MESSAGES) + "</spawn>"
    work = ("3+4=7", "5*6=0,2-0=2")
    roots = [["given", "p"], ["spawn", block], ["joined", "..."], ["sampled", text]]
    threads = [made(0, [*roots, ["join", f"<join>{answer}"]])]
    for index, (message, steps, joined) in enumerate(
        zip(MESSAGES, work, child_answers, strict=True), start=1
    ):
        spans = [["given", message], ["sampled", steps], ["join", f"<join>{joined}"]]
        threads.append(made(index, spans))
    score = TASK.score(PROBLEM, answer)
    return {
        "id": PROBLEM.id,
        "data": PROBLEM.data,
        "claimed": score.stated is not None,
        "correct": score.correct,
        "threads": threads,
    }


def made(index, spans):
    return {
        "thread_index": index,
        "parent": 0 if index else -1,
        "round": 0,
        "depth": int(index > 0),
        "status": "DONE",
        "start": 9 if index else 0,
        "spans": spans,
    }


def test_a_childs_digit_is_no_solution_of_the_whole():
    """4 is the answer of the problem. A child that joins 4 has not solved it."""
    assert failure(trace("4", "7*2=4", "72"), TASK) == ""
    assert failure(trace("8", "4*2=8", "42"), TASK) == "answer"
    assert failure(trace("2", "7*2=2", "42"), TASK) == "arithmetic"
    assert failure(trace("8", "7*2=4", "72"), TASK) == "join"
    assert failure(trace("1", "7*3=1", "72"), TASK) == "claim"
