"""A thread tree as lines of text: threads as lanes over decode steps.

    root   ━━━━━━━┳┄┄┄┄┄┄┄┄┄┄┻━━━━╸
    └ 1           ━━━━━━━╸
    └ 2           ━━━━━━━━━━━╸

A step is a place on the sequential clock: threads above each other work at the same time. `┳`
closes a spawn block, `┄` waits for the children, `┻` reads what they joined, `╸` ends."""

import numpy as np

from apr_jax.threads import protocol
from apr_jax.threads.forest import NO_PARENT, ROOT, Status, ThreadForest

_WORKS, _SPAWNS, _WAITS, _JOINS, _ENDS = "━┳┄┻╸"


def thread_names(forest: ThreadForest, tree: int) -> dict[int, str]:
    """Slot -> "root" or "└ slot", indented by depth; children stand below their parents, in the
    order of their spawns.
    """
    status, parent = np.asarray(forest.status)[tree], np.asarray(forest.parent)[tree]
    depth = np.asarray(forest.depth)[tree]
    children: dict[int, list[int]] = {}
    for thread_index in map(int, np.flatnonzero(status != Status.FREE)):
        children.setdefault(int(parent[thread_index]), []).append(thread_index)
    names: dict[int, str] = {}

    def add(thread_index: int) -> None:
        names[thread_index] = (
            "root"
            if thread_index == ROOT
            else "  " * (int(depth[thread_index]) - 1) + f"└ {thread_index}"
        )
        for child in children.get(thread_index, []):
            add(child)

    for root in children[NO_PARENT]:
        add(root)
    return names


def draw_tree(
    forest: ThreadForest, tree: int, width: int = 72, until: int | None = None
) -> dict[int, str]:
    """Slot -> its lane, in the order of `thread_names`.

    Args:
      forest: numpy leaves.
      width: columns at most; a tree of more steps than that is drawn to scale.
      until: draw only the first so many steps, for an animation.
    """
    steps = max(1, int(np.asarray(forest.end)[tree].max()))
    scale = min(1.0, width / steps)
    shown = steps if until is None else until
    lanes = {}
    for thread_index in thread_names(forest, tree):
        lane = [" "] * (int(steps * scale) + 1)
        for step, mark in _marks(forest, tree, thread_index):
            # Where several steps share a column, a spawn, a join or an end is what one wants to
            # see.
            column = int(step * scale)
            if step < shown and (lane[column] in " ━┄" or mark not in "━┄"):
                lane[column] = mark
        lanes[thread_index] = "".join(lane).rstrip()
    return lanes


def _marks(forest: ThreadForest, tree: int, thread_index: int) -> list[tuple[int, str]]:
    """(step, mark) of one thread, in time order."""
    tokens, sampled = (
        np.asarray(forest.tokens)[tree, thread_index],
        np.asarray(forest.sampled)[tree, thread_index],
    )
    parent, rounds, ends = (
        np.asarray(field)[tree] for field in (forest.parent, forest.round, forest.end)
    )
    clock, joins, marks = int(forest.start[tree, thread_index]), 0, []
    for place in range(int(forest.length[tree, thread_index])):
        if sampled[place]:
            marks.append((clock, _SPAWNS if tokens[place] == protocol.END_SPAWN else _WORKS))
            clock += 1
        elif tokens[place] == protocol.END_JOINED:
            mine = (parent == thread_index) & (rounds == joins)
            resumed = max(clock, int(ends[mine].max(initial=0)))
            marks += [(step, _WAITS) for step in range(clock, resumed)]
            marks.append((max(clock, resumed - 1), _JOINS))
            clock, joins = resumed, joins + 1
    end = int(ends[thread_index])
    marks += [(step, _WAITS) for step in range(clock, end)]  # It ended while it waited.
    marks.append((max(0, end - 1), _ENDS))
    return marks
