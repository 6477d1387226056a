"""Settings of Countdown: which problems there are, and how the solvers demonstrate them."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

MAX_NUMBERS = 6  # As in the game. Brute force solves a problem of six in some 20 ms.
MAX_NUMBERS_OF_ALL = 4  # Where all solutions are asked for: brute force takes some 3 ms.
BIDIRECTIONAL_NUMBERS = 4  # One step from the numbers and one from the target leave one between.
MAX_VALUE = 999_999  # Largest number, and largest target.


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """How demonstrations are made; docs/data.md has figures.

    A beam is the number of successors of a state that the search keeps.

    Attributes:
      serial_beam: SoS and SoS+ draw a beam from 1 to serial_beam for each problem.
      depth_first: which successors depth-first SoS keeps: the best of its beam ("beam"), or all
        that are near the target, as it was published ("near"). Traces of the latter have up to some
        thousand characters at four numbers.
      parent_beam: the largest beam of APR's parents.
      parent_beam_low: the smallest beam of APR's parents. Where the prompt states a condition it is
        1.
      child_beam: APR's children draw a beam from their parent's to child_beam.
      max_children: number of threads that a demonstration of APR may spawn. If the successors of a
        node are more than are left, they are queued. Nested APR divides what a spawn leaves evenly
        among the children and their parent, as a rollout divides its threads.
      spawn_probability: probability that the successors of a node are searched at once, not queued.
      shuffle: whether the kept successors are shuffled, as in the paper. Their canonical order is
        easier for small models.
      max_intermediate: a step that leaves two numbers is followed only if its result is at most
        this; 0 follows all. Above twice the highest number and target, such a step helps only if
        the last step divides, and small models multiply badly.
      condition: share of demonstrations whose prompt states the condition: the number of children
        (APR) or of window bins (SoS+).
      window_bin: tokens in a bin of SoS+'s condition. It counts all that the thread takes of the
        window: `<bos>`, prompt, trace, `<join>`, answer and `<eos>`, in tokens of its text form.
      render: text form of a trace: "compact", with few tokens, or "sos", the lines of Stream of
        Search.
      number_pieces: a number of several digits is one token if it is at most this. With 0 each
        digit is a token.
      search: "beam" searches forward from the numbers, as published. "bidirectional" searches from
        the numbers and from the target (`bidirectional.py`): of everything, for which "beam" takes
        2.2 to 2.5 times the text, so that children need no long list of messages, and a serial
        search fits the window. There APR's beam is the number of pairs that get a child, SoS+ tries
        all pairs, and `max_intermediate` bounds every number that leaves two, needs included.
        `serial_beam`, `depth_first`, `child_beam`, `spawn_probability` and `shuffle` would change
        nothing, and must be left out.
      false_claims: with "bidirectional", the probability that a child that finds nothing, before
        one that finds something, claims a solution that is nearly right. The root rejects it;
        without any, nobody learns to reject.
    """

    serial_beam: int = 5
    depth_first: Literal["beam", "near"] = "beam"
    parent_beam: int = 10
    parent_beam_low: int = 1
    child_beam: int = 15
    max_children: int = 10
    spawn_probability: float = 0.5
    shuffle: bool = True
    max_intermediate: int = 0
    condition: float = 0.5
    window_bin: int = 512
    render: Literal["compact", "sos"] = "compact"
    number_pieces: int = 0
    search: Literal["beam", "bidirectional"] = "beam"
    false_claims: float = 0.0

    def __post_init__(self):
        positive = (
            "serial_beam",
            "parent_beam",
            "parent_beam_low",
            "child_beam",
            "max_children",
            "window_bin",
        )
        for field in positive:
            if getattr(self, field) < 1:
                raise ValueError(f"task.solver.{field}={getattr(self, field)} must be at least 1")
        if self.max_intermediate < 0:
            raise ValueError(
                f"task.solver.max_intermediate={self.max_intermediate} must be at least 0"
            )
        if self.parent_beam_low > self.parent_beam:
            raise ValueError(
                f"task.solver.parent_beam_low={self.parent_beam_low} must be at most"
                f" task.solver.parent_beam={self.parent_beam}"
            )
        if self.max_children < self.parent_beam:
            raise ValueError(
                f"task.solver.max_children={self.max_children} must be at least"
                f" task.solver.parent_beam={self.parent_beam}: the root's spawn has to fit"
            )
        for field, most in (
            ("number_pieces", _MOST_PIECES),
            ("spawn_probability", 1),
            ("condition", 1),
            ("false_claims", 1),
        ):
            value = getattr(self, field)
            if not 0 <= value <= most:
                raise ValueError(f"task.solver.{field}={value} must be in 0..{most}")
        if self.search == "bidirectional" and self.render != "compact":
            raise ValueError(
                f"task.solver.render={self.render!r} must be 'compact' with"
                " task.solver.search='bidirectional'"
            )
        if self.search == "bidirectional":
            _check_left_out(self, _OF_BEAMS, "task.solver.search='bidirectional'")
        if self.search == "beam" and self.false_claims:
            raise ValueError(
                f"task.solver.false_claims={self.false_claims} must be 0 with"
                " task.solver.search='beam', whose roots check no claim"
            )


# A vocabulary of as many numbers, and a character or two beside them, is one that
# `SentencePieceTokenizer.train` makes.
_MOST_PIECES = 5_000

# Settings about ranking, coins and shuffling, which a search from both ends does not do.
_OF_BEAMS = ("serial_beam", "depth_first", "child_beam", "spawn_probability", "shuffle")


def _check_left_out(solver: SolverConfig, fields: Iterable[str], with_setting: str) -> None:
    """Refuses settings of the solver that would change nothing beside another setting."""
    for field in fields:
        value = getattr(solver, field)
        default = getattr(SolverConfig, field)
        if value != default:
            raise ValueError(
                f"task.solver.{field}={value!r} must be {default!r}, its default, with"
                f" {with_setting}, where it changes nothing"
            )


@dataclasses.dataclass(frozen=True)
class CountdownConfig:
    """Which problems there are: numbers and a target that they can make.

    The build draws problems from these ranges, and a problems file may hold no others.

    Attributes:
      numbers: how many numbers a problem has.
      low: the smallest number.
      high: the largest number.
      target_low: the smallest target.
      target_high: the largest target.
      solutions: whether "one" solution is asked for, or "all" of them (`all_solutions`). With "all"
        the demonstrations try every step; `solver` would change nothing, and must be left out.
      least_solutions: with "all", how many solutions a problem that is drawn has at least.
      solver: how problems are demonstrated and written down.
    """

    numbers: int = 4
    low: int = 1
    high: int = 99
    target_low: int = 10
    target_high: int = 100
    solutions: Literal["one", "all"] = "one"
    least_solutions: int = 1
    solver: SolverConfig = SolverConfig()

    def __post_init__(self):
        if not 2 <= self.numbers <= MAX_NUMBERS:
            raise ValueError(f"task.numbers={self.numbers} must be from 2 to {MAX_NUMBERS}")
        for field in ("high", "target_high"):
            if getattr(self, field) > MAX_VALUE:
                raise ValueError(f"task.{field}={getattr(self, field)} must be at most {MAX_VALUE}")
        if not 1 <= self.low <= self.high:
            raise ValueError(f"task.low={self.low} must be in 1..task.high={self.high}")
        if not 1 <= self.target_low <= self.target_high:
            raise ValueError(
                f"task.target_low={self.target_low} must be in"
                f" 1..task.target_high={self.target_high}"
            )
        self._check_search()
        if self.solutions == "all":
            if self.numbers > MAX_NUMBERS_OF_ALL:
                raise ValueError(
                    f"task.numbers={self.numbers} must be at most {MAX_NUMBERS_OF_ALL} with"
                    " task.solutions='all': of more numbers there are too many solutions"
                )
            fields = [field.name for field in dataclasses.fields(SolverConfig)]
            _check_left_out(self.solver, fields, "task.solutions='all'")
            if self.least_solutions < 1:
                raise ValueError(f"task.least_solutions={self.least_solutions} must be at least 1")
        elif self.least_solutions != 1:
            raise ValueError(
                f"task.least_solutions={self.least_solutions} must be 1 with task.solutions='one'"
            )

    def _check_search(self) -> None:
        """Refuses a search from both ends of problems that it is not made for."""
        if self.solver.search != "bidirectional":
            return
        if self.numbers != BIDIRECTIONAL_NUMBERS:
            raise ValueError(
                f"task.numbers={self.numbers} must be {BIDIRECTIONAL_NUMBERS} with"
                " task.solver.search='bidirectional'"
            )
        if self.solutions != "one":
            raise ValueError(
                f"task.solutions={self.solutions!r} must be 'one' with"
                " task.solver.search='bidirectional'"
            )
