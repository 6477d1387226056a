"""Countdown with all solutions: which there are, how they are demonstrated, what an answer earns,
and what is wrong in a trace.
"""

import collections
import itertools
import random

import pytest

from apr_jax.errors import UsageError
from apr_jax.tasks import Bounds, Problem, Spawn, TaskConfig, Thread, flatten, make_task
from apr_jax.tasks.countdown.all_solutions import all_solutions, count_solutions, solution_of
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.problems import draw, numbers_of, split_problems
from apr_jax.tasks.countdown.puzzle import Puzzle, make_problem


def task(**settings):
    return make_task(TaskConfig("countdown", solutions="all", **settings))


def brute_force(numbers):
    """Target -> the solutions as multisets of equations, over ordered pairs of places."""
    solutions = collections.defaultdict(set)

    def search(left, equations):
        if len(left) == 1:
            solutions[left[0]].add(frozenset(collections.Counter(equations).items()))
            return
        for i, j in itertools.permutations(range(len(left)), 2):
            x, y = left[i], left[j]
            rest = [left[k] for k in range(len(left)) if k not in (i, j)]
            made = {f"{min(x, y)}+{max(x, y)}": x + y, f"{min(x, y)}*{max(x, y)}": x * y}
            if x >= y:
                made[f"{x}-{y}"] = x - y
            if x >= y > 0 and x % y == 0:
                made[f"{x}/{y}"] = x // y
            for text, result in made.items():
                search([*rest, result], [*equations, f"{text}={result}"])

    search(list(numbers), [])
    return solutions


@pytest.mark.parametrize("count", [2, 3, pytest.param(4, marks=pytest.mark.thorough)])
def test_solutions_are_those_of_brute_force(count):
    rng = random.Random(count)
    for _ in range(40 if count < 4 else 12):
        # Small numbers, which often repeat, and a zero on the way.
        numbers = tuple(rng.randint(1, 9) for _ in range(count))
        expected = brute_force(numbers)
        assert count_solutions(numbers) == {
            target: len(solutions) for target, solutions in expected.items()
        }
        for target, solutions in expected.items():
            written = {
                frozenset(
                    collections.Counter(
                        f"{min(a, b)}{op}{max(a, b)}={result}"
                        if op in "+*"
                        else f"{a}{op}{b}={result}"
                        for a, op, b, result in solution
                    ).items()
                )
                for solution in all_solutions(numbers, target)
            }
            assert written == solutions


def test_order_of_equations_and_operands_makes_no_other_solution():
    first = [(1, "+", 2, 3), (4, "-", 3, 1)]
    assert solution_of(first) == solution_of([(4, "-", 3, 1), (2, "+", 1, 3)])
    # By another number on the way.
    assert solution_of([(1, "+", 2, 3), (3, "+", 4, 7)]) != solution_of(
        [(2, "+", 4, 6), (6, "+", 1, 7)]
    )
    assert count_solutions((1, 2, 4))[7] == 4
    # Equal numbers: nobody can say which of them was taken.
    assert len(all_solutions((3, 3, 4), 10)) == len(brute_force((3, 3, 4))[10])


@pytest.mark.parametrize("numbers", [2, 3, 4])
@pytest.mark.parametrize("method", ["serial", "parallel"])
def test_demonstrations_find_all_and_nothing_else(numbers, method):
    own = task(numbers=numbers, high=12, target_low=2, target_high=12)
    for seed in range(12):
        problem = own.draw(seed)
        thread = own.demonstrate(problem, method, seed)
        score = own.score(problem, thread.answer)
        assert score.correct and score.reward == 1 and score.reason == ""
        threads = flatten(thread)
        assert (len(threads) > 1) == (method == "parallel" and numbers > 2)
        for k, one in enumerate(threads):
            shown = Thread("", one.body, one.answer) if k == 0 else one
            diagnosis = own.diagnose(problem, shown)
            assert diagnosis.faults == (), (problem, one)
            assert set("".join((one.prompt, one.answer))) <= set(own.alphabet)
        # The root joins each solution once, those of the first child first.
        joined = [part for one in threads[1:] for part in one.answer.split(";") if part]
        if joined:
            assert set(thread.answer.split(";")) <= set(joined)
            assert list(dict.fromkeys(thread.answer.split(";"))) == thread.answer.split(";")


def test_reward_is_the_share_of_all_solutions():
    own = task()
    problem = make_problem("x", (1, 2, 4), 7)
    ways = ["1+2=3,3+4=7", "1+4=5,5+2=7", "2+4=6,6+1=7", "2*4=8,8-1=7"]
    for k in (1, 2, 3, 4):
        score = own.score(problem, ";".join(ways[:k]))
        assert (score.reward, score.correct) == (k / 4, k == 4)
        assert score.reason == ("" if k == 4 else f"{k} of 4 solutions")
    # The same solutions in other words: no more, and the same vote.
    again = own.score(problem, f"3+4=7,2+1=3;{';'.join(ways)}")
    assert not again.correct and again.reason == "3+4=7: 3 is not there"
    again = own.score(problem, "2+1=3,4+3=7;1+4=5,2+5=7;01+2=3,4+3=7;4+2=6,6+1=7;4*2=8,8-1=7")
    assert again.correct and again.vote == own.score(problem, ";".join(reversed(ways))).vote


def test_what_is_no_solution_costs_as_much_as_one_that_is_missing():
    own = task()
    problem = make_problem("x", (1, 2, 4), 7)
    right = "1+2=3,3+4=7;1+4=5,5+2=7;2+4=6,6+1=7;2*4=8,8-1=7"
    for wrong in ("", "1*2=2,2+4=6", "1+2=3", "x", "1+2=3,3+4=8"):
        score = own.score(problem, f"{right};{wrong}")
        assert (score.reward, score.correct) == (0.8, False)
        assert own.score(problem, f"{right};{wrong};{wrong}").reward == 0.8
        assert own.score(problem, wrong).reward == 0
    # The verifier of single solutions lets 0 be divided; no demonstration does.
    zero = make_problem("x", (3, 3, 5, 7), 7)
    assert own.score(zero, "3-3=0,0/5=0,0+7=7").reason == "3-3=0,0/5=0,0+7=7: divides 0"
    # Whoever states all that can be written down does not win.
    everything = [
        f"{a}{f}{b}={r},{r}{g}{c}=7"
        for a, b, c in itertools.permutations((1, 2, 4))
        for f, g in itertools.product("+-*", repeat=2)
        for r in [{"+": a + b, "-": a - b, "*": a * b}[f]]
    ]
    score = own.score(problem, ";".join(everything))
    assert not score.correct and score.reward < 0.1


@pytest.mark.parametrize("answer", [";" * 100_000, "1+2=3;" * 20_000, "9" * 500_000, "٣+1=4"])
def test_hostile_answers_are_wrong_and_quick(answer):
    score = task().score(make_problem("x", (1, 2, 4), 7), answer)
    assert not score.correct and score.reward == 0


def test_problems_have_as_many_solutions_as_are_asked_for():
    config = CountdownConfig(numbers=3, high=9, target_high=20, solutions="all", least_solutions=2)
    split = split_problems(config, 60, 10, seed=1)
    problems = [*split.train, *split.validation, *split.test, *(draw(config, k) for k in range(20))]
    for problem in problems:
        puzzle = Puzzle.of(problem)
        assert count_solutions(puzzle.numbers)[puzzle.target] >= 2
    held = {numbers_of(problem) for problem in (*split.validation, *split.test)}
    assert not held & {numbers_of(problem) for problem in split.train}
    with pytest.raises(UsageError, match=r"task.least_solutions=99: found no 2 numbers"):
        draw(
            CountdownConfig(
                numbers=2, target_low=30, target_high=30, solutions="all", least_solutions=99
            ),
            0,
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"numbers": 5}, "task.numbers=5 must be at most 4"),
        ({"solver": {"render": "sos"}}, "task.solver.render='sos' must be 'compact'"),
        (
            {"solver": {"condition": 0.0}},
            "task.solver.condition=0.0 must be 0.5, its default, with",
        ),
        ({"least_solutions": 0}, "task.least_solutions=0 must be at least 1"),
        ({"solutions": "one", "least_solutions": 2}, "must be 1 with task.solutions='one'"),
        ({"solutions": "some"}, "task.solutions"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        TaskConfig("countdown", **({"solutions": "all"} | settings))


def test_problems_of_too_many_numbers_are_refused():
    own = task()
    with pytest.raises(UsageError, match="has 5 numbers, must be 2 to 4"):
        own.parse("1 2 3 4 5 -> 15")
    with pytest.raises(ValueError, match='"numbers" has 5 numbers, must be 2 to 4'):
        own.check(Problem("x", {"numbers": [1, 2, 3, 4, 5], "target": 15}))


def faults(problem, thread, cut=False):
    diagnosis = task().diagnose(problem, thread, cut)
    return [(fault.kind, fault.text) for fault in diagnosis.faults]


def test_what_a_serial_thread_overlooks_is_told():
    own = task()
    problem = make_problem("x", (1, 2, 4), 7)
    thread = own.demonstrate(problem, "serial", 0)
    (text,) = thread.body
    ways = thread.answer.split(";")

    def told(text, answer=thread.answer, cut=False):
        return faults(problem, Thread("", (text,), answer), cut)

    assert told(text) == []
    # A hit without its mark.
    assert told(text.replace("7!", "7", 1)) == [("arithmetic", "4+3=7: not marked")]
    # A successor that leads on, and another one that does not.
    group, _, rest = text.partition(";")
    assert told(f"{group.replace('|+3+7!-1*', '')};{rest}") == [
        ("bookkeeping", "1,2,4: 2+1 not tried")
    ]
    # An answer without one of the solutions that were found; the same, if it was cut there.
    assert told(text, ";".join(ways[:2])) == [("answer", ";".join(ways[:2]))]
    assert told(text, "", cut=True) == []
    # A slip counts once, whatever follows from it.
    assert told(text.replace("|+3+7!", "|+4+8", 1), ";".join(ways[1:]))[0][0] == "arithmetic"
    assert own.diagnose(problem, Thread("", (text,), ""), False).found


def test_what_threads_of_a_tree_overlook_is_told():
    own = task()
    problem = make_problem("x", (1, 2, 4), 7)
    thread = own.demonstrate(problem, "parallel", 0)
    (spawn,) = thread.body
    children = list(spawn.children)

    def root(kept):
        return Thread("", (Spawn(tuple(Thread(c.prompt, (), "") for c in kept)),), thread.answer)

    assert faults(problem, root(children)) == []
    useful = [child for child in children if child.answer]
    for child in useful:
        others = [one for one in children if one is not child]
        ((kind, text),) = faults(problem, root(others))
        assert kind == "bookkeeping" and text.endswith("not tried")
    useless = next(child for child in children if not child.answer)
    assert faults(problem, root([one for one in children if one is not useless])) == []

    child = useful[0]
    assert faults(problem, Thread(child.prompt, child.body, "")) == [("answer", "")]
    assert faults(problem, Thread(child.prompt, child.body, f"{child.answer};{useful[1].answer}"))
    assert own.diagnose(problem, child, False).hopeful
    assert not own.diagnose(problem, useless, False).hopeful


@pytest.mark.parametrize("seed", range(3))
def test_any_text_is_read_without_an_error(seed):
    own = task(numbers=4, high=9)
    rng = random.Random(seed)
    problem = own.draw(seed)
    threads = flatten(own.demonstrate(problem, "parallel", 0))
    for _ in range(60):
        one = rng.choice(threads)
        body = [
            "".join(rng.choice((c, c, c, rng.choice(own.alphabet), "")) for c in part)
            for part in one.body
            if isinstance(part, str)
        ]
        answer = "".join(rng.choice((c, rng.choice(own.alphabet))) for c in one.answer)
        diagnosis = own.diagnose(problem, Thread(one.prompt, tuple(body), answer), False)
        assert all(fault.kind in own.fault_kinds for fault in diagnosis.faults)


def test_bounds_and_conditions_change_no_demonstration():
    own = make_task(TaskConfig("countdown", solutions="all", numbers=3))
    bounded = make_task(own_config := TaskConfig("countdown", solutions="all", numbers=3))
    bounded.bounds = Bounds(window=20, children=2)
    problem = own.draw(3)
    assert own_config.options.solver.condition > 0
    assert all(method.condition is None for method in own.methods.values())
    for method in own.methods:
        thread = own.demonstrate(problem, method, 1)
        assert thread == bounded.demonstrate(problem, method, 9) and thread.condition is None
