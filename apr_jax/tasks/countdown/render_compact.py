"""Compact traces: the fewest tokens that still say everything.

    22,26:2,7|+48|-4|*572     two numbers of a state, the others, what operations make of them
    |+50+57-43*               a successor of two numbers, and these combined: operator and result
    |-46+53-39!               up to the hit, which is marked
    ;                         between groups; a group begins anew when the search comes back to it
    >48,2,7                   a state taken from the queue; what follows is its expansion
    22+26,2,7:46              a child's message: a step without its result, other numbers, target
    22+26=48;48+2,7:46        the same below earlier steps, which belong to the path that it joins

A pair of numbers is written once for all its operations, which saves a sixth of the tokens at four
numbers. The mark of a hit costs a token and saves the reader a puzzle: without it, the last
operator's `<join>` follows hits and misses alike, and a small model learns to overlook the rarer
hits. Where two numbers are combined, a result with more digits than the target can't be it and is
left out (`*`): it would be a large product that can't be learned and decides nothing.

A child first works out its result (`=48`) and then searches. Answers are equations joined by
commas; "" is no solution."""

from collections.abc import Iterable

from apr_jax.tasks.base import Spawn, Thread
from apr_jax.tasks.countdown.events import Enter, Fork, Generate, Node, Search, State, Step, Test
from apr_jax.tasks.countdown.puzzle import Puzzle

HIT = "!"
NODE = "|"
PHRASES: tuple[
    str, ...
] = ()  # Nothing is repeated word for word: the tokenizer takes single characters.
# Every character that a prompt, a message, a trace or an answer can hold.
ALPHABET = f"0123456789+-*/=,:;>#{HIT}{NODE}"


def _numbers(numbers: State) -> str:
    return ",".join(map(str, numbers))


def answer_text(solution: Iterable[Step] | None) -> str:
    """What a thread joins, in every render."""
    return ",".join(step.equation for step in solution or ())


def prompt_text(puzzle: Puzzle, condition: int | None) -> str:
    """`22,26,2:46`, with a condition `22,26,2:46#3`."""
    suffix = "" if condition is None else f"#{condition}"
    return f"{_numbers(puzzle.numbers)}:{puzzle.target}{suffix}"


def message_text(node: Node, target: int) -> str:
    """What a parent tells the child that gets `node`."""
    *earlier, last = node.path
    path = answer_text(earlier) + ";" if earlier else ""
    return f"{path}{','.join((last.expression, *map(str, node.state[1:])))}:{target}"


class _Trace:
    """The text of one thread in the making."""

    def __init__(self, text: str):
        self.text = text
        self._group: tuple[Node | tuple[Step, ...], State] | None = None

    def line(self, text: str) -> None:
        """Begins a new part."""
        self.text += f";{text}" if self.text else text
        self._group = None

    def successor(self, node: Node) -> None:
        """A step and its result, under the head of its group unless that is where the trace
        stands.
        """
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
        """The last two numbers combined."""
        shown = "" if len(str(step.result)) > len(str(target)) else str(step.result)
        self.text += f"{step.op}{shown}{HIT if step.result == target else ''}"


def render(search: Search, prompt: str, target: int) -> Thread:
    """The thread of a search, children included.

    Args:
      search: what the thread did.
      prompt: the text it was given.
      target: of the problem; messages to children carry it.
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
            body.append(
                Spawn(
                    tuple(
                        render(child, message_text(child.root, target), target)
                        for child in event.children
                    )
                )
            )
            trace = _Trace("")
    if trace.text:
        body.append(trace.text)
    return Thread(prompt, tuple(body), answer_text(search.solution))
