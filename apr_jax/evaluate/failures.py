"""What went wrong in a tree, as one word, from its trace and the task alone.

The life of a verdict on a wrong tree, first rule that holds:
1. Its root ran out of window or budget: `truncated`; broke the protocol: `malformed`.
2. A right solution stood in some thread, but did not become the answer: `belief` if the root
   answers what another of its children claimed; `truncated` if that thread was cut short, else
   `join` (the child did not join it, or the parent dropped it or copied it wrongly).
3. It claims a solution that is wrong: the kind of the first fault in the tree, or `claim` if there
   is none.
4. The first event that lost the solution: a decisive fault (its kind is the task's word:
   `Task.fault_kinds`), a thread that was `truncated` or `malformed`, a message that was `refused` a
   thread; the latter count if their state had a solution.
5. Nothing of it: every step was legal, and what leads to the solution was never searched:
   `coverage`.

The order of events is that of the sequential clock at which a thread began. Where the task cannot
read the traces, rules 1 to 4 see what the protocol shows, and 5 is called `search`."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import Any

from apr_jax.evaluate.scores import CUT, Trace
from apr_jax.tasks import Diagnosis, Problem, Spawn, Task, Thread
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
_BROKEN = ("MALFORMED", "NO_ANSWER")
_CONTROL = re.compile("|".join(map(re.escape, CONTROL_PIECES)))


def kinds(task: Task) -> dict[str, str]:
    """Kind of failure -> what it means: those of the task's own traces first."""
    return {**task.fault_kinds, **KINDS}


def failure(trace: Trace, task: Task) -> str:
    """The kind of failure, a key of `kinds`; "" for a right answer."""
    if trace["correct"]:
        return ""
    problem = Problem(trace["id"], trace["data"])
    root = trace["threads"][0]
    ended = _end(root["status"])
    if ended:
        return ended
    threads = {thread["thread_index"]: as_thread(thread) for thread in trace["threads"]}
    readings = {
        thread["thread_index"]: task.diagnose(
            problem, threads[thread["thread_index"]], bool(_end(thread["status"]))
        )
        for thread in trace["threads"]
    }
    joined = {
        threads[thread["thread_index"]].answer
        for thread in trace["threads"]
        if thread["parent"] == root["thread_index"]
    }
    believed = trace["claimed"] and threads[root["thread_index"]].answer in joined
    if believed and any(task.score(problem, answer).correct for answer in joined):
        return "belief"
    for thread in trace["threads"]:
        reading = readings[thread["thread_index"]]
        answer = threads[thread["thread_index"]].answer
        if (reading and reading.found) or (
            thread["thread_index"] and task.score(problem, answer).correct
        ):
            return _end(thread["status"]) or "join"
    ordered = sorted(trace["threads"], key=lambda thread: (thread["start"], thread["thread_index"]))
    faults = [
        fault
        for thread in ordered
        if (read := readings[thread["thread_index"]])
        for fault in read.faults
    ]
    if trace["claimed"]:
        return faults[0].kind if faults else "claim"
    lost = (
        kind
        for thread in ordered
        for kind in (
            *_losses(thread, readings[thread["thread_index"]]),
            *(
                "refused"
                for message in refused(thread, trace["threads"])
                if _is_hopeful(message, problem, task)
            ),
        )
    )
    return next(lost, "search" if readings[root["thread_index"]] is None else "coverage")


def label(traces: Iterable[Trace], task: Task) -> list[Trace]:
    """The traces with their `failure`."""
    return [trace | {"failure": failure(trace, task)} for trace in traces]


def count(traces: Iterable[Trace]) -> dict[str, int]:
    """Kind -> labelled trees of it, the most frequent first; right answers aside."""
    return dict(
        collections.Counter(trace["failure"] for trace in traces if trace["failure"]).most_common()
    )


def refused(thread: dict[str, Any], threads: list[dict[str, Any]]) -> list[str]:
    """The messages of closed spawns that got no thread: those of a block are started in order, so
    its last ones.
    """
    blocks = [
        text for kind, text in thread["spans"] if kind == "spawn" and text.endswith("</spawn>")
    ]
    started = collections.Counter(
        one["round"] for one in threads if one["parent"] == thread["thread_index"]
    )
    return [
        message
        for place, block in enumerate(blocks)
        for message in _messages(block)[started[place] :]
    ]


def _messages(block: str) -> list[str]:
    """The messages of a spawn block, as text."""
    return [_CONTROL.split(part, maxsplit=1)[0] for part in block.split(_MESSAGE)[1:]]


def as_thread(thread: dict[str, Any]) -> Thread:
    """A traced thread in the form of a demonstrated one; its children have a prompt alone."""
    body: list[str | Spawn] = []
    answer = ""
    prompt = ""
    for kind, text in thread["spans"]:
        if kind == "given" and not body:
            prompt = text
        elif kind == "sampled":
            body.append(_CONTROL.split(text, maxsplit=1)[0])
        elif kind == "spawn":
            body.append(Spawn(tuple(Thread(message, (), "") for message in _messages(text))))
        elif kind == "join" and thread["status"] == "DONE":
            answer = text.removeprefix("<join>")
    # A child that was told nothing is no root.
    return Thread(
        (prompt or "<msg>") if thread["depth"] else "", tuple(part for part in body if part), answer
    )


def _losses(thread: dict[str, Any], reading: Diagnosis | None) -> Iterable[str]:
    """Kinds of what lost the solution in one thread's own text, in order."""
    yield from (fault.kind for fault in (reading.faults if reading else ()) if fault.decisive)
    if (ended := _end(thread["status"])) and (reading is None or reading.hopeful):
        yield ended


def _is_hopeful(message: str, problem: Problem, task: Task) -> bool:
    reading = task.diagnose(problem, Thread(message, (), ""), True)
    return reading is None or reading.hopeful


def _end(status: str) -> str:
    """What a status other than DONE says."""
    return "truncated" if status in CUT else "malformed" if status in _BROKEN else ""
