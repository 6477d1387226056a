"""What a task is: problems, prompts, demonstrations and scores, all as plain text.

Nothing here knows tokens or JAX. A demonstration is a tree of `Thread`s, which `data/` turns into
token sequences. A task of your own is a subclass of `Task` with three methods; all other methods
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
    """One problem of a task.

    Attributes:
      id: its name in files and reports.
      data: its contents as JSON, which only the task reads.
    """

    id: str
    data: Mapping[str, Any]

    def __hash__(self) -> int:
        # Equal problems have equal ids; `data` is JSON, which has no hash.
        return hash(self.id)

    def to_json(self) -> dict[str, Any]:
        """Returns the line of a problems file: `id`, then the fields of `data`."""
        return {"id": self.id, **self.data}


@dataclasses.dataclass(frozen=True)
class Spawn:
    """A spawn in the body of a demonstrated thread.

    The prompt of each child is its message, and the answer of each child is joined.
    """

    children: tuple[Thread, ...]


@dataclasses.dataclass(frozen=True)
class Thread:
    """One demonstrated thread.

    Attributes:
      prompt: the text that the thread is given: the problem for the root, the message for a child.
      body: the texts and spawns that the thread writes, in order.
      answer: the answer that the thread joins; empty for "no solution".
      condition: the number that the prompt of a root states (`Task.prompt`), None if it states none
        or if it is not known. Threads are compared without it, because the prompt contains it.
    """

    prompt: str
    body: tuple[str | Spawn, ...]
    answer: str
    condition: int | None = dataclasses.field(default=None, compare=False)


def flatten(thread: Thread) -> list[Thread]:
    """Lists a thread and all threads below it, parents first."""
    threads = [thread]
    for part in thread.body:
        if isinstance(part, Spawn):
            for child in part.children:
                threads += flatten(child)
    return threads


@dataclasses.dataclass(frozen=True)
class Score:
    """What a task says that an answer is worth.

    Attributes:
      reward: a number from 0 to 1, which reinforcement learning maximises.
      correct: whether the answer counts as right in accuracies.
      stated: the answer as it is shown to people; None if the text states none.
      reason: why the answer is not right, in a few words; empty if it is right.
      vote: a key that is equal for answers that mean the same, for the majority vote of several
        answers (cons@n); None takes `stated`.
    """

    reward: float
    correct: bool
    stated: str | None
    reason: str = ""
    vote: str | None = None

    @property
    def voted(self) -> str | None:
        """The key that the answer votes for; None if the answer states nothing."""
        return self.stated if self.vote is None else self.vote


@dataclasses.dataclass(frozen=True)
class Fault:
    """A wrong piece of a trace.

    Attributes:
      kind: a word for what is wrong, from `Task.fault_kinds`.
      text: the wrong piece itself.
      decisive: whether the fault lost a part of the search in which there was a solution.
    """

    kind: str
    text: str
    decisive: bool


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a thread did, read from its own text.

    Attributes:
      faults: the wrong pieces, in the order of the trace.
      found: whether a right solution stands in the trace, whatever answer was joined.
      hopeful: whether there is any solution from where the thread started.
    """

    faults: tuple[Fault, ...]
    found: bool
    hopeful: bool


@dataclasses.dataclass(frozen=True)
class Condition:
    """A number that a prompt can state, to ask for more or less search.

    Attributes:
      counts: what the number counts, in the plural, for messages: "children", "window bins".
      low: the lowest number that demonstrations state.
      high: the highest number that demonstrations state.
    """

    counts: str
    low: int
    high: int


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to demonstrate how problems are solved.

    Attributes:
      parallel: whether its threads spawn.
      depth: number of levels of threads below the root that it needs (`limits.max_depth`).
      condition: the number that its prompts can state; None if they state none.
    """

    parallel: bool
    depth: int = 0
    condition: Condition | None = None


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What fits into a rollout. Each field means the same as in `threads.Limits`."""

    window: int = 2**31 - 1
    max_thread_tokens: int = 2**31 - 1
    max_threads: int = 2**31 - 1
    children: int = 1_000
    max_depth: int = 2

    @classmethod
    def of(cls, limits: Any) -> Bounds:
        """Returns the bounds that `threads.Limits` sets."""
        return cls(**{field.name: getattr(limits, field.name) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Split:
    """Problems for training, validation and test.

    No two of the lists share a group (`Task.group`), and no two problems of a list have the same
    key (`Task.key`).
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
      config: the task's settings, an instance of the class `Config`; None takes the defaults.
      bounds: what fits into the rollout that demonstrations are for; None sets no bounds.

    Attributes:
      Config: class of the settings, a frozen dataclass all of whose fields have defaults. The
        settings are set in an experiment as `TaskConfig(kind, name=value, ...)` and on the command
        line by `--set task.name=value`.
      demonstration_options: names of the settings on which nothing but demonstrations depends.
      alphabet: all characters that prompts, messages, traces and answers can contain. A tokenizer
        that is trained for the task knows each of them.
      phrases: strings that traces repeat word for word. The tokenizer makes one piece of each.
      fault_kinds: kind of fault -> what it means, for tasks that `diagnose`.
      children_solve_parts: whether the answer of a child is that of a part of the problem. If not,
        children search for the same answer as the root, and a right answer that one of them states
        counts as a solution that stood in the tree.
    """

    Config: ClassVar[type] = NoOptions
    demonstration_options: ClassVar[frozenset[str]] = frozenset()
    fault_kinds: ClassVar[Mapping[str, str]] = {}
    children_solve_parts: ClassVar[bool] = False
    kind = ""  # The name of the task in the experiment. `make_task` sets it.

    def __init__(self, config: Any = None, bounds: Bounds | None = None):
        self.config = self.Config() if config is None else config
        self.bounds = bounds or Bounds()

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process makes the task again from its config, because the class may be in a file
        # that is no module there.
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
        """Ways to demonstrate, by name; empty if there are no demonstrations."""
        return {}

    @abc.abstractmethod
    def draw(self, seed: int) -> Problem:
        """Draws a random problem, which depends on the settings and the seed only.

        Its id may be any text.
        """

    @abc.abstractmethod
    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        """Returns the text that the root thread is given.

        Args:
          problem: the problem to solve.
          condition: a number that the prompt states (`Method.condition`); None states none.
        """

    @abc.abstractmethod
    def score(self, problem: Problem, answer: str) -> Score:
        """Says what an answer is worth. It never raises, whatever the text is."""

    def demonstrate(self, problem: Problem, method: str, seed: int) -> Thread:
        """Demonstrates a problem by one of the `methods`.

        The result depends on the arguments and the settings only.
        """
        raise NotImplementedError(f"{type(self).__name__} has no demonstrations")

    def check_method(self, method: str) -> None:
        """Raises ValueError if `method` is not one of `methods`."""
        if method not in self.methods:
            raise ValueError(f"method {method!r} must be one of {', '.join(self.methods)}")

    def diagnose(self, problem: Problem, thread: Thread, cut: bool) -> Diagnosis | None:
        """Finds what is wrong in the text of one thread, without its children.

        It never raises, whatever the text is.

        Args:
          problem: the problem of the thread's tree.
          thread: the thread; the prompt of a root is empty.
          cut: whether the thread was stopped before its end, for example by the window.

        Returns:
          the diagnosis, or None if the task cannot tell.
        """
        return None

    def key(self, problem: Problem) -> Hashable:
        """Returns a key that is equal for problems that are the same but for names and spelling."""
        return json.dumps(problem.data, sort_keys=True)

    def group(self, problem: Problem) -> Hashable:
        """Returns a key that is equal for problems that must stand in the same split.

        They must if knowing one of them helps with the others. By default only equal problems do.
        """
        return self.key(problem)

    def split(
        self,
        train: int,
        heldout: int,
        seed: int,
        exclude: Collection[Hashable] = frozenset(),
        map_draws: Map = map,
        apart_from: Collection[Hashable] = frozenset(),
    ) -> Split:
        """Makes problems for training, validation and test; by default random ones.

        Args:
          train: number of training problems; a small task may have fewer.
          heldout: number of problems for validation, and as many for test. They are set aside
            first.
          seed: decides which problems are drawn; the result depends on nothing else.
          exclude: keys that no problem of the split may have.
          map_draws: applies `draw` to many seeds, in order, for example on several cores.
          apart_from: groups that no problem of the split may be of.

        Raises:
          UsageError: the task has fewer problems than are needed.
        """
        from apr_jax.tasks.splits import split_by_draws

        return split_by_draws(
            self.draw, self.key, self.group, train, heldout, seed, exclude, map_draws, apart_from
        )

    def check(self, problem: Problem) -> Problem:
        """Checks a problem that comes from a file, and returns it in the form that the task uses.

        Raises:
          ValueError: a field of `problem.data` is wrong; the message names the field, its value,
            and what would be right.
        """
        return problem

    def parse(self, text: str) -> Problem:
        """Reads a problem as a user writes it on the command line; by default its data as JSON.

        Raises:
          UsageError: the text is no problem; the message says why, and how to write one.
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
        """Returns the problem in one line for people; by default the prompt."""
        return self.prompt(problem)

    @property
    def example(self) -> str:
        """A line of a problems file, for messages about wrong ones."""
        return json.dumps(self.draw(0).to_json())
