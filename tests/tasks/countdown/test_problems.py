"""Brute force, the space of problems, and the split."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.puzzles import countdown

from apr_jax.errors import UsageError
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.problems import (
    draw,
    enumerate_keys,
    is_enumerable,
    reachable,
    solve,
    split_problems,
)
from apr_jax.tasks.countdown.puzzle import Puzzle, make_problem, problem_key

NANO = CountdownConfig(numbers=3, low=1, high=30, target_low=10, target_high=100)
MINI = CountdownConfig()


def numbers_of(problems):
    return {tuple(sorted(Puzzle.of(problem).numbers)) for problem in problems}


def naive(numbers):
    """Every value that all the numbers make: pick two, combine, go on.

    The twin of the tables over subsets.
    """
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a = numbers[i]
        b = numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        results = [a + b, a * b] + [a - b] * (a >= b) + ([a // b] if b and a % b == 0 else [])
        for result in results:
            found |= naive([result, *rest])
    return found


@pytest.mark.parametrize(
    "numbers",
    [
        (7,),
        (5, 5),
        (6, 3),
        (22, 26, 2),
        (1, 1, 1),
        (8, 8, 3, 3),
        (99, 1, 50, 2),
        (4, 4, 4, 4),
        (3, 17, 6, 90),
        (3, 5, 7, 11, 13),
    ],
)
def test_reachable_is_what_picking_pairs_finds(numbers):
    assert set(reachable(numbers)) == naive(list(numbers))


def test_solve_gives_a_path_iff_there_is_one():
    task = countdown(MINI)
    for seed in range(30):
        problem = draw(MINI, seed)
        made = naive(list(Puzzle.of(problem).numbers))
        for target in range(1, 101, 7):
            path = solve(Puzzle.of(problem).numbers, target)
            assert (path is not None) == (target in made)
            if path is not None:
                assert task.score(
                    make_problem("p", Puzzle.of(problem).numbers, target), ",".join(path)
                ).correct


def test_nano_has_33298_problems():
    keys = enumerate_keys(NANO)
    assert len(keys) == len(set(keys)) == 33_298
    assert all(list(numbers) == sorted(numbers) for numbers, _ in keys)
    assert is_enumerable(NANO) and not is_enumerable(MINI)


def test_nano_split_is_whole_and_disjoint():
    split = split_problems(NANO, train=10**6, heldout=1_000, seed=3)
    keys = [
        problem_key(problem)
        for part in (split.train, split.validation, split.test)
        for problem in part
    ]
    assert len(split.validation) == len(split.test) == 1_000
    train, validation, test = map(numbers_of, (split.train, split.validation, split.test))
    assert not train & validation and not train & test and not validation & test
    # All others train, but for what the last multiset of each part has too much.
    assert len(keys) == len(set(keys)) and 33_298 - 2 * 18 <= len(keys) <= 33_298
    assert len(train | validation | test) == len(
        numbers_of(make_problem("", *key) for key in enumerate_keys(NANO))
    )
    assert len(numbers_of(split.test[:250])) > 0.8 * len(test), "few problems have many numbers"
    shown = [Puzzle.of(problem).numbers for problem in split.train]
    assert sum(list(numbers) == sorted(numbers) for numbers in shown) < 0.3 * len(shown)
    assert split == split_problems(NANO, train=10**6, heldout=1_000, seed=3)
    assert split.test != split_problems(NANO, train=10**6, heldout=1_000, seed=4).test


def test_held_out_numbers_are_like_the_others():
    """Those with many targets are not preferred: the mean of targets a multiset is 6.7 in the whole
    space.
    """
    split = split_problems(NANO, train=10**6, heldout=3_000)
    for part in (split.train, split.validation, split.test):
        assert len(part) / len(numbers_of(part)) == pytest.approx(6.72, abs=0.4)


@pytest.mark.parametrize(("config", "train"), [(NANO, 10**6), (MINI, 200)])
def test_excluded_problems_occur_nowhere(config, train):
    before = split_problems(config, train=train, heldout=50, seed=1)
    exclude = {problem_key(problem) for problem in before.train[:40] + before.test[:3]}
    after = split_problems(config, train=train, heldout=50, seed=1, exclude=exclude)
    keys = [
        problem_key(problem)
        for part in (after.train, after.validation, after.test)
        for problem in part
    ]
    assert not exclude & set(keys) and len(keys) == len(set(keys))
    # Nothing else moves.
    assert after.validation == before.validation


@pytest.mark.parametrize(("config", "train"), [(NANO, 10**6), (MINI, 200)])
def test_a_split_apart_from_numbers_has_them_nowhere(config, train):
    before = split_problems(config, train=train, heldout=50, seed=1)
    apart_from = numbers_of(before.train[:40] + before.test[:3])
    after = split_problems(config, train=train, heldout=50, seed=1, apart_from=apart_from)
    assert not apart_from & numbers_of([*after.train, *after.validation, *after.test])
    assert len(after.test) == len(after.validation) == 50
    assert after.validation == before.validation


# 10,626 multisets: not listed.
SAMPLED = CountdownConfig(numbers=4, low=1, high=21, target_low=10, target_high=12)


def test_sampled_split_is_disjoint_and_solvable():
    """It is the same on any number of workers."""
    assert not is_enumerable(SAMPLED)
    config = SAMPLED
    split = split_problems(config, train=300, heldout=50)
    problems = split.train + split.validation + split.test
    assert len(problems) == len({problem_key(problem) for problem in problems}) == 400
    train, validation, test = map(numbers_of, (split.train, split.validation, split.test))
    assert not train & validation and not train & test and not validation & test
    assert len({problem.id for problem in problems}) == 400
    assert all(solve(Puzzle.of(problem).numbers, Puzzle.of(problem).target) for problem in problems)
    with ThreadPoolExecutor(3) as pool:
        assert split == split_problems(config, train=300, heldout=50, map_draws=pool.map)


def test_problem_with_heldout_numbers_is_replaced_in_place():
    """The sequence that is drawn, by problem alone: no test problem moves, and all others keep
    their places.
    """
    rng = random.Random("draws 5")
    sequence = {}
    while len(sequence) < 1_200:
        problem = draw(SAMPLED, rng.getrandbits(62))
        sequence.setdefault(problem_key(problem), problem)
    drawn = list(sequence.values())
    # So many are held out that a replacement, too, would often have their numbers if nobody looked.
    split = split_problems(SAMPLED, train=600, heldout=300, seed=5)
    held = set()
    replaced = []
    for part, old in (
        (split.test, drawn[300:600]),
        (split.validation, drawn[:300]),
        (split.train, drawn[600:]),
    ):
        keeps = [not numbers_of([problem]) & held for problem in old]
        assert keeps == [one == other for one, other in zip(shown(part), shown(old), strict=True)]
        assert not numbers_of(part) & held
        held |= numbers_of(part)
        replaced.append(keeps.count(False))
    assert replaced[0] == 0 < replaced[1] < replaced[2] < 120


def shown(problems):
    """Without their names."""
    return [(Puzzle.of(problem).numbers, Puzzle.of(problem).target) for problem in problems]


def test_too_much_asked_of_a_small_space():
    tiny = CountdownConfig(numbers=2, low=1, high=4, target_low=10, target_high=20)
    with pytest.raises(UsageError, match=r"data\.heldout=50: the task has only 2 problems"):
        split_problems(tiny, train=10, heldout=50)
    # Numbers 1..3: eleven problems, but only four multisets.
    four = CountdownConfig(numbers=3, low=1, high=3, target_low=10, target_high=100)
    assert len(numbers_of(split_problems(four, train=10, heldout=2).train)) == 2
    with pytest.raises(
        UsageError, match=r"data\.heldout=5: the task has only 11 problems .* share no numbers"
    ):
        split_problems(four, train=10, heldout=5)
    impossible = CountdownConfig(
        numbers=2, low=1, high=200, target_low=999_999, target_high=999_999
    )
    with pytest.raises(UsageError, match="found no 2 numbers in 1..200 that make 999999"):
        split_problems(impossible, train=1, heldout=1)
