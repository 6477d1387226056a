"""What trees cost on any number of decode slots: from their traces alone, or with measured seconds
of a step.

A decode slot decodes one token a step. A tree of `total` tokens whose longest chain has
`sequential` takes `total` steps on one decode slot and never fewer than `sequential`: Amdahl's law,
with total / sequential as the most that decode slots can gain. In between, threads wait for decode
slots; `steps_on` plays it through."""

from __future__ import annotations

import collections
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from apr_jax.evaluate.scores import Trace


def segments(trace: Trace) -> dict[int, list[tuple[int, list[int]]]]:
    """Slot -> stretches of decoding in time order, each as (steps, threads of the children that it
    spawns at its end).

    A parent's clock stands still while it waits; where it goes on is the end of its last child.
    """
    rounds: dict[int, dict[int, list[Trace]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for thread in trace["threads"]:
        rounds[thread["parent"]][thread["round"]].append(thread)
    found = {}
    for thread in trace["threads"]:
        clock, parts = thread["start"], []
        for _, children in sorted(rounds[thread["thread_index"]].items()):
            parts.append(
                (children[0]["start"] - clock, [child["thread_index"] for child in children])
            )
            clock = max(child["end"] for child in children)
        found[thread["thread_index"]] = [*parts, (max(0, thread["end"] - clock), [])]
    return found


def steps_on(trace: Trace, slots: int) -> int:
    """Decode steps of one tree on so many decode slots: whoever is ready first gets the next free
    decode slot and keeps it until it waits.

    On one decode slot this is `total_tokens`, on as many as threads `sequential_tokens`.
    """
    parts = segments(trace)
    parent = {thread["thread_index"]: thread["parent"] for thread in trace["threads"]}
    place = dict.fromkeys(parts, 0)
    missing: dict[int, int] = {}
    ready = collections.deque([0])
    running: list[tuple[int, int]] = []  # (step at which it stops, thread index)
    now = 0
    while ready or running:
        while ready and len(running) < slots:
            thread_index = ready.popleft()
            heapq.heappush(
                running, (now + parts[thread_index][place[thread_index]][0], thread_index)
            )
        now, thread_index = heapq.heappop(running)
        children = parts[thread_index][place[thread_index]][1]
        place[thread_index] += 1
        if children:
            missing[thread_index] = len(children)
            ready.extend(children)
        elif thread_index:
            above = parent[thread_index]
            missing[above] -= 1
            if not missing[above]:
                ready.append(above)
    return now


def mean_steps(traces: Sequence[Trace], slots: Sequence[int]) -> list[float]:
    """`steps_on` of the mean tree, one a number of decode slots."""
    return [
        sum(steps_on(trace, count) for trace in traces) / max(1, len(traces)) for count in slots
    ]


def seconds_on(
    traces: Sequence[Trace], slots: Sequence[int], step_seconds: Mapping[int, float]
) -> list[float]:
    """Seconds of the mean tree: steps times what a step of so many decode slots takes, interpolated
    between measured ones.

    Args:
      step_seconds: decode slots -> seconds of a decode step, admissions included
        (`evaluate/latency`).
    """
    known = sorted(step_seconds)
    each = np.interp(slots, known, [step_seconds[count] for count in known])
    return [
        steps * float(cost) for steps, cost in zip(mean_steps(traces, slots), each, strict=True)
    ]
