"""Which problems there are: brute force, enumeration of small spaces, sampling of large ones, and
the split.

A problem's identity is (sorted numbers, target). Numbers may repeat; a problem counts only if all
numbers together hit the target with exact, non-negative arithmetic. The order in which the numbers
are shown is shuffled."""

import functools
import itertools
import math
import random
from collections.abc import Collection, Iterable

from apr_jax.errors import UsageError
from apr_jax.tasks.base import Map, Problem, Split
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.puzzle import Key, Puzzle, problem_key
from apr_jax.tasks.splits import name_by_place, split_by_draws

# Multisets of numbers up to which every problem is listed: at most a second of brute force.
_ENUMERABLE = 10_000

# Value -> how it was made from two disjoint subsets: (a, op, b, subset of a, subset of b); None for
# a given number.
_Table = dict[int, tuple[int, str, int, int, int] | None]


def solve(numbers: Iterable[int], target: int) -> tuple[str, ...] | None:
    """Equations that hit the target with every number used once; None if there are none."""
    tables = _tables(tuple(numbers))
    full = len(tables) - 1
    if target not in tables[full]:
        return None
    path: list[str] = []

    def trace(value: int, subset: int) -> None:
        made = tables[subset][value]
        if made is not None:
            a, op, b, left, right = made
            trace(a, left)
            trace(b, right)
            path.append(f"{a}{op}{b}={value}")

    trace(target, full)
    return tuple(path)


def reachable(numbers: Iterable[int]) -> Collection[int]:
    """Every value that all the numbers together can make."""
    return _tables(tuple(numbers))[-1].keys()


def _tables(numbers: tuple[int, ...]) -> list[_Table]:
    """For each subset of the numbers (as a bit mask) the values that exactly its numbers can
    make.
    """
    tables: list[_Table] = [{} for _ in range(1 << len(numbers))]
    for subset in range(1, len(tables)):
        table = tables[subset]
        if subset.bit_count() == 1:
            table[numbers[subset.bit_length() - 1]] = None
            continue
        left = (subset - 1) & subset
        # Half of the ordered pairs of parts: the part with the highest bit comes first.
        while 2 * left >= subset:
            right = subset ^ left
            if left > right:
                _combine(table, tables, left, right)
            left = (left - 1) & subset
    return tables


def _combine(table: _Table, tables: list[_Table], left: int, right: int) -> None:
    """Adds every result of a value of one part and a value of the other."""
    for x in tables[left]:
        for y in tables[right]:
            a, b, first, second = (x, y, left, right) if x >= y else (y, x, right, left)
            table.setdefault(a + b, (a, "+", b, first, second))
            table.setdefault(a - b, (a, "-", b, first, second))
            table.setdefault(a * b, (a, "*", b, first, second))
            if b and a % b == 0:
                table.setdefault(a // b, (a, "/", b, first, second))


def is_enumerable(config: CountdownConfig) -> bool:
    """Whether the space is small enough to list every problem (nano is: 4,960 multisets, 33,298
    problems).
    """
    return math.comb(config.high - config.low + config.numbers, config.numbers) <= _ENUMERABLE


def enumerate_keys(config: CountdownConfig) -> list[Key]:
    """All solvable problems of a space, sorted."""
    values = range(config.low, config.high + 1)
    return [
        (numbers, target)
        for numbers in itertools.combinations_with_replacement(values, config.numbers)
        for target in sorted(reachable(numbers))
        if config.target_low <= target <= config.target_high
    ]


def draw(config: CountdownConfig, seed: int) -> Problem:
    """A random solvable problem, a function of its arguments: a target, then uniform numbers until
    they hit it.
    """
    rng = random.Random(f"problem {seed}")
    target = rng.randint(config.target_low, config.target_high)
    for _ in range(10_000):
        numbers = tuple(rng.randint(config.low, config.high) for _ in range(config.numbers))
        if solve(numbers, target) is not None:
            return Puzzle(numbers, target).problem(f"draw-{seed}")
    raise UsageError(
        f"task: found no {config.numbers} numbers in {config.low}..{config.high} that make"
        f" {target}; choose a target range that they can reach"
    )


def split_problems(
    config: CountdownConfig,
    train: int,
    heldout: int,
    seed: int = 0,
    exclude: Collection[Key] = frozenset(),
    map_draws: Map = map,
) -> Split:
    """Problems for training, validation and test: no two of these parts share a problem's numbers,
    whatever the targets.

    Args:
      config: the space.
      train: wanted training problems; a small space gives what it has left, at most this many.
      heldout: problems for validation, and as many for test; they are set aside first.
      seed: everything follows from it; the result does not depend on how `map_draws` works.
      exclude: keys that may occur nowhere in the split.
      map_draws: an order-preserving map, for drawing on several cores (`pool.imap` with a chunk
        size).

    Raises:
      UsageError: the space is too small for what is wanted.
    """
    if is_enumerable(config):
        return name_by_place(_split_space(config, train, heldout, seed, exclude))
    return split_by_draws(
        functools.partial(draw, config),
        problem_key,
        numbers_of,
        train,
        heldout,
        seed,
        exclude,
        map_draws,
    )


def _split_space(
    config: CountdownConfig, train: int, heldout: int, seed: int, exclude: Collection[Key]
) -> dict[str, list[Problem]]:
    """Holds whole multisets of numbers out, with every target; the last one of a part may give only
    some of its problems, and then trains nobody with the others."""
    problems = _shuffled_space(config, seed, exclude)
    with_numbers: dict[tuple[int, ...], list[Problem]] = {}
    for problem in problems:
        with_numbers.setdefault(numbers_of(problem), []).append(problem)

    # In an order that depends on no exclude file and prefers no multiset for its many targets.
    values = range(config.low, config.high + 1)
    waiting = list(itertools.combinations_with_replacement(values, config.numbers))
    random.Random(f"numbers {seed}").shuffle(waiting)
    waiting.reverse()

    parts: dict[str, list[Problem]] = {}
    for name in ("validation", "test"):
        chosen: set[Key] = set()
        while waiting and len(chosen) < heldout:
            some = with_numbers.pop(waiting.pop(), [])
            chosen.update(map(problem_key, some[: heldout - len(chosen)]))
        # As shuffled: the first hundred problems of a part are to have as many different numbers as
        # they can.
        parts[name] = [problem for problem in problems if problem_key(problem) in chosen]
    parts["train"] = [problem for problem in problems if numbers_of(problem) in with_numbers][
        :train
    ]

    if len(parts["test"]) < heldout or not parts["train"]:
        raise UsageError(
            f"data.heldout={heldout}: the task has only {len(problems)} problems outside the"
            f" exclude file, too few for {heldout} of validation, {heldout} of test and some of"
            " training that share no numbers; ask for fewer or widen the task"
        )
    return parts


def _shuffled_space(config: CountdownConfig, seed: int, exclude: Collection[Key]) -> list[Problem]:
    """The whole space in random order, each problem's numbers too."""
    keys = enumerate_keys(config)
    rng = random.Random(f"space {seed}")
    rng.shuffle(keys)
    problems = [
        Puzzle(tuple(rng.sample(numbers, len(numbers))), target).problem("")
        for numbers, target in keys
    ]
    # Filtered last: an exclude file takes problems away and moves none.
    return [problem for problem, key in zip(problems, keys, strict=True) if key not in exclude]


def numbers_of(problem: Problem) -> tuple[int, ...]:
    """The multiset of a problem's numbers: problems that share it stand in the same split."""
    return tuple(sorted(Puzzle.of(problem).numbers))
