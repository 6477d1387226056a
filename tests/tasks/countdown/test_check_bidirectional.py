"""The checker of searches from both ends against every demonstration, and against slips made by
hand, one a kind.
"""

import random

import pytest
from helpers.puzzles import countdown

from apr_jax.tasks import Spawn, Thread, flatten
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.problems import draw
from apr_jax.tasks.countdown.puzzle import make_problem

PROBLEM = make_problem("p", (54, 2, 93, 34), 53)
MESSAGE = "54,34>2,93:53"
TRACE = "2>93:-40-146;+88|+90-86/44;-20|+22-18*40!"

# A search whose only solution is in its last section.
LATE = make_problem("late", (12, 30, 24, 21), 54)
LATE_MESSAGE = "12,30>24,21:54"
LATE_TRACE = (
    "24>21:+33-75;+42|+66-18;-18|+42-6;*360|/15;21>24:+30-78;+42|+63-21/2;-18|+39-3;*360|"
    ";>24,21:+45-3*504;+42|+12-96;-18|+36-72*3!"
)


def task_of(most=1_000, false_claims=0.0):
    solver = SolverConfig(
        search="bidirectional",
        parent_beam=6,
        parent_beam_low=6,
        max_children=6,
        condition=0.0,
        max_intermediate=most,
        false_claims=false_claims,
    )
    return countdown(None, solver, children=6, depth=1)


def threads(root):
    """The threads of a tree as the checker takes them: the root has no prompt."""
    yield Thread("", root.body, root.answer)
    yield from flatten(root)[1:]


@pytest.mark.parametrize("most", [0, 150, 1_000])
def test_demonstrations_have_no_fault_and_their_hits_are_found(most):
    task = task_of(most)
    hits = 0
    for seed in range(60):
        problem = draw(CountdownConfig(), seed)
        for method in ("apr", "sos+"):
            for thread in threads(task.demonstrate(problem, method, seed)):
                reading = task.diagnose(problem, thread)
                assert reading.faults == (), (problem, thread)
                if not any(isinstance(part, Spawn) for part in thread.body):
                    assert reading.found == bool(thread.answer)
                    hits += reading.found
                if not most and thread.prompt:
                    assert reading.hopeful == bool(thread.answer)
    assert hits > 150


def test_a_false_claim_is_a_fault_of_its_child_and_loses_nothing():
    task = task_of(false_claims=1.0)
    false = 0
    for seed in range(60):
        problem = draw(CountdownConfig(), seed)
        root = task.demonstrate(problem, "apr", seed)
        for thread in threads(root):
            reading = task.diagnose(problem, thread)
            is_false = thread.prompt and thread.answer
            is_false = is_false and not task.score(problem, thread.answer).correct
            false += bool(is_false)
            assert [fault.kind for fault in reading.faults] == ["arithmetic"] * bool(is_false)
    assert false > 40


def read(text, prompt=MESSAGE, answer="", cut=False, problem=PROBLEM):
    reading = task_of().diagnose(problem, Thread(prompt, (text,) if text else (), answer), cut)
    return [(fault.kind, fault.decisive) for fault in reading.faults], reading.found


@pytest.mark.parametrize(
    ("right", "wrong", "kinds"),
    [
        ("", "", []),
        ("+90", "+91", [("arithmetic", False)]),
        ("-40-146", "-41-146", [("arithmetic", True)]),  # 40 is needed, and can be made.
        ("-40-146", "-40-147", [("arithmetic", False)]),
        ("-40-146", "-146", [("arithmetic", True)]),
        ("-86", "-86!", [("arithmetic", True)]),  # No hit: what follows is lost.
        ("/44", "/44/2", [("arithmetic", False)]),
        ("*40!", "*41!", [("arithmetic", False), ("arithmetic", True)]),
        ("*40!", "*40", [("arithmetic", True)]),
        ("*40!", "", [("arithmetic", True)]),
        ("-20|+22-18*40!", "-30|+32-28*60", [("arithmetic", True)]),  # Believed from there on.
        ("2>93", "2>94", [("bookkeeping", False)] * 3 + [("bookkeeping", True)]),
        ("2>93", "93>2", [("arithmetic", False)] * 8 + [("bookkeeping", True)]),
        ("2>93:-40-146;", "", [("bookkeeping", False)] * 2 + [("bookkeeping", True)]),
        (";-20|+22-18*40!", "", [("bookkeeping", True)]),
        (";+88", ";x;+88", [("bookkeeping", True)]),
        ("+88|+90", "+88+90", [("bookkeeping", True)]),  # Nobody knows where its trials begin.
    ],
)
def test_slips_of_a_child(right, wrong, kinds):
    assert right in TRACE
    assert read(TRACE.replace(right, wrong, 1))[0] == kinds


@pytest.mark.parametrize(
    ("right", "wrong", "kinds"),
    [
        ("", "", []),
        ("*504", "*503", [("arithmetic", False)]),
        ("-3*504", "-4*504", [("arithmetic", True)]),  # 3 would have been found.
        ("*3!", "*3", [("arithmetic", True)]),
        (";-18|+36-72*3!", "", [("bookkeeping", True)]),
        (">24,21:", ">24,20:", [("bookkeeping", False)] * 3 + [("bookkeeping", True)]),
        (LATE_TRACE[LATE_TRACE.index(";>") :], "", [("bookkeeping", True)]),
        # Nothing is lost in the other sections.
        (LATE_TRACE[: LATE_TRACE.index(">24,")], "", []),
    ],
)
def test_slips_in_other_sections(right, wrong, kinds):
    assert right in LATE_TRACE
    text = LATE_TRACE.replace(right, wrong)
    assert read(text, LATE_MESSAGE, problem=LATE)[0] == kinds


def test_a_slip_that_all_sections_repeat_counts_once_and_where_it_lost_something():
    text = LATE_TRACE.replace("-18|", "-28|")
    # What is made with 28 is right.
    text = text.replace("+42-6", "+52-4").replace("+39-3", "+49-7").replace("+36-72*3!", "+26-82")
    kinds = [("arithmetic", False), ("arithmetic", True)]
    assert read(text, LATE_MESSAGE, problem=LATE)[0] == kinds


def test_a_hit_is_found_and_half_a_piece_is_no_fault():
    assert read(TRACE) == ([], True)
    assert read(LATE_TRACE, LATE_MESSAGE, problem=LATE) == ([], True)
    assert read("2>93:-40-146;+88|+90-8", cut=True) == ([], False)
    assert read("2>93:-40-1", cut=True) == ([], False)
    assert read(TRACE, prompt="54-34,2,93:53") == ([], False)  # Its parent's fault.


def test_a_serial_thread_may_reject_what_is_false_and_nothing_else():
    start = f"54,34>2,93;{TRACE}"
    assert read(start + "20,40,53!", prompt="", answer="?") == ([], True)
    assert read(start + "20,41", prompt="", answer="?") == ([("check", True)], False)
    slip = start.replace("+22", "+40!20,22")
    assert read(slip + "20,40,53!", prompt="", answer="?") == ([], True)
    unseen = start.replace("+22", "+40!20,40,53!")
    assert read(unseen + "20,40,53!", prompt="", answer="?")[0] == [("arithmetic", False)]


@pytest.mark.parametrize(
    ("message", "kinds"),
    [
        ("54,34>2,93:53", []),
        ("34,54>93,2:53", []),
        ("54,34>2,93:52", [("message", True)]),
        ("54,34>2,92:53", [("message", True)]),
        ("54,34,2,93:53", [("message", True)]),
        ("", [("message", True)]),
    ],
)
def test_messages_are_pairs_of_the_problem(message, kinds):
    """A wrong one is decisive if a pair that leads to a solution has no child."""
    body = (Spawn((Thread(message, (), ""),)), "20,41;20,40,53!")
    reading = task_of().diagnose(PROBLEM, Thread("", body, "?"))
    assert [(fault.kind, fault.decisive) for fault in reading.faults] == kinds


def test_checks_of_a_root_have_their_form():
    for text, kinds in (("20,40,53!", []), ("20;21", []), ("20,!", ["bookkeeping"])):
        body = (Spawn((Thread(MESSAGE, (), ""),)), text)
        reading = task_of().diagnose(PROBLEM, Thread("", body, "?"))
        assert [fault.kind for fault in reading.faults] == kinds


@pytest.mark.parametrize(
    ("texts", "faults"),
    [
        (("20,41;20,",), 0),
        (("20,;20,",), 1),  # Only the last piece may be half a check, though both are equal.
        (("20,", "20,"), 1),  # So may only the last of two equal texts.
    ],
)
def test_only_the_last_check_of_a_cut_root_may_be_half(texts, faults):
    body = (Spawn((Thread(MESSAGE, (), ""),)), *texts)
    reading = task_of().diagnose(PROBLEM, Thread("", body, ""), cut=True)
    assert [fault.kind for fault in reading.faults] == ["bookkeeping"] * faults


def test_only_the_last_text_of_a_cut_child_may_end_in_half_a_piece():
    half = "93>2:+51-55/106;x"
    reading = task_of().diagnose(PROBLEM, Thread(MESSAGE, (half, half), ""), cut=True)
    assert [fault.kind for fault in reading.faults] == ["bookkeeping"]


def test_no_text_makes_it_raise():
    task = task_of()
    rng = random.Random(0)
    for _ in range(500):
        broken = list(TRACE + "20,40,53!")
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice("0123456789+-*/,:;>=|!#<x")
        prompt = rng.choice(["", MESSAGE, "x", "1,2>3,4:5", "0,0>0,0:0"])
        task.diagnose(PROBLEM, Thread(prompt, ("".join(broken),), ""), rng.random() < 0.5)
    huge = "9" * 400
    task.diagnose(PROBLEM, Thread(MESSAGE, (f"{huge}>{huge}:+{huge};+{huge}|+{huge}!",), ""))
    task.diagnose(PROBLEM, Thread(f"{'9' * 40},{'8' * 40}>1,0:{'7' * 40}", (TRACE,), ""))
