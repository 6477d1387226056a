"""Compact traces: the text form of a search that takes the fewest tokens.

    22,26:2,7|+48|-4|*572     two numbers of a state, the other numbers, and what operations make
    |+50+57-43*               a successor of two numbers, and how these combine: operator and result
    |-46+53-39!               the same up to a hit, which is marked
    ;                         stands between groups
    >48,2,7                   a state that is taken from the queue; its expansion follows
    22+26,2,7:46              a child's message: a step without its result, other numbers, target
    22+26=48;48+2,7:46        the same below earlier steps, which belong to the child's solution

- A group writes a pair of numbers once for all its operations, which saves a sixth of the tokens at
  four numbers. It begins anew when the search comes back to it.
- The mark of a hit costs a token. Without it the last operator is followed by `<join>` after hits
  and misses alike, and a small model learns to overlook the hits, which are rarer.
- Where two numbers are combined, a result with more digits than the target cannot be the target and
  is left out (`*`). It would be a large product, which is hard to learn and decides nothing.

A child first works out the result of the step in its message (`=48`), and then searches. An answer
is the equations of a solution joined by commas, or "" if there is none. Where all solutions are
asked for, an answer joins them by `;`.
"""

from collections.abc import Iterable

from apr_jax.tasks.base import Spawn, Thread
from apr_jax.tasks.countdown.all_solutions import SOLUTION
from apr_jax.tasks.countdown.events import Enter, Fork, Generate, Node, Search, State, Step, Test
from apr_jax.tasks.countdown.puzzle import Puzzle

HIT = "!"  # Stands behind a step that makes the target.
NODE = "|"  # Stands before a successor.
# Nothing is repeated word for word, so that every character is a token.
PHRASES: tuple[str, ...] = ()
# Every character that a prompt, a message, a trace or an answer can hold.
ALPHABET = f"0123456789+-*/=,:;>#{HIT}{NODE}"


def _numbers(numbers: State) -> str:
    return ",".join(map(str, numbers))


def answer_text(solution: Iterable[Step] | None) -> str:
    """Returns what a thread joins, which is the same in every text form."""
    return ",".join(step.equation for step in solution or ())


def prompt_text(puzzle: Puzzle, condition: int | None) -> str:
    """Returns a prompt such as `22,26,2:46`, or `22,26,2:46#3` with a condition."""
    suffix = "" if condition is None else f"#{condition}"
    return f"{_numbers(puzzle.numbers)}:{puzzle.target}{suffix}"


def message_text(node: Node, target: int) -> str:
    """Returns the message to the child that is to search below a node."""
    *earlier, last = node.path
    path = answer_text(earlier) + ";" if earlier else ""
    others = map(str, node.state[1:])
    return f"{path}{','.join((last.expression, *others))}:{target}"


class _Trace:
    """The text of one thread while it is being written.

    Args:
      text: its beginning.
    """

    def __init__(self, text: str):
        self.text = text
        # The group that is being written: the steps before it, and its state with the pair first.
        self._group: tuple[tuple[Step, ...], State] | None = None

    def line(self, text: str) -> None:
        """Begins a new group, or writes a state of the queue."""
        if self.text:
            self.text += ";"
        self.text += text
        self._group = None

    def successor(self, node: Node) -> None:
        """Writes a step and its result, after the head of its group if that is another one."""
        *earlier, step = node.path
        rest = node.state[1:]
        pair = tuple(sorted((step.a, step.b)))
        group = (tuple(earlier), (*pair, *rest))
        if group != self._group:
            head = f"{step.a},{step.b}"
            self.line(f"{head}:{_numbers(rest)}" if rest else head)
            self._group = group
        self.text += f"{NODE}{step.op}{step.result}"

    def test(self, step: Step, target: int) -> None:
        """Writes how the last two numbers are combined."""
        result = str(step.result)
        if len(result) > len(str(target)):
            result = ""
        mark = HIT if step.result == target else ""
        self.text += f"{step.op}{result}{mark}"


def render(search: Search, prompt: str, target: int) -> Thread:
    """Returns the thread of a search, children included.

    Args:
      search: what the thread did.
      prompt: the text that the thread was given.
      target: the target of the problem, which messages to children hold.
    """
    body: list[str | Spawn] = []
    trace = _Trace(f"={search.root.path[-1].result}" if search.root.path else "")
    for event in search.events:
        if isinstance(event, Test):
            trace.test(event.step, target)
        elif isinstance(event, Generate):
            trace.successor(event.node)
        elif isinstance(event, Enter) and event.queued:
            trace.line(">" + _numbers(event.node.state))
        elif isinstance(event, Fork):
            if trace.text:
                body.append(trace.text)
            children = (
                render(child, message_text(child.root, target), target) for child in event.children
            )
            body.append(Spawn(tuple(children)))
            trace = _Trace("")
    if trace.text:
        body.append(trace.text)
    return Thread(prompt, tuple(body), SOLUTION.join(map(answer_text, search.solutions)))
