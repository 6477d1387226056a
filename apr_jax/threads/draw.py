"""A thread tree as lines of text, one line a thread, over the steps of the sequential clock.

    root   ━━━━━━━┳┄┄┄┄┄┄┄┄┄┄┻━━━━╸
    └ 1           ━━━━━━━╸
    └ 2           ━━━━━━━━━━━╸

Marks below each other happen at the same time. `━` samples a token, `┳` closes a spawn block, `┄`
waits for the children, `┻` reads what they joined, `╸` ends.
"""

import numpy as np

from apr_jax.threads import protocol
from apr_jax.threads.forest import NO_PARENT, ROOT, Status, ThreadForest

_WORKS, _SPAWNS, _WAITS, _JOINS, _ENDS = "━┳┄┻╸"


def thread_names(forest: ThreadForest, tree: int) -> dict[int, str]:
    """Names the threads of a tree by thread index: "root", or "└ 3" indented by depth.

    Children stand below their parents, in the order of their spawns.
    """
    status = np.asarray(forest.status)[tree]
    parent = np.asarray(forest.parent)[tree]
    depth = np.asarray(forest.depth)[tree]
    children: dict[int, list[int]] = {}
    for thread_index in map(int, np.flatnonzero(status != Status.FREE)):
        children.setdefault(int(parent[thread_index]), []).append(thread_index)

    names: dict[int, str] = {}

    def add(thread_index: int) -> None:
        if thread_index == ROOT:
            names[thread_index] = "root"
        else:
            indent = "  " * (int(depth[thread_index]) - 1)
            names[thread_index] = f"{indent}└ {thread_index}"
        for child in children.get(thread_index, []):
            add(child)

    for root in children[NO_PARENT]:
        add(root)
    return names


def draw_tree(
    forest: ThreadForest, tree: int, width: int = 72, until: int | None = None
) -> dict[int, str]:
    """Draws the line of each thread of a tree, by thread index in the order of `thread_names`.

    Args:
      forest: numpy leaves.
      tree: which tree of the forest.
      width: the most columns; a tree of more steps is drawn to scale.
      until: draws only the steps before this one, for an animation.
    """
    steps = max(1, int(np.asarray(forest.end)[tree].max()))
    columns_a_step = min(1.0, width / steps)
    shown = steps if until is None else until

    lines = {}
    for thread_index in thread_names(forest, tree):
        line = [" "] * (int(steps * columns_a_step) + 1)
        for step, mark in _marks(forest, tree, thread_index):
            column = int(step * columns_a_step)
            # Where steps share a column, a spawn, a join or an end is what a reader looks for.
            is_free = line[column] in " ━┄" or mark not in "━┄"
            if step < shown and is_free:
                line[column] = mark
        lines[thread_index] = "".join(line).rstrip()
    return lines


def _marks(forest: ThreadForest, tree: int, thread_index: int) -> list[tuple[int, str]]:
    """Returns the marks of one thread as (step, mark), in time order."""
    tokens = np.asarray(forest.tokens)[tree, thread_index]
    sampled = np.asarray(forest.sampled)[tree, thread_index]
    parent = np.asarray(forest.parent)[tree]
    rounds = np.asarray(forest.round)[tree]
    ends = np.asarray(forest.end)[tree]

    marks = []
    clock = int(forest.start[tree, thread_index])
    joins = 0
    for place in range(int(forest.length[tree, thread_index])):
        if sampled[place]:
            marks.append((clock, _SPAWNS if tokens[place] == protocol.END_SPAWN else _WORKS))
            clock += 1
        elif tokens[place] == protocol.END_JOINED:
            joined = (parent == thread_index) & (rounds == joins)
            resumed = max(clock, int(ends[joined].max(initial=0)))
            marks += [(step, _WAITS) for step in range(clock, resumed)]
            marks.append((max(clock, resumed - 1), _JOINS))
            clock = resumed
            joins += 1

    # A thread may end while it waits.
    end = int(ends[thread_index])
    marks += [(step, _WAITS) for step in range(clock, end)]
    marks.append((max(0, end - 1), _ENDS))
    return marks
