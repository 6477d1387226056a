"""Compact traces: the fewest tokens that still say everything.

    22+26=48,2      a node: the step, then the other numbers; the state is the result followed by them
    +50-46!         at two numbers: operator and result only, up to the hit, which is marked
    +50-46*         a result with more digits than the target can't be it and is left out
    ;               between nodes
    >48,2           a state taken from the queue; what follows is its expansion
    22+26,2:46      a child's message: the step without its result, the other numbers, the target
    3*4=12;6+7,12:9 the same below earlier steps, which the child needs for the whole path that it joins

The mark of a hit costs a token and saves the reader a puzzle: without it, the last operator's `<join>` follows hits and
misses alike, and a small model learns to overlook the rarer hits. Results that are left out save it from learning large
products that decide nothing.

A child first works out its result (`=48`) and then searches. Answers are equations joined by commas; "" is no solution.
"""

from collections.abc import Iterable

from apr_jax.tasks.base import Problem, Spawn, Thread
from apr_jax.tasks.events import Enter, Fork, Generate, Node, Search, State, Step, Test

HIT = "!"


def _numbers(numbers: State) -> str:
    return ",".join(map(str, numbers))


def answer_text(solution: Iterable[Step] | None) -> str:
    """What a thread joins, in every render."""
    return ",".join(step.equation for step in solution or ())


def prompt_text(problem: Problem, condition: int | None) -> str:
    """`22,26,2:46`, with a condition `22,26,2:46#3`."""
    suffix = "" if condition is None else f"#{condition}"
    return f"{_numbers(problem.numbers)}:{problem.target}{suffix}"


def message_text(node: Node, target: int) -> str:
    """What a parent tells the child that gets `node`."""
    *earlier, last = node.path
    path = answer_text(earlier) + ";" if earlier else ""
    return f"{path}{_headed(last.expression, node.state)}:{target}"


def _headed(head: str, state: State) -> str:
    """`head` stands for the state's first number, the others follow."""
    return ",".join((head, *map(str, state[1:])))


def _tested(result: int, target: int) -> str:
    if result == target:
        return f"{result}{HIT}"
    return "" if len(str(result)) > len(str(target)) else str(result)


def render(search: Search, prompt: str, target: int) -> Thread:
    """The thread of a search, children included.

    Args:
      search: what the thread did.
      prompt: the text it was given.
      target: of the problem; messages to children carry it.
    """
    body: list[str | Spawn] = []
    text = f"={search.root.path[-1].result}" if search.root.path else ""
    for event in search.events:
        if isinstance(event, Test):
            text += event.step.op + _tested(event.step.result, target)
        elif isinstance(event, Generate):
            line = _headed(event.node.path[-1].equation, event.node.state)
            text += f";{line}" if text else line
        elif isinstance(event, Enter) and event.queued:
            line = ">" + _numbers(event.node.state)
            text += f";{line}" if text else line
        elif isinstance(event, Fork):
            if text:
                body.append(text)
                text = ""
            body.append(
                Spawn(tuple(render(child, message_text(child.root, target), target) for child in event.children))
            )
    if text:
        body.append(text)
    return Thread(prompt, tuple(body), answer_text(search.solution))


def length(thread: Thread) -> int:
    """Characters that a serial thread writes: its trace, its join and its answer. The window condition counts them."""
    return sum(len(part) for part in thread.body if isinstance(part, str)) + 1 + len(thread.answer)
