"""Nested APR: children spawn as deep as the limits let them, within one budget, and everything
still joins up.
"""

import random

import pytest
from helpers.puzzles import countdown

from apr_jax.tasks import Spawn, flatten
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.events import Fork, Generate, children
from apr_jax.tasks.countdown.problems import draw, reachable, solve
from apr_jax.tasks.countdown.puzzle import Puzzle, make_problem
from apr_jax.tasks.countdown.solvers import Plan, draw_plan, search

MINI = CountdownConfig()
FIVE = CountdownConfig(numbers=5, high=25)


def depth_of(thread):
    below = [child for part in thread.body if isinstance(part, Spawn) for child in part.children]
    return 1 + max(map(depth_of, below)) if below else 0


def spawns_of(thread):
    return [part for one in flatten(thread) for part in one.body if isinstance(part, Spawn)]


@pytest.mark.parametrize("render", ["compact", "sos"])
@pytest.mark.parametrize(("config", "max_depth"), [(MINI, 2), (FIVE, 2), (FIVE, 3)])
def test_trees_grow_exactly_to_the_limits(config, max_depth, render):
    """They become as deep and as wide as allowed, and no further."""
    solver = SolverConfig(parent_beam=5, child_beam=8, max_children=60, render=render)
    task = countdown(config, solver, children=6, depth=max_depth)
    depths = set()
    most_children = 0
    widest = 0
    for seed in range(80):
        thread = task.demonstrate(draw(config, seed), "apr-nested", seed)
        depths.add(depth_of(thread))
        most_children = max(most_children, len(flatten(thread)) - 1)
        widest = max([widest, *(len(spawn.children) for spawn in spawns_of(thread))])
        for spawn in spawns_of(thread):
            assert len(spawn.children) >= 2
    assert depths >= {0, 1, max_depth} and max(depths) == max_depth
    assert 25 < most_children <= 60
    assert widest == 6


def test_without_room_below_nested_is_apr():
    # The coin is flipped only where a child may spawn, so the same source of chance gives the same
    # search.
    for depth, same in ((1, True), (2, False)):
        solver = SolverConfig(max_children=90)
        alike = True
        for seed in range(20):
            problem = draw(MINI, seed)
            found = []
            for method in ("apr", "apr-nested"):
                rng = random.Random(seed)
                plan = draw_plan(
                    method, solver, rng, conditioned=False, max_spawn=15, max_depth=depth
                )
                found.append(
                    search(Puzzle.of(problem).numbers, Puzzle.of(problem).target, plan, rng)
                )
            alike &= found[0] == found[1]
        assert alike == same


@pytest.mark.parametrize(("budget", "spawning"), [(28, 0), (29, 4), (60, 4)])
def test_a_spawn_divides_what_is_left_evenly(budget, spawning):
    """Four children and their parent share what the first spawn leaves: five for each are needed to
    spawn five.
    """
    plan = Plan("multiply", 4, 5, 1.0, budget, False, max_spawn=12, max_depth=2)
    for seed in range(20):
        found = search((22, 26, 2, 7), 99_991, plan, random.Random(seed))
        (fork,) = (event for event in found.events if isinstance(event, Fork))
        assert len(fork.children) == 4
        assert (
            sum(isinstance(event, Fork) for child in fork.children for event in child.events)
            == spawning
        )
        assert children(found) == 4 + 5 * spawning


@pytest.mark.parametrize("shuffle", [False, True])
def test_exhaustive_nested_search_solves_what_is_solvable(shuffle):
    task = countdown(FIVE)
    rng = random.Random(5)
    nested = 0
    plan = Plan("multiply", 40, 40, 0.6, 9_999, shuffle, max_spawn=40, max_depth=3)
    for size, count in ((3, 40), (4, 20), (5, 2)):
        for _ in range(count):
            numbers = tuple(rng.randint(1, 25) for _ in range(size))
            target = rng.choice([rng.randint(1, 100), rng.choice(sorted(reachable(numbers)))])
            found = search(numbers, target, plan, rng)
            assert (found.solution is not None) == (solve(numbers, target) is not None)
            nested += children(found) > 40
            if found.solution is not None:
                answer = ",".join(step.equation for step in found.solution)
                assert task.score(make_problem("p", numbers, target), answer).correct
    assert nested > 5


@pytest.mark.parametrize("render", ["compact", "sos"])
def test_messages_carry_paths_and_joins_whole_solutions(render):
    task = countdown(
        MINI, SolverConfig(render=render, max_children=90, condition=0.5), children=15, depth=2
    )
    joined_from = set()
    for seed in range(200):
        problem = draw(MINI, seed)
        root = task.demonstrate(problem, "apr-nested", seed)
        for spawn in spawns_of(root):
            for child in spawn.children:
                if child.answer:
                    first = child.answer.partition(",")[0]
                    # The grandchild's own message is the only place from which it can know the
                    # first step.
                    assert first.partition("=")[0] in child.prompt
                    assert task.score(problem, child.answer).correct
        for one in flatten(root):
            answers = [
                child.answer
                for part in one.body
                if isinstance(part, Spawn)
                for child in part.children
            ]
            if any(answers):
                assert one.answer == next(filter(None, answers))
                joined_from.add(depth_of(one))
            if one.answer:
                assert task.score(problem, one.answer).correct
        if "#" in root.prompt and render == "compact":
            assert int(root.prompt.partition("#")[2]) == len(flatten(root)) - 1
    assert joined_from == {1, 2}


def test_a_child_goes_on_when_its_children_find_nothing():
    """Five numbers: a child dives below one of its nodes, spawns there, and comes back to the
    next.
    """
    plan = Plan("multiply", 3, 3, 0.5, 4_000, False, max_spawn=3, max_depth=3)
    seen = 0
    for seed in range(60):
        found = search(Puzzle.of(draw(FIVE, seed)).numbers, 99_991, plan, random.Random(seed))
        for fork in (event for event in found.events if isinstance(event, Fork)):
            for child in fork.children:
                kinds = [type(event) for event in child.events]
                if Fork in kinds and Generate in kinds[kinds.index(Fork) :]:
                    seen += 1
    assert seen > 10
