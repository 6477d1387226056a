"""Traces in the line format of Stream of Search (Gandhi et al. 2024) and of its hybrid.

The authors' parsers read them:

    Current State: 46:[22, 26, 2], Operations: []
    Exploring Operation: 22+26=48, Resulting Numbers: [2, 48]
    Generated Node #0,0: 46:[2, 48] Operation: 22+26=48
    Moving to Node #0,0
    Current State: 46:[2, 48], Operations: ['22+26=48']
    Exploring Operation: 48-2=46, Resulting Numbers: [46]
    46,46 equal: Goal Reached

A state is shown as these authors keep it: the numbers that are left over, and then the result. The
prompt is the first line. SoS+ puts the depth-first search below a node between the lines "Start Sub
Search" and "Exit Sub Search". In APR the control tokens take the place of the authors' lines
"<Calling Sub Searches>", and a child's message is the node to which it moves. Answers are those of
the compact form.
"""

from collections.abc import Sequence

from apr_jax.tasks.base import Spawn, Thread
from apr_jax.tasks.countdown.events import (
    Enter,
    Event,
    Fork,
    Generate,
    Leave,
    Node,
    Search,
    Step,
    Test,
)
from apr_jax.tasks.countdown.puzzle import Puzzle
from apr_jax.tasks.countdown.render_compact import answer_text

# Strings that the line format repeats word for word; the tokenizer makes a token of each.
PHRASES = (
    "Current State: ",
    ", Operations: [",
    "Exploring Operation: ",
    ", Resulting Numbers: [",
    "Generated Node #",
    " Operation: ",
    "Moving to Node #",
    " equal: Goal Reached\n",
    " unequal: No Solution\n",
    "Start Sub Search at level ",
    "Exit Sub Search at level ",
    "No solution found in sub search\n",
    "No solution found.\n",
    "Sub Call Budget: ",
)
# Every character that a prompt, a message, a trace or an answer can hold.
ALPHABET = "".join(sorted(set("0123456789+-*/=,:[]'# \n").union(*PHRASES)))


def prompt_text(puzzle: Puzzle, condition: int | None) -> str:
    """Returns the first line, after a condition as a budget of child threads or window bins."""
    budget = "" if condition is None else f"Sub Call Budget: {condition} "
    return budget + _state_line(puzzle.numbers, puzzle.target, ())


def render(search: Search, prompt: str, puzzle: Puzzle, method: str) -> Thread:
    """Returns the thread of a search, children included.

    Args:
      search: what the thread did.
      prompt: the text that the thread was given.
      puzzle: numbers and target of the problem.
      method: the method of the demonstration, which decides how moves between nodes are written.
    """
    body: list[str | Spawn] = []
    text = ""
    depth = 0  # Number of nodes below each other that are being searched depth-first.
    following: list[Event | None] = [*search.events[1:], None]
    for event, upcoming in zip(search.events, following, strict=False):
        if isinstance(event, Fork):
            for child in event.children:
                text += _generated(child.root, puzzle)
            body += (text, _spawn(event, puzzle, method))
            text = ""
        elif isinstance(event, Generate):
            text += _generated(event.node, puzzle)
        elif isinstance(event, Test):
            text += _tested(event, puzzle)
            # SoS moves back to the node after each test but the last.
            if method == "sos" and depth and isinstance(upcoming, Test):
                text += _move(event.node, puzzle)
        elif isinstance(event, Enter):
            depth += 0 if event.queued else 1
            text += _entered(event, depth, puzzle, method)
        else:
            text += _left(event, upcoming, depth, puzzle, method)
            depth -= 1
    if not search.solution:
        text += "No solution found.\n"
    body.append(text)
    # A trace that ends with a spawn whose child found the solution has nothing more to say.
    return Thread(prompt, tuple(part for part in body if part), answer_text(search.solution))


def _spawn(event: Fork, puzzle: Puzzle, method: str) -> Spawn:
    """Returns the spawn of an event, with the threads of its children."""
    children = (
        render(child, _move(child.root, puzzle), puzzle, method) for child in event.children
    )
    return Spawn(tuple(children))


def shown_numbers(numbers: Sequence[int], path: Sequence[Step]) -> list[int]:
    """Returns the state after some steps: each removes its two numbers and appends its result."""
    shown = list(numbers)
    for step in path:
        shown.remove(step.a)
        shown.remove(step.b)
        shown.append(step.result)
    return shown


def _state_line(numbers: Sequence[int], target: int, path: Sequence[Step]) -> str:
    """Returns the line that shows a state and the steps that led to it."""
    shown = shown_numbers(numbers, path)
    equations = [step.equation for step in path]
    return f"Current State: {target}:{shown}, Operations: {equations}\n"


def _generated(node: Node, puzzle: Puzzle) -> str:
    """Returns the lines that write a successor down."""
    shown = shown_numbers(puzzle.numbers, node.path)
    step = node.path[-1]
    return (
        f"Exploring Operation: {step.equation}, Resulting Numbers: {shown}\n"
        f"Generated Node #{_name(node)}: {puzzle.target}:{shown} Operation: {step.equation}\n"
    )


def _tested(event: Test, puzzle: Puzzle) -> str:
    """Returns the lines of a test: the last two numbers combined, and the verdict."""
    result = event.step.result
    verdict = "equal: Goal Reached" if result == puzzle.target else "unequal: No Solution"
    explored = f"Exploring Operation: {event.step.equation}, Resulting Numbers: [{result}]\n"
    return f"{explored}{result},{puzzle.target} {verdict}\n"


def _entered(event: Enter, depth: int, puzzle: Puzzle, method: str) -> str:
    """Returns the lines of a move to a node that is searched next, at some depth."""
    move = _move(event.node, puzzle)
    if method == "sos+" and not event.queued:
        return f"Start Sub Search at level {depth}: {move}"
    return move


def _left(event: Leave, upcoming: Event | None, depth: int, puzzle: Puzzle, method: str) -> str:
    """Returns the lines, if any, with which the search at some depth ends without a solution."""
    if method == "sos+":
        return f"Exit Sub Search at level {depth}\nNo solution found in sub search\n"
    if isinstance(upcoming, Generate):
        return _move(_parent(event), puzzle)
    return ""


def _move(node: Node, puzzle: Puzzle) -> str:
    """Returns the lines of a move to a node."""
    state = _state_line(puzzle.numbers, puzzle.target, node.path)
    return f"Moving to Node #{_name(node)}\n{state}"


def _parent(event: Leave) -> Node:
    """Returns the parent of the node that is left; its state is not known, and not needed."""
    node = event.node
    return Node((), node.path[:-1], node.place[:-1])


def _name(node: Node) -> str:
    """Returns the name of a node, such as `0,2,1`."""
    return ",".join(map(str, node.place))
