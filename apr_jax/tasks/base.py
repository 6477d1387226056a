"""What a task gives to the rest: problems, prompts, demonstrations and a verifier, all as plain
text.

Nothing here knows tokens or JAX. A demonstration is a tree of `Thread`s; `data/` turns it into
token streams."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, Self


@dataclasses.dataclass(frozen=True)
class Problem:
    """One Countdown-like problem; `id` names it in files and reports."""

    id: str
    numbers: tuple[int, ...]
    target: int


@dataclasses.dataclass(frozen=True)
class Spawn:
    """A spawn in a thread's body: each child's prompt is its message, each child's answer is joined
    back.
    """

    children: tuple[Thread, ...]


@dataclasses.dataclass(frozen=True)
class Thread:
    """One demonstrated thread.

    Attributes:
      prompt: text the thread is given: the problem for the root, the message for a child.
      body: what it writes, text and spawns in order.
      answer: what it joins; empty for "no solution".
      condition: what the prompt of a root asks for, None for nothing (`Task.prompt`). The text says
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
class Verdict:
    """Outcome of checking an answer.

    Attributes:
      solution: the equations as written, or None when the answer claims no solution.
      claimed: whether the answer claims one.
      correct: whether every step of it holds.
      reason: why it is wrong, in a few words; empty when correct.
    """

    solution: tuple[str, ...] | None
    claimed: bool
    correct: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A wrong piece of a trace.

    Attributes:
      kind: "arithmetic", "bookkeeping" (numbers lost or made up, a state left out) or "message" (to
        a child).
      text: the piece.
      decisive: whether the solution could have been found from what was lost by it.
    """

    kind: str
    text: str
    decisive: bool


@dataclasses.dataclass(frozen=True)
class Reading:
    """What an examined thread did.

    Attributes:
      faults: in the order of the trace.
      found: whether a right solution stands in the trace, whatever was joined.
      hopeful: whether its start has a solution at all.
    """

    faults: tuple[Fault, ...]
    found: bool
    hopeful: bool


class Task(Protocol):
    """The interface that data building, RL and evaluation use."""

    def settings(self) -> dict[str, Any]:
        """JSON from which `from_settings` makes an equal task, in the process that verifies."""
        ...

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """The task that has these `settings`."""
        ...

    @property
    def alphabet(self) -> str:
        """Every character that prompts, messages, traces and answers can hold: the tokenizer knows
        them all, whatever the demonstrations that it is trained on happen to hold."""
        ...

    @property
    def phrases(self) -> tuple[str, ...]:
        """Strings that a trace repeats word for word: the tokenizer makes one piece of each."""
        ...

    def prompt(self, problem: Problem, condition: int | None = None) -> str:
        """The root's prompt. `condition`: wanted children (APR) or window bins (SoS+); None states
        no wish.
        """
        ...

    def demonstration(self, problem: Problem, method: str, seed: int) -> Thread:
        """A demonstration by a symbolic solver; `method` is one of `solvers.METHODS`."""
        ...

    def verify(self, problem: Problem, answer: str) -> Verdict:
        """Checks an answer; never raises, whatever the text."""
        ...

    def examine(self, problem: Problem, thread: Thread, cut: bool) -> Reading | None:
        """What is wrong in one thread's own text, children aside; `cut`: it was stopped from
        outside. The root's prompt is empty. Never raises, whatever the text; None if the task
        cannot read such traces."""
        ...
