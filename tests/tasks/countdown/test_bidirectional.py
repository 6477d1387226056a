"""Search from both ends against brute force: what it finds, what it writes, and what its roots
reject.
"""

import random
import re

import pytest
from helpers.puzzles import countdown

from apr_jax.tasks import Spawn, flatten
from apr_jax.tasks.countdown.bidirectional import check_text, list_pairs, needs, results
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.events import Step
from apr_jax.tasks.countdown.problems import draw, reachable, solve
from apr_jax.tasks.countdown.puzzle import Puzzle, make_problem

ALL = {
    "search": "bidirectional",
    "parent_beam": 6,
    "parent_beam_low": 6,
    "max_children": 6,
    "condition": 0.0,
}
SHOWN = make_problem("shown", (54, 2, 93, 34), 53)


def task_of(children=6, config=None, **changes):
    return countdown(config, SolverConfig(**{**ALL, **changes}), children=children, depth=1)


def problems(count, low=1, high=99):
    """Problems with a solution, and some targets that nothing is known about."""
    config = CountdownConfig(low=low, high=high)
    rng = random.Random(high)
    for seed in range(count):
        problem = draw(config, seed)
        if seed % 3 == 0:
            numbers = Puzzle.of(problem).numbers
            problem = make_problem(problem.id, numbers, rng.randint(1, 100))
        yield problem


@pytest.mark.parametrize("method", ["apr", "sos+"])
@pytest.mark.parametrize("high", [9, 99])
@pytest.mark.parametrize("false_claims", [0.0, 0.5])
def test_it_finds_a_solution_where_there_is_one(method, high, false_claims):
    task = task_of(false_claims=false_claims)
    unsolvable = 0
    for problem in problems(90, high=high):
        puzzle = Puzzle.of(problem)
        answer = task.demonstrate(problem, method, 0).answer
        solvable = solve(puzzle.numbers, puzzle.target) is not None
        unsolvable += not solvable
        assert task.score(problem, answer).correct == solvable
        assert bool(answer) == solvable
    assert unsolvable > 0


def test_a_child_finds_what_its_pair_can_begin():
    task = task_of()
    for problem in problems(60, high=20):
        target = Puzzle.of(problem).target
        root = task.demonstrate(problem, "apr", 0)
        for child in flatten(root)[1:]:
            a, b, c, d = map(int, re.match(r"(\d+),(\d+)>(\d+),(\d+):", child.prompt).groups())
            firsts = [step.result for step in results(a, b)]
            possible = any(target in reachable((first, c, d)) for first in firsts)
            assert bool(child.answer) == possible
            if possible:
                assert task.score(problem, child.answer).correct
                first = re.match(r"(\d+)[+\-*/](\d+)=", child.answer)
                assert {int(first[1]), int(first[2])} == {a, b}


def test_the_traces_of_the_module_docstring():
    task = task_of(max_intermediate=1_000)
    root = task.demonstrate(SHOWN, "apr", 0)
    spawn, check = root.body
    (child,) = (child for child in spawn.children if child.prompt == "54,34>2,93:53")
    found = "2>93:-40-146;+88|+90-86/44;-20|+22-18*40!"
    assert child.body == (found,)
    assert child.answer == root.answer == "54-34=20,20*2=40,93-40=53"
    assert check == "20,40,53!"

    (text,) = task.demonstrate(SHOWN, "sos+", 0).body
    assert text.startswith("54,2>93,34;93>34:+19-87;+56|-37;")
    assert text.endswith(f";54,34>2,93;{found}20,40,53!")
    (text,) = (child.body[0] for child in spawn.children if child.prompt == "54,93>2,34:53")
    assert ";34>2:+51-55/106;" in text and text.endswith("*5022|")
    assert ";>2,34:+36-32*68/17;+147|;-39|+14;" in text


def test_needs_make_the_target():
    for number in range(25):
        for target in (1, 7, 10, 24, 60):
            listed = needs(number, target)
            assert {need.number for need in listed} == {
                other
                for other in range(target * max(number, 1) + 200)
                if target in [step.result for step in results(other, number)]
            }
            for need in listed:
                assert {need.step.a, need.step.b} == {need.number, number}
                assert check_text((need.step,))[1]
            assert needs(number, target, 50) == [need for need in listed if need.number <= 50]


def test_pairs_are_listed_once():
    assert [pair.text for pair in list_pairs((1, 2, 3, 4))] == [
        "1,2>3,4",
        "1,3>2,4",
        "1,4>2,3",
        "2,3>1,4",
        "2,4>1,3",
        "3,4>1,2",
    ]
    assert [pair.text for pair in list_pairs((5, 5, 7, 5))] == ["5,5>7,5", "5,7>5,5"]


def test_the_bound_holds_for_every_number_but_the_first_results():
    task = task_of(max_intermediate=150)
    for problem in problems(40):
        for thread in flatten(task.demonstrate(problem, "apr", 0))[1:]:
            (text,) = thread.body
            for piece in text.split(";"):
                later = piece.partition("|")[2] if piece[0] in "+-*/" else piece
                assert all(int(number) <= 150 for number in re.findall(r"[+\-*/](\d+)", later))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ((Step(54, "-", 34, 20), Step(20, "*", 2, 40), Step(93, "-", 40, 53)), ("20,40,53!", True)),
        ((Step(54, "-", 34, 20), Step(20, "*", 2, 46), Step(99, "-", 46, 53)), ("20,40", False)),
        ((Step(40, "/", 2, 20),), ("40!", True)),  # 2 * 20, which has to be 40.
        ((Step(41, "/", 2, 20),), ("40", False)),
    ],
)
def test_a_check_stops_at_the_first_result_that_does_not_come_out(path, expected):
    assert check_text(path) == expected


def test_roots_reject_false_claims_and_only_these():
    task = task_of(false_claims=1.0)
    false = right = none = 0
    for problem in problems(150):
        root = task.demonstrate(problem, "apr", 0)
        spawn, *rest = root.body
        claims = [child.answer for child in spawn.children if child.answer]
        verdicts = [task.score(problem, claim).correct for claim in claims]
        checks = rest[0].split(";") if rest else []
        read = verdicts.index(True) + 1 if True in verdicts else len(verdicts)
        assert [check.endswith("!") for check in checks] == verdicts[:read]
        assert root.answer == (claims[read - 1] if True in verdicts else "")
        false += verdicts[:read].count(False)
        right += True in verdicts
        none += not claims
    assert false > 100 and right > 90
    assert none < 10


def test_a_serial_search_goes_on_behind_its_slips():
    task = task_of(false_claims=1.0)
    rejected = 0
    for problem in problems(60):
        thread = task.demonstrate(problem, "sos+", 0)
        (text,) = thread.body
        checks = re.findall(r"!([\d,]+!?)", text)
        rejected += sum(not check.endswith("!") for check in checks)
        assert bool(thread.answer) == (bool(checks) and checks[-1].endswith("!"))
    assert rejected > 20


def test_no_child_that_finds_something_slips():
    """So false claims cost no solution, and greedy answers are those without them."""
    clean = task_of()
    slipping = task_of(false_claims=1.0)
    for problem in problems(60):
        answers = [
            [child.answer for child in task.demonstrate(problem, "apr", 0).body[0].children]
            for task in (clean, slipping)
        ]
        for before, after in zip(*answers, strict=True):
            assert not before or after == before


def test_demonstrations_are_functions_of_their_arguments():
    one, other = (task_of(false_claims=0.5, condition=0.5) for _ in range(2))
    for seed in range(20):
        for method in ("apr", "sos+"):
            problem = draw(CountdownConfig(), seed)
            assert one.demonstrate(problem, method, 3) == other.demonstrate(problem, method, 3)


def test_the_beam_is_the_number_of_children_and_prompts_state_it():
    task = task_of(children=5, parent_beam_low=1, condition=0.5)
    counts = set()
    for seed in range(80):
        root = task.demonstrate(draw(CountdownConfig(), seed), "apr", seed)
        children = len(flatten(root)) - 1
        counts.add(children)
        assert root.condition in (None, children)
        assert "#" not in root.prompt or root.prompt.endswith(f"#{children}")
        assert [type(part) for part in root.body[:1]] == [Spawn]
    assert counts == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("config", "solver", "named"),
    [
        ({"numbers": 5}, {}, "task.numbers"),
        ({"solutions": "all"}, {}, "task.solutions"),
        ({}, {"render": "sos"}, "task.solver.render"),
        ({}, {"serial_beam": 15}, "task.solver.serial_beam=15 must be 5, its default, with"),
        ({}, {"depth_first": "near"}, "task.solver.depth_first='near' must be 'beam'"),
        ({}, {"child_beam": 6}, "task.solver.child_beam=6 must be 15"),
        ({}, {"spawn_probability": 1.0}, "task.solver.spawn_probability=1.0 must be 0.5"),
        ({}, {"shuffle": False}, "task.solver.shuffle=False must be True"),
        ({}, {"search": "beam", "false_claims": 0.1}, "task.solver.false_claims"),
        ({}, {"false_claims": 1.5}, "task.solver.false_claims"),
    ],
)
def test_what_does_not_fit_together_is_refused(config, solver, named):
    with pytest.raises(ValueError, match=named):
        CountdownConfig(**config, solver=SolverConfig(**{**ALL, **solver}))
