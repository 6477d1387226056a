"""What went wrong in a tree, as one word, from its trace and the task alone.

The first of these rules that holds for a wrong tree names its failure:
1. The root ran out of window or budget (`truncated`), or broke the protocol (`malformed`).
2. Some thread stated a right solution, but it did not become the tree's answer. The failure is
   `belief` if the root answers with what another of its children claimed. Otherwise it is what
   ended that thread early (`truncated`, `malformed`), or else `join`: the child did not join the
   solution, or the parent dropped it or copied it wrongly. Where children solve parts of the
   problem (`Task.children_solve_parts`), their answers are no solutions, so only what
   `Task.diagnose` finds counts.
3. The tree claims a wrong solution. The failure is the kind of the first fault in the tree, or
   `claim` if there is no fault.
4. The solution was lost. The failure is the first event that lost it: a decisive fault, whose kind
   is one of the task's words (`Task.fault_kinds`); a thread that was `truncated` or `malformed`; or
   a message that was `refused` a thread. The last two count only where the solution could still
   have been found.
5. Every step was right, and what leads to the solution was never searched: `coverage`.

Events are ordered by the sequential clock at which their thread began. If the task cannot read
traces (`Task.diagnose` returns None), rules 1 to 4 use what the protocol shows, and the failure of
rule 5 is called `search`.

Rule 2 scores what threads joined. That is text of a model, so a task whose verifier is not ours
scores it in processes of its own (`sandboxed`).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from apr_jax.evaluate.scores import CUT, Trace
from apr_jax.tasks import (
    Diagnosis,
    Fault,
    Problem,
    SandboxedVerifier,
    Score,
    Spawn,
    Task,
    Thread,
)
from apr_jax.text.tokenizer import CONTROL_PIECES, MSG

KINDS = {
    "belief": "the root took a child's false solution, though another child had joined a right one",
    "join": "a right solution stood in the tree and did not become the answer otherwise",
    "claim": "a wrong solution is claimed, and no wrong step led to it",
    "coverage": "every step is right, and what leads to the solution was never searched",
    "search": "no solution was found; this task's traces are not read",
    "truncated": "a thread ran out of window or budget",
    "malformed": "a thread broke the protocol",
    "refused": "a message got no thread",
}
_MESSAGE = CONTROL_PIECES[MSG]
_MALFORMED = ("MALFORMED", "NO_ANSWER")  # How a thread ended that broke the protocol.
_CONTROL = re.compile("|".join(map(re.escape, CONTROL_PIECES)))


def kinds(task: Task) -> dict[str, str]:
    """Returns all kinds of failure with their meanings, those of the task's own traces first."""
    return {**task.fault_kinds, **KINDS}


IsRight = Callable[[Problem, str], bool]  # Whether an answer solves a problem.


def sandboxed(traces: Iterable[Trace], task: Task, verifier: SandboxedVerifier) -> IsRight:
    """Scores what the threads of wrong trees joined, in the processes of a verifier.

    Returns:
      a function for `failure` and `label` of these traces. An answer without a score is not right.
    """
    joined = {
        (trace["id"], as_thread(traced).answer): Problem(trace["id"], trace["data"])
        for trace in traces
        if not trace["correct"] and not task.children_solve_parts
        for traced in trace["threads"][1:]
    }
    outcomes = verifier.verify([(problem, answer) for (_, answer), problem in joined.items()])
    right = {
        key
        for key, outcome in zip(joined, outcomes, strict=True)
        if isinstance(outcome, Score) and outcome.correct
    }
    return lambda problem, answer: (problem.id, answer) in right


def failure(trace: Trace, task: Task, is_right: IsRight | None = None) -> str:
    """Returns the kind of a tree's failure, a key of `kinds`; "" if its answer is right.

    Args:
      trace: the tree.
      task: its task.
      is_right: scores what threads joined; None takes the task's verifier, in this process.
    """
    if trace["correct"]:
        return ""
    problem = Problem(trace["id"], trace["data"])
    ended_early = _early_end(trace["threads"][0]["status"])
    if ended_early:
        return ended_early

    readings = [_read(traced, problem, task) for traced in trace["threads"]]
    is_right = is_right or (lambda problem, answer: task.score(problem, answer).correct)
    unused = _unused_solution(trace, problem, readings, task, is_right)
    if unused:
        return unused

    in_order = sorted(readings, key=lambda reading: (reading.traced["start"], reading.thread_index))
    if trace["claimed"]:
        faults = (fault for reading in in_order for fault in reading.faults)
        first_fault = next(faults, None)
        return "claim" if first_fault is None else first_fault.kind

    for reading in in_order:
        for loss in _losses(reading, trace, problem, task):
            return loss
    return "search" if readings[0].diagnosis is None else "coverage"


def label(traces: Iterable[Trace], task: Task, is_right: IsRight | None = None) -> list[Trace]:
    """Returns the traces with the kind of each tree's failure as `failure`."""
    return [trace | {"failure": failure(trace, task, is_right)} for trace in traces]


def count(traces: Iterable[Trace]) -> dict[str, int]:
    """Counts the labelled trees of each kind of failure, the most frequent kind first."""
    failures = collections.Counter(trace["failure"] for trace in traces if trace["failure"])
    return dict(failures.most_common())


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A thread of a trace, as the task reads it.

    Attributes:
      traced: the thread in the trace.
      thread: the same in the form of a demonstrated thread.
      diagnosis: what the task says of it; None if the task cannot read traces.
    """

    traced: dict[str, Any]
    thread: Thread
    diagnosis: Diagnosis | None

    @property
    def thread_index(self) -> int:
        """The thread's index in its tree."""
        return int(self.traced["thread_index"])

    @property
    def ended_early(self) -> str:
        """What ended the thread early, "truncated" or "malformed"; "" if nothing did."""
        return _early_end(self.traced["status"])

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The wrong pieces of its text, in their order."""
        return self.diagnosis.faults if self.diagnosis else ()

    @property
    def states_solution(self) -> bool:
        """Whether a right solution stands in its text."""
        return self.diagnosis is not None and self.diagnosis.found

    @property
    def is_hopeful(self) -> bool:
        """Whether a solution could be found from its start; True if the task cannot tell."""
        return self.diagnosis is None or self.diagnosis.hopeful


def _read(traced: dict[str, Any], problem: Problem, task: Task) -> _Reading:
    """Lets the task read a thread of a trace."""
    thread = as_thread(traced)
    is_cut = bool(_early_end(traced["status"]))
    return _Reading(traced, thread, task.diagnose(problem, thread, is_cut))


def _unused_solution(
    trace: Trace, problem: Problem, readings: list[_Reading], task: Task, is_right: IsRight
) -> str:
    """Applies rule 2: says why a right solution in the tree is not its answer; "" without one."""
    root = readings[0]
    joined = {
        reading.thread.answer
        for reading in readings
        if reading.traced["parent"] == root.thread_index and not task.children_solve_parts
    }
    took_a_childs = trace["claimed"] and root.thread.answer in joined
    if took_a_childs and any(is_right(problem, answer) for answer in joined):
        return "belief"

    for reading in readings:
        may_solve = reading.thread_index != 0 and not task.children_solve_parts
        if reading.states_solution or (may_solve and is_right(problem, reading.thread.answer)):
            return reading.ended_early or "join"
    return ""


def _losses(reading: _Reading, trace: Trace, problem: Problem, task: Task) -> Iterator[str]:
    """Yields the kind of each event in a thread that lost the solution (rule 4), in their order."""
    for fault in reading.faults:
        if fault.decisive:
            yield fault.kind
    if reading.ended_early and reading.is_hopeful:
        yield reading.ended_early
    for message in refused(reading.traced, trace["threads"]):
        if _is_hopeful(message, problem, task):
            yield "refused"


def _is_hopeful(message: str, problem: Problem, task: Task) -> bool:
    """Whether a child with this message could find a solution; True if the task cannot tell."""
    diagnosis = task.diagnose(problem, Thread(message, (), ""), True)
    return diagnosis is None or diagnosis.hopeful


def refused(thread: dict[str, Any], threads: list[dict[str, Any]]) -> list[str]:
    """Returns the messages of a thread's closed spawns that got no thread.

    The messages of a spawn are started in order, so the refused ones are its last.

    Args:
      thread: the thread that spawned.
      threads: all threads of the trace.
    """
    blocks = [
        text for kind, text in thread["spans"] if kind == "spawn" and text.endswith("</spawn>")
    ]
    started = collections.Counter(
        child["round"] for child in threads if child["parent"] == thread["thread_index"]
    )
    messages: list[str] = []
    for spawn_round, block in enumerate(blocks):
        messages += _messages(block)[started[spawn_round] :]
    return messages


def _messages(block: str) -> list[str]:
    """Returns the messages of a spawn block, as text."""
    return [_CONTROL.split(part, maxsplit=1)[0] for part in block.split(_MESSAGE)[1:]]


def as_thread(thread: dict[str, Any]) -> Thread:
    """Turns a traced thread into the form of a demonstrated one.

    Of the children that it spawns, only the messages are kept.
    """
    prompt = ""
    body: list[str | Spawn] = []
    answer = ""
    for kind, text in thread["spans"]:
        if kind == "given" and not body:
            prompt = text
        elif kind == "sampled":
            body.append(_CONTROL.split(text, maxsplit=1)[0])
        elif kind == "spawn":
            body.append(Spawn(tuple(Thread(message, (), "") for message in _messages(text))))
        elif kind == "join" and thread["status"] == "DONE":
            answer = text.removeprefix("<join>")

    # A task knows a root by its empty prompt, so a child without a message needs another one.
    if not thread["depth"]:
        prompt = ""
    elif not prompt:
        prompt = _MESSAGE
    return Thread(prompt, tuple(part for part in body if part), answer)


def _early_end(status: str) -> str:
    """Returns what ended a thread early, "truncated" or "malformed"; "" if nothing did."""
    if status in CUT:
        return "truncated"
    if status in _MALFORMED:
        return "malformed"
    return ""
