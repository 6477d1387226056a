"""The checker against every demonstration, which it must find faultless, and against slips made by
hand, one a kind.
"""

import random

import pytest
from helpers.puzzles import countdown

from apr_jax.tasks import Spawn, Thread
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.problems import draw
from apr_jax.tasks.countdown.puzzle import Puzzle, make_problem
from apr_jax.tasks.countdown.solvers import METHODS

PROBLEM = make_problem("p", (22, 26, 2, 7), 46)


def threads(thread, root=True):
    """The thread and all below, as the checker takes them: the root has no prompt."""
    yield Thread("" if root else thread.prompt, thread.body, thread.answer)
    for part in thread.body:
        if isinstance(part, Spawn):
            for child in part.children:
                yield from threads(child, root=False)


SOLVERS = [
    SolverConfig(),
    SolverConfig(
        shuffle=False, parent_beam=12, parent_beam_low=10, max_children=12, spawn_probability=0.9
    ),
    SolverConfig(
        parent_beam=22,
        parent_beam_low=22,
        child_beam=22,
        max_children=22,
        spawn_probability=1.0,
        shuffle=False,
        max_intermediate=200,
    ),
]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("numbers", [3, 4])
def test_demonstrations_have_no_fault_and_their_hits_are_found(solver, numbers):
    task = countdown(CountdownConfig(numbers=numbers), solver)
    read = hits = 0
    for seed in range(60):
        problem = draw(task.config, seed)
        for method in METHODS:
            for thread in threads(task.demonstrate(problem, method, seed)):
                found = task.diagnose(problem, thread)
                read += 1
                hits += found.found
                assert found.faults == (), (problem, thread)
                if not any(isinstance(part, Spawn) for part in thread.body):
                    at_once = f"={Puzzle.of(problem).target}" in "".join(thread.body)
                    assert found.found == bool(thread.answer) or at_once
    assert read > 250 and hits > 60


def kinds(*body, prompt="", answer="", cut=False):
    reading = countdown(CountdownConfig()).diagnose(PROBLEM, Thread(prompt, body, answer), cut)
    return [fault.kind for fault in reading.faults]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("22,26:2,7|+48;48,7:2|+55+57-53*|-41", []),
        ("22,26:2,7|+49", ["arithmetic"]),
        ("22,26:2,7|*572|/1", ["arithmetic"]),  # 26 by 22 is not exact.
        ("22,26:2,7|+48;48,2:7|+50+57-43*", []),
        ("22,26:2,7|+48;48,2:7|+50+58", ["arithmetic"]),
        ("22,26:2,7|+48;48,2:7|-46+53-39!", ["arithmetic"]),  # No hit.
        ("22,26:2,8|+48", ["bookkeeping"]),  # A number was made up.
        ("22,26:2|+48", ["bookkeeping"]),  # A number was lost.
        ("22,26:2,7|+48;>48,2,7;48,2:7|-46", []),
        ("22,26:2,7|+48;48,2:7|+50/", ["arithmetic"]),  # 50 by 7 is not exact.
        ("22,26:2,7|+48+50", ["bookkeeping"]),  # Three numbers cannot be combined to one.
        ("22,26:2,7|+48;>49,2,7", ["bookkeeping"]),
        ("22,26:2,7|+48;+", ["bookkeeping"]),
        ("=48", ["bookkeeping"]),  # A root was told no step.
        # Counts once; what follows from it is believed.
        (
            "22,26:2,7|+49;49,7:2|+56",
            ["arithmetic"],
        ),
    ],
)
def test_slips_of_a_serial_trace(text, expected):
    assert kinds(text, answer="?") == expected


def test_the_end_of_a_cut_trace_is_no_fault():
    assert kinds("22,26:2,7|+48;48,7", cut=True) == []
    assert kinds("22,26:2,7|+48;48,7", answer="?") == ["bookkeeping"]


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("22+26,2,7:46", None),
        ("22+26,2,7:47", "message"),
        ("22+26,2:46", "message"),
        ("22+25,2,7:46", "message"),
        ("22/26,2,7:46", "message"),
        ("22+26", "message"),
        ("", "message"),
        ("22+26=48;48+2,7:46", "bookkeeping"),  # Right, but the parent never came to 48,2,7.
        ("22+26=49;49+2,7:46", "message"),
    ],
)
def test_messages_follow_from_the_parents_state(message, kind):
    child = Thread(message, (), "")
    assert kinds(Spawn((child,)), answer="?") == [kind] * (kind is not None)


def test_a_message_below_a_queued_state():
    child = Thread("22+26=48;48+2,7:46", (), "")
    assert kinds("22,26:2,7|+48;>48,2,7", Spawn((child,)), answer="?") == []


def test_a_child_works_out_its_result():
    child = {"prompt": "22+26,2,7:46", "answer": "?"}
    assert kinds("=48;48,7:2|+55|-41", **child) == []
    assert kinds("=49;49,7:2|+56", **child) == ["arithmetic"]
    assert kinds("48,7:2|+55;=48", **child) == []
    assert kinds("=48;=48", **child) == ["bookkeeping"]


def test_what_a_thread_without_an_answer_left_behind():
    """48 and 2 make 46: a child that ends without a word of it has overlooked the hit."""
    task = countdown(CountdownConfig())
    problem = make_problem("p", (22, 26, 2), 46)
    overlooked = task.diagnose(problem, Thread("22+26,2:46", ("=48",), ""))
    assert [(fault.kind, fault.decisive) for fault in overlooked.faults] == [("arithmetic", True)]
    assert not overlooked.found and overlooked.hopeful
    seen = task.diagnose(problem, Thread("22+26,2:46", ("=48+50-46!",), "22+26=48,48-2=46"))
    assert seen.found and seen.faults == ()
    hopeless = task.diagnose(problem, Thread("22*26,2:46", ("=572",), ""))
    assert not hopeless.hopeful and hopeless.faults == ()


def test_fault_losing_a_solvable_state_is_decisive():
    """A state is solvable if it could make the target."""
    task = countdown(CountdownConfig())
    problem = make_problem("p", (22, 26, 2), 46)
    lost, idle = (
        task.diagnose(problem, Thread("", (text,), "?")).faults
        for text in ("22,26:2|+49", "22,2:26|*45")
    )
    assert [fault.decisive for fault in lost] == [True]
    assert [fault.decisive for fault in idle] == [False]  # 44 and 26 make no 46.


def test_no_text_makes_it_raise():
    task = countdown(CountdownConfig())
    rng = random.Random(0)
    demonstration = task.demonstrate(PROBLEM, "sos+", 3)
    text = "".join(part for part in demonstration.body if isinstance(part, str))
    for _ in range(500):
        broken = list(text)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice("0123456789+-*/,:;>=|!#<x")
        task.diagnose(
            PROBLEM,
            Thread(rng.choice(["", "22+26,2,7:46", "x"]), ("".join(broken),), ""),
            rng.random() < 0.5,
        )
    huge = "9" * 400
    task.diagnose(
        PROBLEM,
        Thread(
            "", (f"{huge},1:2|+3;0,0:0|/0;>{huge}", Spawn((Thread(f"1+{huge}:46", (), ""),))), ""
        ),
    )


def test_traces_of_the_published_form_are_not_read():
    assert (
        countdown(CountdownConfig(), SolverConfig(render="sos")).diagnose(
            PROBLEM, Thread("", ("x",), "")
        )
        is None
    )
