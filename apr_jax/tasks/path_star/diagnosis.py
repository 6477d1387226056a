"""What is wrong in the text of one thread that looks for the goal.

The life of a diagnosis: what the thread searches is the problem, or its message, whose edges are
believed. Its text is a list of arms, each with a mark behind it: `!` says that it ends in the goal,
`.` that it does not. A thread that wrote no arm and spawned nobody is judged by its answer. What a
child answered is believed: whether that was right is the diagnosis of the child.
"""

from __future__ import annotations

import re

from apr_jax.tasks.base import Diagnosis, Fault, Spawn, Thread
from apr_jax.tasks.path_star.graph import Search, read, right_path, wrong_step

FOUND = "!"
NOT_FOUND = "."
FAULT_KINDS = {
    "edge": "a thread follows an edge that it was not given",
    "end": "an arm is given up before its end, or has no mark behind it",
    "goal": "an arm is said to end in the goal and does not, or the other way round",
    "message": "a child was told another graph or goal than the thread's, or no arm of it",
    "answer": "a thread joined another path than the one that it found",
}
_ARM = re.compile(r"([^.!]*)([.!]?)")


def diagnose(problem: Search, thread: Thread, cut: bool) -> Diagnosis:
    """Reads one thread; it never raises, whatever the text is.

    A fault is decisive if it lost the arm that ends in the goal.

    Args:
      problem: the path-star graph of the tree's problem.
      thread: the thread; the prompt of a root is empty, and what the children did is not looked at.
      cut: whether the thread was stopped before its end: what it left undone is no fault then.
    """
    search = problem
    if thread.prompt:
        try:
            search = read(thread.prompt)
        except ValueError:
            # Nobody knows what such a thread was to do. The fault is its parent's.
            return Diagnosis((), found=False, hopeful=False)

    right = right_path(problem)
    reader = _Reader(search, right)
    reader.messages([part for part in thread.body if isinstance(part, Spawn)])
    for index, part in enumerate(thread.body):
        if isinstance(part, str):
            reader.text(part, is_cut=cut and index == len(thread.body) - 1)
    if not cut:
        reader.answer(thread.answer)
    return Diagnosis(tuple(reader.faults), right in reader.claimed, reader.is_hopeful)


def _leads_to(search: Search, right: str) -> bool:
    """Whether a thread that searches without a fault finds the right path."""
    is_on_the_way = right.startswith(search.path) and search.goal == right[-1]
    return is_on_the_way and not wrong_step(search, right)


class _Reader:
    """One thread in the reading.

    Attributes:
      faults: the wrong pieces so far.
      claimed: the paths that the text says end in the goal.
      is_hopeful: whether the right path can be found from where the thread begins.
    """

    def __init__(self, search: Search, right: str):
        self._search = search
        self._right = right
        self.faults: list[Fault] = []
        self.claimed: list[str] = []
        self.is_hopeful = _leads_to(search, right)
        self._is_child = len(search.path) > 1
        self._has_children = False
        self._wrote_arms = False

    def messages(self, spawns: list[Spawn]) -> None:
        """Reads all messages; a wrong one is decisive unless a child is told the right arm."""
        messages = [child.prompt for spawn in spawns for child in spawn.children]
        self._has_children = bool(messages)
        wrong = []
        is_right_arm_told = False
        for message in messages:
            try:
                told = read(message)
            except ValueError:
                wrong.append(message)
                continue
            is_right_arm_told = is_right_arm_told or _leads_to(told, self._right)
            if not self._is_branch(told):
                wrong.append(message)
        for message in wrong:
            self._fault("message", message, decisive=not is_right_arm_told)

    def _is_branch(self, told: Search) -> bool:
        """Whether a child was told a branch of the search, with all edges that it needs."""
        branches = [branch for branch in self._search.branches if branch.path == told.path]
        return (
            bool(branches)
            and told.goal == self._search.goal
            and set(told.edges) <= set(self._search.edges)
            and not wrong_step(told, branches[0].follow())
        )

    def text(self, text: str, is_cut: bool) -> None:
        """Reads arms; the last one may be half an arm if the text `is_cut`."""
        for match in _ARM.finditer(text):
            nodes, mark = match.groups()
            if nodes or mark:
                self._wrote_arms = True
                self._arm(nodes, mark, is_unfinished=is_cut and not mark)

    def _arm(self, nodes: str, mark: str, is_unfinished: bool) -> None:
        """Reads one arm with its mark."""
        path = self._search.path + nodes
        if mark == FOUND:
            self.claimed.append(path)
        # A child was told its arm. A root shows by its first node which arm it follows.
        decisive = self._is_child or (bool(nodes) and self._right.startswith(path[:2]))
        invented = wrong_step(self._search, path)
        is_goal = path[-1] == self._search.goal
        goes_on = any(edge[0] == path[-1] for edge in self._search.edges)
        if invented:
            self._fault("edge", invented, decisive)
        elif is_unfinished:
            return
        elif not mark or (mark == NOT_FOUND and goes_on):
            self._fault("end", nodes + mark, decisive)
        elif is_goal != (mark == FOUND):
            self._fault("goal", nodes + mark, decisive)

    def answer(self, answer: str) -> None:
        """Reads the answer that the thread joined at its end."""
        if answer == self._right or self._has_children:
            return
        if self._wrote_arms:
            if answer not in (self.claimed or [""]):
                self._fault("answer", answer)
        elif answer:
            self._path(answer)
        elif self._is_child:
            self._fault("end", "nothing is written")

    def _path(self, answer: str) -> None:
        """Reads a path that is answered at once."""
        start = self._search.path
        invented = wrong_step(self._search, answer)
        if not answer.startswith(start):
            self._fault("edge", f"begins with {answer[: len(start)]}")
        elif invented:
            self._fault("edge", invented)
        elif answer[-1] != self._search.goal:
            self._fault("goal", answer)

    def _fault(self, kind: str, text: str, decisive: bool = True) -> None:
        self.faults.append(Fault(kind, text, decisive and self.is_hopeful))
