"""Search from both ends: one step forward from the numbers, one step back from the target.

It is the search of `task.solver.search="bidirectional"`, for problems of four numbers.

1. A pair of numbers is combined in every way. Beside each result r stand the two others, c and d.
2. What would have to stand beside d, so that one more step makes the target, are the *needs* of d.
   The same is asked of c and of r.
3. So a solution is found where a result of r and c is a need of d, a result of r and d is a need of
   c, or a need of r is a result of c and d. That is a comparison with a list of some four numbers.
   A search that only goes forward combines the last two numbers in every way instead, in 2.2 to 2.5
   times the text (docs/data.md).

Every solution is found in this way, from the pair of its first step. APR spawns a child for each
pair, and SoS+ goes through the pairs one after the other. The root checks each solution before it
answers, by working out its results again, and goes on if one does not come out. So that there is
something to reject, the share `task.solver.false_claims` of the children that find nothing claims a
solution that is nearly right. Where a thread searches alone, it makes such a slip itself.

Traces are short lists (here with `task.solver.max_intermediate=1000`):

    54,34>2,93:53               a child's message: a pair of numbers, the two others, the target
    54,34>2,93                  the same in a serial thread, before it searches below a pair
    2>93:-40-146                what is made with 2 is looked up here: the needs of 93, because
                                93-40=53 and 146-93=53
    +88|+90-86/44               a first step and its result; what that makes with 2
    -20|+22-18*40!              the same up to a hit
    93>2:+51-55/106             what is made with 93 is looked up among the needs of 2
    >2,93:+95-91*186            the needs of the first results are looked up among the results of
                                the two others
    +88|-35-141                 a first step and its result; the needs of that
    20,40,53!                   the check of a solution: the result of each equation, and a verdict

- `!` behind a number says that it stands in the list at the head of its section.
- A number that is larger than all of this list is left out.
- For a quotient the check is the product of quotient and divisor, because multiplying is surer.
- A check ends at the first result that is not the one that was claimed, without a verdict. `;`
  stands between the checks of two claims.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from apr_jax.tasks.base import Spawn, Thread
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.tasks.countdown.events import Step
from apr_jax.tasks.countdown.puzzle import Puzzle
from apr_jax.tasks.countdown.render_compact import answer_text
from apr_jax.tasks.countdown.solvers import successors

METHODS = ("sos+", "apr")
_HIT = "!"

Path = tuple[Step, ...]


class Pair(NamedTuple):
    """The two numbers of a first step, and the two others."""

    a: int
    b: int
    c: int
    d: int

    @property
    def text(self) -> str:
        """The pair as messages hold it, such as `54,34>2,93`."""
        return f"{self.a},{self.b}>{self.c},{self.d}"

    @property
    def key(self) -> Pair:
        """The pair with both couples of numbers sorted: equal for pairs of the same search."""
        return Pair(*sorted((self.a, self.b)), *sorted((self.c, self.d)))


def list_pairs(numbers: Sequence[int]) -> list[Pair]:
    """Lists the pairs of four numbers in the order of their indices, each once."""
    pairs: dict[Pair, Pair] = {}
    for i, j in itertools.combinations(range(4), 2):
        c, d = (number for index, number in enumerate(numbers) if index not in (i, j))
        pair = Pair(numbers[i], numbers[j], c, d)
        pairs.setdefault(pair.key, pair)
    return list(pairs.values())


def results(first: int, second: int, most: int = 0) -> list[Step]:
    """Lists what two numbers make, by + - * / in this order.

    Args:
      first: the number that comes first in sums and products.
      second: the other number.
      most: the largest result that is listed; 0 lists all.
    """
    steps = [step for step, _ in successors((first, second))]
    return [step for step in steps if not most or step.result <= most]


class Need(NamedTuple):
    """A number that makes the target together with another one, and the step that does it."""

    op: str
    number: int
    step: Step


def needs(number: int, target: int, most: int = 0) -> list[Need]:
    """Lists what makes the target together with a number, by + - * / in this order.

    Args:
      number: the number that is there.
      target: the number to make.
      most: the largest need that is listed; 0 lists all.
    """
    found = []
    if number <= target:
        found.append(Need("+", target - number, Step(target - number, "+", number, target)))
    else:
        found.append(Need("-", number - target, Step(number, "-", number - target, target)))
    found.append(Need("-", target + number, Step(target + number, "-", number, target)))
    if number:
        if target % number == 0:
            quotient = target // number
            found.append(Need("*", quotient, Step(quotient, "*", number, target)))
        if number % target == 0:
            quotient = number // target
            found.append(Need("/", quotient, Step(number, "/", quotient, target)))
        product = target * number
        found.append(Need("/", product, Step(product, "/", number, target)))
    return [need for need in found if not most or need.number <= most]


class Trial(NamedTuple):
    """A number that is written and looked up in another list.

    Attributes:
      text: the operation and the number.
      path: the solution that it claims, if it stands in the other list; else None.
    """

    text: str
    path: Path | None


class Slip(NamedTuple):
    """A trial that is nearly a hit, written as if it were one.

    Attributes:
      place: where it stands among the items of the search.
      replaces: whether it stands for the right trial, or is one more.
      trial: the wrong trial, with the false solution that it claims.
    """

    place: int
    replaces: bool
    trial: Trial


class _PairSearch:
    """All that is tried below one pair, and the slips that could happen there.

    It has a section for each list in which numbers are looked up. A small model finds a number in a
    list that stands just before it far sooner than in one of several further up (docs/log.md).

    Args:
      pair: the pair.
      target: the number to make.
      most: the largest number that is listed, but for the results of the pair; 0 lists all.
      joins_pairs: whether the results of the pair are combined with those of the two others. A
        serial thread that was at the pair of the two others before has done so there.

    Attributes:
      items: trials, and the text between them, in order.
      slips: what could go wrong.
    """

    def __init__(self, pair: Pair, target: int, most: int, joins_pairs: bool):
        self.items: list[str | Trial] = []
        self.slips: list[Slip] = []
        firsts = results(pair.a, pair.b)

        for number, last in dict.fromkeys(((pair.c, pair.d), (pair.d, pair.c))):
            wanted = needs(last, target, most)
            finals = {need.number: need.step for need in reversed(wanted)}  # Of several the first.
            self._begin_section(f"{number}>{last}:{_listed(wanted)}")
            for first in firsts if wanted else ():
                self._write_first_step(first)
                self._look_up_results(first, number, finals, most)

        if joins_pairs:
            others = results(pair.c, pair.d, most)
            made = {step.result: step for step in reversed(others)}  # Of several the first.
            self._begin_section(f">{pair.c},{pair.d}:{_listed(others)}")
            for first in firsts if others else ():
                self._write_first_step(first)
                self._look_up_needs(first, needs(first.result, target, most), made)

    def _begin_section(self, head: str) -> None:
        """Writes the head of a section, which ends with the list of the section."""
        self.items.append(f";{head}" if self.items else head)

    def _write_first_step(self, first: Step) -> None:
        """Writes a first step, behind which stands what is tried with its result."""
        self.items.append(f";{first.op}{first.result}|")

    def _look_up_results(
        self, first: Step, number: int, finals: Mapping[int, Step], most: int
    ) -> None:
        """Tries what a first step's result and another number make.

        Args:
          first: the first step.
          number: the other number.
          finals: what is needed beside the last number -> the step that makes the target of them.
          most: the largest number that is listed; 0 lists all.
        """
        for step in results(first.result, number, most):
            if step.result > max(finals):
                continue
            if step.result in finals:
                self._try(step.op, step.result, (first, step, finals[step.result]))
                continue
            for near in _near(step.result, finals):
                claimed = step._replace(result=near)
                self._could_slip(claimed.op, near, (first, claimed, finals[near]))
                unseen = _with_operand(finals[near], near, step.result)
                self._could_slip(step.op, step.result, (first, step, unseen))
            self._try(step.op, step.result, None)

        # The most frequent slip of small models: a division that leaves a remainder.
        large = max(first.result, number)
        small = min(first.result, number)
        if small > 1 and large % small:
            claimed = Step(large, "/", small, round(large / small))
            if claimed.result in finals:
                path = (first, claimed, finals[claimed.result])
                self._could_slip("/", claimed.result, path, replaces=False)

    def _look_up_needs(self, first: Step, wanted: list[Need], made: Mapping[int, Step]) -> None:
        """Tries the needs of a first step's result among the results of the two other numbers.

        Args:
          first: the first step.
          wanted: the needs of its result.
          made: what the two other numbers make -> the step that makes it.
        """
        for need in wanted:
            if need.number > max(made):
                continue
            if need.number in made:
                self._try(need.op, need.number, (first, made[need.number], need.step))
                continue
            for near in _near(need.number, made):
                claimed = _with_operand(need.step, need.number, near)
                path = (first, made[near], claimed)
                self._could_slip(need.op, near, path)
                self._could_slip(need.op, need.number, path)
            self._try(need.op, need.number, None)

    def _try(self, op: str, number: int, path: Path | None) -> None:
        """Writes a trial down."""
        self.items.append(Trial(f"{op}{number}", path))

    def _could_slip(self, op: str, number: int, path: Path, replaces: bool = True) -> None:
        """Notes that a wrong trial could be written next, if it claims no negative difference."""
        if any(step.op == "-" and step.a < step.b for step in path):
            return
        self.slips.append(Slip(len(self.items), replaces, Trial(f"{op}{number}", path)))

    @property
    def solution(self) -> Path | None:
        """The first solution that is found; None if there is none."""
        trials = (item for item in self.items if isinstance(item, Trial))
        return next((trial.path for trial in trials if trial.path), None)

    def slip(self, rng: random.Random, probability: float) -> None:
        """Lets one thing go wrong with some probability, if nothing is found and something can."""
        if self.solution or not self.slips or rng.random() >= probability:
            return
        slip = rng.choice(self.slips)
        stop = slip.place + 1 if slip.replaces else slip.place
        self.items[slip.place : stop] = [slip.trial]


def _listed(values: Iterable[Need | Step]) -> str:
    """Writes a list of needs or of results."""
    return "".join(
        f"{value.op}{value.number if isinstance(value, Need) else value.result}" for value in values
    )


def _with_operand(step: Step, old: int, new: int) -> Step:
    """Returns a step with the same result in which one number stands for another."""
    if step.a == old:
        return step._replace(a=new)
    return step._replace(b=new)


def _near(number: int, others: Collection[int]) -> Iterator[int]:
    """Yields the numbers that a small model could take for `number`."""
    written = str(number)
    for other in others:
        pairs = zip(written, str(other), strict=False)
        same_length = len(written) == len(str(other))
        if abs(number - other) <= 2 or (same_length and sum(a != b for a, b in pairs) == 1):
            yield other


def check_text(path: Path) -> tuple[str, bool]:
    """Works the steps of a claimed solution out again.

    Returns:
      the text of the check, which ends at the first result that does not come out, and whether all
      of them do.
    """
    shown = []
    for step in path:
        number, expected = _recomputed(step)
        shown.append(str(number))
        if number != expected:
            return ",".join(shown), False
    return ",".join(shown) + _HIT, True


def _recomputed(step: Step) -> tuple[int, int]:
    """Returns the number that checks a step, and what it has to be."""
    if step.op == "/":
        return step.b * step.result, step.a
    number = {"+": step.a + step.b, "-": step.a - step.b, "*": step.a * step.b}[step.op]
    return number, step.result


def _write(search: _PairSearch, text: str, checks: bool) -> tuple[str, Path | None]:
    """Writes the trials below a pair behind a text, up to the first solution.

    Args:
      search: what is tried.
      text: what stands before it.
      checks: whether a solution is checked, and the search goes on behind a false one.

    Returns:
      the text, and the solution with which it ends; None if it ends without one.
    """
    for item in search.items:
        if isinstance(item, str):
            text += item
            continue
        text += item.text
        if item.path is None:
            continue
        text += _HIT
        if not checks:
            return text, item.path
        check, is_right = check_text(item.path)
        text += check
        if is_right:
            return text, item.path
    return text, None


def demonstrate(
    puzzle: Puzzle, prompt: str, config: SolverConfig, rng: random.Random, children: int
) -> Thread:
    """Demonstrates a search from both ends.

    Args:
      puzzle: four numbers and a target.
      prompt: the text that the root thread is given.
      config: the settings of the solver.
      rng: source of what goes wrong.
      children: number of pairs that get a child thread, the first ones; if it is 0, one thread
        searches below all pairs.
    """
    if children:
        return _parallel(puzzle, prompt, config, rng, children)
    return _serial(puzzle, prompt, config, rng)


def _serial(puzzle: Puzzle, prompt: str, config: SolverConfig, rng: random.Random) -> Thread:
    """Searches below one pair after the other."""
    text = ""
    searched: set[Pair] = set()
    for pair in list_pairs(puzzle.numbers):
        most = config.max_intermediate
        joins_pairs = Pair(pair.c, pair.d, pair.a, pair.b).key not in searched
        search = _PairSearch(pair, puzzle.target, most, joins_pairs)
        search.slip(rng, config.false_claims)
        searched.add(pair.key)

        text += f";{pair.text};" if text else f"{pair.text};"
        text, path = _write(search, text, checks=True)
        if path:
            return Thread(prompt, (text,), answer_text(path))
    return Thread(prompt, (text,), "")


def _parallel(
    puzzle: Puzzle, prompt: str, config: SolverConfig, rng: random.Random, children: int
) -> Thread:
    """Spawns a child for each of the first pairs, and answers with the first claim that is right.

    What is read of the claims stands in the root's text, `20,41;20,40,53!`. Behind the first right
    claim none is read, so no child slips there: it would teach slips, and nothing about them.
    """
    threads = []
    claims = []
    is_solved = False
    for pair in list_pairs(puzzle.numbers)[:children]:
        search = _PairSearch(pair, puzzle.target, config.max_intermediate, joins_pairs=True)
        is_solved = is_solved or search.solution is not None
        if not is_solved:
            search.slip(rng, config.false_claims)
        text, path = _write(search, "", checks=False)
        threads.append(Thread(f"{pair.text}:{puzzle.target}", (text,), answer_text(path)))
        if path:
            claims.append(path)

    body: list[str | Spawn] = [Spawn(tuple(threads))]
    checks = []
    for path in claims:
        check, is_right = check_text(path)
        checks.append(check)
        if is_right:
            return Thread(prompt, (*body, ";".join(checks)), answer_text(path))
    if checks:
        body.append(";".join(checks))
    return Thread(prompt, tuple(body), "")
