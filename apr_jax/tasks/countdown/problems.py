"""Which problems there are: solving by brute force, drawing, listing and splitting problems.

A problem is legal if all its numbers together make the target by exact operations without negative
results. Numbers may repeat. Two problems are the same if their sorted numbers and their targets
are equal; the order in which the numbers are shown is random.

A small space of problems is listed whole and split. From a large one, problems are drawn.
"""

import functools
import itertools
import math
import random
from collections.abc import Collection, Iterable

from apr_jax.errors import UsageError
from apr_jax.tasks.base import Map, Problem, Split
from apr_jax.tasks.countdown.all_solutions import count_solutions
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.puzzle import Key, Puzzle, problem_key
from apr_jax.tasks.splits import name_by_place, split_by_draws

# A space with at most so many multisets of numbers is listed, in a second of brute force at most.
_ENUMERABLE = 10_000
_PATIENCE = 10_000  # Draws of numbers before `draw` gives up on a target.

# The values that a subset of the numbers can make. Each value maps to how it was made from two
# disjoint parts of the subset: (a, op, b, part that makes a, part that makes b). A given number has
# None there.
_Table = dict[int, tuple[int, str, int, int, int] | None]


def solve(numbers: Iterable[int], target: int) -> tuple[str, ...] | None:
    """Returns equations that make the target and use every number once; None if there are none."""
    tables = _tables(tuple(numbers))
    everything = len(tables) - 1  # The subset of all numbers.
    if target not in tables[everything]:
        return None
    equations: list[str] = []

    def write(value: int, subset: int) -> None:
        """Appends the equations by which a subset makes a value."""
        origin = tables[subset][value]
        if origin is not None:
            a, op, b, left, right = origin
            write(a, left)
            write(b, right)
            equations.append(f"{a}{op}{b}={value}")

    write(target, everything)
    return tuple(equations)


def reachable(numbers: Iterable[int]) -> Collection[int]:
    """Returns every value that all the numbers together can make."""
    return _tables(tuple(numbers))[-1].keys()


def _tables(numbers: tuple[int, ...]) -> list[_Table]:
    """Returns, for each subset of the numbers, the values that its numbers together can make.

    A subset is a bit mask, and the index of its table.
    """
    tables: list[_Table] = [{} for _ in range(1 << len(numbers))]
    for subset in range(1, len(tables)):
        table = tables[subset]
        if subset.bit_count() == 1:
            table[numbers[subset.bit_length() - 1]] = None
            continue
        # `left` goes through the parts of the subset, from large to small. The part that has the
        # highest bit is always the left one, so that no pair of parts comes twice.
        left = (subset - 1) & subset
        while 2 * left >= subset:
            right = subset ^ left
            if left > right:
                _combine(table, tables, left, right)
            left = (left - 1) & subset
    return tables


def _combine(table: _Table, tables: list[_Table], left: int, right: int) -> None:
    """Adds to a table what a value of one part and a value of the other make.

    A value that is in the table already keeps its origin.
    """
    for x in tables[left]:
        for y in tables[right]:
            if x >= y:
                a = x
                b = y
                first = left
                second = right
            else:
                a = y
                b = x
                first = right
                second = left
            table.setdefault(a + b, (a, "+", b, first, second))
            table.setdefault(a - b, (a, "-", b, first, second))
            table.setdefault(a * b, (a, "*", b, first, second))
            if b and a % b == 0:
                table.setdefault(a // b, (a, "/", b, first, second))


def is_enumerable(config: CountdownConfig) -> bool:
    """Tells whether the space is small enough to list every problem.

    That of scale nano is, with 4,960 multisets of numbers and 33,298 problems.
    """
    multisets = math.comb(config.high - config.low + config.numbers, config.numbers)
    return multisets <= _ENUMERABLE


def enumerate_keys(config: CountdownConfig) -> list[Key]:
    """Lists the keys of all legal problems of a space, sorted."""
    values = range(config.low, config.high + 1)
    return [
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(values, config.numbers)
        for target in sorted(_targets(config, numbers))
        if config.target_low <= target <= config.target_high
    ]


def _targets(config: CountdownConfig, numbers: tuple[int, ...]) -> Collection[int]:
    """Returns the targets with as many solutions as a problem has at least."""
    if config.least_solutions == 1:
        return reachable(numbers)
    counts = count_solutions(numbers)
    return [target for target, count in counts.items() if count >= config.least_solutions]


def draw(config: CountdownConfig, seed: int) -> Problem:
    """Draws a legal problem: a target, and then numbers until they can make it.

    The problem is a function of the arguments.

    Raises:
      UsageError: no numbers were found for the target.
    """
    if config.least_solutions > 1:
        return _draw_of_many(config, seed)
    rng = random.Random(f"problem {seed}")
    target = rng.randint(config.target_low, config.target_high)
    for _ in range(_PATIENCE):
        numbers = tuple(rng.randint(config.low, config.high) for _ in range(config.numbers))
        if solve(numbers, target) is not None:
            return Puzzle(numbers, target).problem(f"draw-{seed}")
    raise UsageError(
        f"task: found no {config.numbers} numbers in {config.low}..{config.high} that make"
        f" {target}; choose a target range that they can reach"
    )


def _draw_of_many(config: CountdownConfig, seed: int) -> Problem:
    """Draws a problem with several solutions: numbers, until they make a target in enough ways.

    To most targets there are few such numbers, so a target that was drawn first would be kept for
    long.
    """
    rng = random.Random(f"problem of many solutions {seed}")
    for _ in range(_PATIENCE):
        numbers = tuple(rng.randint(config.low, config.high) for _ in range(config.numbers))
        targets = [
            target
            for target in sorted(_targets(config, numbers))
            if config.target_low <= target <= config.target_high
        ]
        if targets:
            return Puzzle(numbers, rng.choice(targets)).problem(f"draw-{seed}")
    raise UsageError(
        f"task.least_solutions={config.least_solutions}: found no {config.numbers} numbers in"
        f" {config.low}..{config.high} that make a target in"
        f" {config.target_low}..{config.target_high} in so many ways; ask for fewer"
    )


def split_problems(
    config: CountdownConfig,
    train: int,
    heldout: int,
    seed: int = 0,
    exclude: Collection[Key] = frozenset(),
    map_draws: Map = map,
    apart_from: Collection[tuple[int, ...]] = frozenset(),
) -> Split:
    """Splits problems into training, validation and test.

    No two of these parts share the numbers of a problem, whatever the targets.

    Args:
      config: the space of problems.
      train: number of training problems. A small space may have fewer left.
      heldout: number of validation problems, and of test problems. They are set aside first.
      seed: decides the split, together with the other arguments but `map_draws`.
      exclude: keys of the problems that may not occur.
      map_draws: a map that keeps the order, for drawing on several cores.
      apart_from: sorted numbers that no problem may have.

    Raises:
      UsageError: the space is too small.
    """
    if is_enumerable(config):
        return name_by_place(_split_space(config, train, heldout, seed, exclude, apart_from))
    return split_by_draws(
        functools.partial(draw, config),
        problem_key,
        numbers_of,
        train,
        heldout,
        seed,
        exclude,
        map_draws,
        apart_from,
    )


def _split_space(
    config: CountdownConfig,
    train: int,
    heldout: int,
    seed: int,
    exclude: Collection[Key],
    apart_from: Collection[tuple[int, ...]],
) -> dict[str, list[Problem]]:
    """Splits a listed space by multisets of numbers, each with all its targets.

    Of the last multiset of a part there may be more problems than the part needs. The others are
    left out.

    Raises:
      UsageError: the space is too small.
    """
    problems = [
        problem
        for problem in _shuffled_space(config, seed, exclude)
        if numbers_of(problem) not in apart_from
    ]
    with_numbers: dict[tuple[int, ...], list[Problem]] = {}
    for problem in problems:
        with_numbers.setdefault(numbers_of(problem), []).append(problem)

    # All multisets in random order. It does not depend on what is excluded, and prefers no multiset
    # for having many targets.
    values = range(config.low, config.high + 1)
    waiting = list(itertools.combinations_with_replacement(values, config.numbers))
    random.Random(f"numbers {seed}").shuffle(waiting)
    waiting.reverse()  # They are taken from the end.

    parts: dict[str, list[Problem]] = {}
    for name in ("validation", "test"):
        chosen: set[Key] = set()
        while waiting and len(chosen) < heldout:
            candidates = with_numbers.pop(waiting.pop(), [])
            needed = heldout - len(chosen)
            chosen.update(map(problem_key, candidates[:needed]))
        # In the shuffled order, so that the first problems of a part differ in their numbers.
        parts[name] = [problem for problem in problems if problem_key(problem) in chosen]
    rest = [problem for problem in problems if numbers_of(problem) in with_numbers]
    parts["train"] = rest[:train]

    if len(parts["test"]) < heldout or not parts["train"]:
        raise UsageError(
            f"data.heldout={heldout}: the task has only {len(problems)} problems that are not"
            f" excluded, too few for {heldout} of validation, {heldout} of test and some of"
            " training that share no numbers; ask for fewer or widen the task"
        )
    return parts


def _shuffled_space(config: CountdownConfig, seed: int, exclude: Collection[Key]) -> list[Problem]:
    """Lists all problems but the excluded ones in random order, with their numbers shuffled."""
    keys = enumerate_keys(config)
    rng = random.Random(f"space {seed}")
    rng.shuffle(keys)
    problems = [
        Puzzle(tuple(rng.sample(numbers, len(numbers))), target).problem("")
        for numbers, target in keys
    ]
    # Excluded problems are taken out last, so that the others keep their order and their numbers.
    return [problem for problem, key in zip(problems, keys, strict=True) if key not in exclude]


def numbers_of(problem: Problem) -> tuple[int, ...]:
    """Returns the sorted numbers of a problem. Problems that share them are in the same split."""
    return tuple(sorted(Puzzle.of(problem).numbers))
