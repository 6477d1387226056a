"""What trees would cost on any number of decode slots, from their traces alone.

A decode slot decodes one token a step. A tree of `total` tokens whose longest chain has
`sequential` tokens takes `total` steps on one decode slot, and never fewer than `sequential` steps.
This is Amdahl's law: decode slots gain a factor of total / sequential at most. In between, threads
wait for decode slots, and `steps_on` simulates that. With measured seconds of a step, `seconds_on`
turns steps into seconds.
"""

from __future__ import annotations

import collections
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from apr_jax.evaluate.scores import Trace

# A number of decode steps, and the thread indices of the children that are spawned after them.
Segment = tuple[int, list[int]]


def segments(trace: Trace) -> dict[int, list[Segment]]:
    """Splits each thread into the stretches that it decodes between its spawns.

    A thread stops while its children run, and goes on at the step at which the last of them ends.

    Returns:
      thread index -> its stretches in time order. The last one spawns no children.
    """
    # Thread index of the parent -> number of the spawn -> children.
    spawns: dict[int, dict[int, list[Trace]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for thread in trace["threads"]:
        spawns[thread["parent"]][thread["round"]].append(thread)

    segments_of = {}
    for thread in trace["threads"]:
        clock = thread["start"]
        stretches: list[Segment] = []
        for _, children in sorted(spawns[thread["thread_index"]].items()):
            steps = children[0]["start"] - clock
            stretches.append((steps, [child["thread_index"] for child in children]))
            clock = max(child["end"] for child in children)
        stretches.append((max(0, thread["end"] - clock), []))
        segments_of[thread["thread_index"]] = stretches
    return segments_of


def steps_on(trace: Trace, slots: int) -> int:
    """Counts the decode steps of one tree on `slots` decode slots.

    The thread that was ready first gets the next free decode slot, and keeps it until it waits for
    children or ends. On one decode slot the steps are `total_tokens`; on as many as there are
    threads, `sequential_tokens`.
    """
    stretches = segments(trace)
    parent = {thread["thread_index"]: thread["parent"] for thread in trace["threads"]}
    next_stretch = dict.fromkeys(stretches, 0)  # Thread index -> number of its next stretch.
    unfinished: dict[int, int] = {}  # Waiting thread -> number of its children that still run.
    ready = collections.deque([0])
    running: list[tuple[int, int]] = []  # A heap of (step at which it stops, thread index).
    now = 0

    while ready or running:
        while ready and len(running) < slots:
            thread_index = ready.popleft()
            steps, _ = stretches[thread_index][next_stretch[thread_index]]
            heapq.heappush(running, (now + steps, thread_index))

        now, thread_index = heapq.heappop(running)
        _, children = stretches[thread_index][next_stretch[thread_index]]
        next_stretch[thread_index] += 1
        if children:
            unfinished[thread_index] = len(children)
            ready.extend(children)
        elif thread_index != 0:
            waiting = parent[thread_index]
            unfinished[waiting] -= 1
            if unfinished[waiting] == 0:
                ready.append(waiting)
    return now


def mean_steps(traces: Sequence[Trace], slots: Sequence[int]) -> list[float]:
    """Returns the mean of `steps_on` over the trees, for each number of decode slots."""
    trees = max(1, len(traces))
    return [sum(steps_on(trace, count) for trace in traces) / trees for count in slots]


def seconds_on(
    traces: Sequence[Trace], slots: Sequence[int], step_seconds: Mapping[int, float]
) -> list[float]:
    """Returns the mean seconds of a tree, for each number of decode slots.

    They are the mean number of steps, times the seconds of a step on so many decode slots.

    Args:
      traces: the trees.
      slots: numbers of decode slots.
      step_seconds: number of decode slots -> measured seconds of a decode step, prefills included
        (`latency.measure_slots`). Between measured numbers, seconds are interpolated.
    """
    measured = sorted(step_seconds)
    seconds = np.interp(slots, measured, [step_seconds[count] for count in measured])
    steps = mean_steps(traces, slots)
    return [count * float(step) for count, step in zip(steps, seconds, strict=True)]
