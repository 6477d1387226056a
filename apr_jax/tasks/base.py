"""What a task is: problems, prompts, demonstrations and a score, all as plain text.

Nothing here knows tokens or JAX. A demonstration is a tree of `Thread`s; `data/` turns it into
token sequences. `Task` is what one writes for a problem of one's own: three methods, the others
have defaults (docs/adding_a_task.md).
"""

from __future__ import annotations

import abc
import dataclasses
import json
import string
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, ClassVar

from apr_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      id: names it in files and reports.
      data: what the task makes of it, as JSON; only the task looks inside.
    """

    id: str
    data: Mapping[str, Any]

    def __hash__(self) -> int:
        # Equal problems have equal ids; `data` is JSON, which has no hash.
        return hash(self.id)

    def to_json(self) -> dict[str, Any]:
        """The line of a problems file: `id`, then the fields of `data`."""
        return {"id": self.id, **self.data}


@dataclasses.dataclass(frozen=True)
class Spawn:
    """A spawn in a thread's body: each child's prompt is its message, and each child's answer is
    joined back.
    """

    children: tuple[Thread, ...]


@dataclasses.dataclass(frozen=True)
class Thread:
    """One demonstrated thread.

    Attributes:
      prompt: text the thread is given: the problem for the root, the message for a child.
      body: what it writes, text and spawns in order.
      answer: what it joins; empty for "no solution".
      condition: what the prompt of a root states, None for nothing (`Task.prompt`). The text says
        it already, so two threads of the same text are equal whether it is known or not.
    """

    prompt: str
    body: tuple[str | Spawn, ...]
    answer: str
    condition: int | None = dataclasses.field(default=None, compare=False)


def flatten(thread: Thread) -> list[Thread]:
    """The thread and everything below it, parents first."""
    below = [child for part in thread.body if isinstance(part, Spawn) for child in part.children]
    return [thread, *(one for child in below for one in flatten(child))]


@dataclasses.dataclass(frozen=True)
class Score:
    """What an answer is worth.

    Attributes:
      reward: from 0 to 1; reinforcement learning maximises it.
      correct: whether the answer counts as right in accuracies.
      stated: the answer as it is shown to people; None if the text states none.
      reason: why it is not right, in a few words; empty when it is.
      vote: what answers vote by (cons@n): equal for answers that mean the same. By default they
        vote by what they state.
    """

    reward: float
    correct: bool
    stated: str | None
    reason: str = ""
    vote: str | None = None

    @property
    def voted(self) -> str | None:
        """What the answer votes for; None if it states nothing."""
        return self.stated if self.vote is None else self.vote


@dataclasses.dataclass(frozen=True)
class Fault:
    """A wrong piece of a trace.

    Attributes:
      kind: a word for what is wrong, of `Task.fault_kinds`.
      text: the piece.
      decisive: whether the solution could have been found from what was lost by it.
    """

    kind: str
    text: str
    decisive: bool


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a thread did, read from its own text.

    Attributes:
      faults: in the order of the trace.
      found: whether a right solution stands in the trace, whatever was joined.
      hopeful: whether its start has a solution at all.
    """

    faults: tuple[Fault, ...]
    found: bool
    hopeful: bool


@dataclasses.dataclass(frozen=True)
class Condition:
    """A number that a prompt can state, to ask for more or less search.

    Attributes:
      counts: what it counts, in the plural, as messages say it: "children", "window bins".
      low, high: the numbers that demonstrations state.
    """

    counts: str
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to demonstrate.

    Attributes:
      parallel: whether its threads spawn.
      depth: levels of threads below the root that it needs (`limits.max_depth`).
      condition: what its prompts can state; None if they state nothing.
    """

    parallel: bool
    depth: int = 0
    condition: Condition | None = None


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What fits into a rollout; the meaning of each field is that in `threads.Limits`."""

    window: int = 2**31 - 1
    max_thread_tokens: int = 2**31 - 1
    max_threads: int = 2**31 - 1
    children: int = 1_000
    max_depth: int = 2

    @classmethod
    def of(cls, limits: Any) -> Bounds:
        """Those of `threads.Limits`."""
        return cls(**{field.name: getattr(limits, field.name) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Split:
    """Three lists of problems; no two lists share a group (`Task.group`), and no two problems of a
    list have the same key (`Task.key`).
    """

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The settings of a task that has none."""


# An order-preserving map, for drawing on several cores.
Map = Callable[[Callable[[int], Problem], Iterable[int]], Iterable[Problem]]


class Task(abc.ABC):
    """One kind of problem. A subclass writes `draw`, `prompt` and `score`.

    Args:
      config: the task's settings, a record of the class `Config`.
      bounds: what fits into the rollout that demonstrations are for.

    Attributes:
      Config: class of the settings, a frozen dataclass all of whose fields have defaults. They are
        set in an experiment as `TaskConfig(kind, name=value, ...)` and by `--set task.name=value`.
      demonstration_options: names of those settings that only demonstrations depend on.
      alphabet: every character that prompts, messages, traces and answers can hold: a tokenizer
        that is trained for the task knows them all.
      phrases: strings that traces repeat word for word: the tokenizer makes one piece of each.
      fault_kinds: kind of fault -> what it means, for tasks that `diagnose`.
    """

    Config: ClassVar[type] = NoOptions
    demonstration_options: ClassVar[frozenset[str]] = frozenset()
    fault_kinds: ClassVar[Mapping[str, str]] = {}
    kind = ""  # As the experiment names it; `make_task` sets it.

    def __init__(self, config: Any = None, bounds: Bounds | None = None):
        self.config = self.Config() if config is None else config
        self.bounds = bounds or Bounds()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process makes the task anew: its class may be in a file that is no module there.
        from apr_jax.tasks.registry import config_of, remake

        return remake, (config_of(self), self.bounds)

    @property
    def alphabet(self) -> str:
        return "".join(sorted(set(string.printable) - set("\t\r\x0b\x0c")))

    @property
    def phrases(self) -> tuple[str, ...]:
        return ()

    @property
    def methods(self) -> Mapping[str, Method]:
        """Ways to demonstrate, by name; none if there are no demonstrations."""
        return {}

    @abc.abstractmethod
    def draw(self, seed: int) -> Problem:
        """A random problem, a function of settings and seed; its id may be any."""

    @abc.abstractmethod
    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        """The text that the root thread is given.

        Args:
          condition: a number to state, of the method's `Condition`; None states none.
        """

    @abc.abstractmethod
    def score(self, problem: Problem, answer: str) -> Score:
        """What an answer is worth; never raises, whatever the text."""

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """A demonstration by one of the `methods`; a function of its arguments and the settings."""
        raise NotImplementedError(f"{type(self).__name__} has no demonstrations")

    def diagnose(self, problem: Problem, thread: Thread, cut: bool) -> Diagnosis | None:
        """What is wrong in one thread's own text, children aside; None if that cannot be told.

        Never raises, whatever the text.

        Args:
          thread: the root's prompt is empty.
          cut: it was stopped from outside.
        """
        return None

    def key(self, problem: Problem) -> Hashable:
        """What makes two problems the same, however they are written or named."""
        return json.dumps(problem.data, sort_keys=True)

    def group(self, problem: Problem) -> Hashable:
        """Problems of one group stand in the same split: who knows one of them knows something
        about the others.
        """
        return self.key(problem)

    def split(
        self,
        train: int,
        heldout: int,
        seed: int,
        exclude: Collection[Hashable] = frozenset(),
        map_draws: Map = map,
    ) -> Split:
        """Problems for training, validation and test; by default random ones.

        Args:
          train: wanted training problems; a small task may have fewer.
          heldout: problems for validation, and as many for test; they are set aside first.
          seed: everything follows from it; the result does not depend on how `map_draws` works.
          exclude: keys that may occur nowhere in the split.

        Raises:
          UsageError: there are too few problems for what is wanted.
        """
        from apr_jax.tasks.splits import split_by_draws

        return split_by_draws(
            self.draw, self.key, self.group, train, heldout, seed, exclude, map_draws
        )

    def check(self, problem: Problem) -> Problem:
        """The problem as the task goes on with it; problems of files pass here first.

        Raises:
          ValueError: says which field of `problem.data` is wrong, its value, and what would be
            right.
        """
        return problem

    def parse(self, text: str) -> Problem:
        """The problem that a user wrote on the command line; by default its data as JSON.

        Raises:
          UsageError: says what is wrong, and how to write it.
        """
        shown = text if len(text) <= 80 else text[:77] + "..."
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise UsageError(
                f"problem {shown!r}: must be a JSON object, the fields of a line of a problems file"
            )
        data.pop("id", None)
        try:
            return self.check(Problem(shown, data))
        except ValueError as error:
            raise UsageError(f"problem {shown!r}: {error}") from None

    def show(self, problem: Problem) -> str:
        """The problem in one line for people; by default the prompt."""
        return self.prompt(problem)

    @property
    def example(self) -> str:
        """A line of a problems file, for messages about wrong ones."""
        return json.dumps(self.draw(0).to_json())
