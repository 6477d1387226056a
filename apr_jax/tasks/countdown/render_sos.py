"""Traces in the line format of Stream of Search (Gandhi et al. 2024) and of its hybrid, readable by
their parsers.

    Current State: 46:[22, 26, 2], Operations: []
    Exploring Operation: 22+26=48, Resulting Numbers: [2, 48]
    Generated Node #0,0: 46:[2, 48] Operation: 22+26=48
    Moving to Node #0,0
    Current State: 46:[2, 48], Operations: ['22+26=48']
    Exploring Operation: 48-2=46, Resulting Numbers: [46]
    46,46 equal: Goal Reached

A state is shown as these authors keep it: the numbers left over, then the result. The prompt is the
first line. SoS+ brackets the search of a node in place by "Start Sub Search" and "Exit Sub Search".
In APR the control tokens take the place of the "<Calling Sub Searches>" lines; a child is told the
node it moves to. Answers are joined as `compact` does."""

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

# What the line format repeats word for word; the tokenizer makes one piece of each.
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
    """The opening line; a condition goes before it, as a budget of child threads or window bins."""
    budget = "" if condition is None else f"Sub Call Budget: {condition} "
    return budget + _state_line(puzzle.numbers, puzzle.target, ())


def render(search: Search, prompt: str, puzzle: Puzzle, method: str) -> Thread:
    """The thread of a search, children included; `method` decides how moves between nodes are
    told.
    """
    body: list[str | Spawn] = []
    text = ""
    depth = 0  # Nodes that are being searched in place.
    following: list[Event | None] = [*search.events[1:], None]
    for event, upcoming in zip(search.events, following, strict=False):
        if isinstance(event, Fork):
            kept = "".join(_generated(child.root, puzzle) for child in event.children)
            spawn = Spawn(
                tuple(
                    render(child, _move(child.root, puzzle), puzzle, method)
                    for child in event.children
                )
            )
            body += (text + kept, spawn)
            text = ""
        elif isinstance(event, Generate):
            text += _generated(event.node, puzzle)
        elif isinstance(event, Test):
            text += _tested(event, puzzle)
            if method == "sos" and depth and isinstance(upcoming, Test):
                text += _move(event.node, puzzle)
        elif isinstance(event, Enter):
            depth += not event.queued
            text += _start(depth) if method == "sos+" and not event.queued else ""
            text += _move(event.node, puzzle)
        elif method == "sos+":
            text += f"Exit Sub Search at level {depth}\nNo solution found in sub search\n"
            depth -= 1
        else:
            text += _move(_parent(event), puzzle) if isinstance(upcoming, Generate) else ""
            depth -= 1
    body.append(text if search.solution else f"{text}No solution found.\n")
    # A trace that ends with a spawn whose child found the solution has nothing more to say.
    return Thread(prompt, tuple(part for part in body if part), answer_text(search.solution))


def shown_numbers(numbers: Sequence[int], path: Sequence[Step]) -> list[int]:
    """The state after `path`: each step removes its two numbers and appends its result."""
    shown = list(numbers)
    for step in path:
        shown.remove(step.a)
        shown.remove(step.b)
        shown.append(step.result)
    return shown


def _state_line(numbers: Sequence[int], target: int, path: Sequence[Step]) -> str:
    return (
        f"Current State: {target}:{shown_numbers(numbers, path)}, Operations:"
        f" {[step.equation for step in path]}\n"
    )


def _generated(node: Node, puzzle: Puzzle) -> str:
    shown, step = shown_numbers(puzzle.numbers, node.path), node.path[-1]
    return (
        f"Exploring Operation: {step.equation}, Resulting Numbers: {shown}\n"
        f"Generated Node #{_name(node)}: {puzzle.target}:{shown} Operation: {step.equation}\n"
    )


def _tested(event: Test, puzzle: Puzzle) -> str:
    result = event.step.result
    verdict = "equal: Goal Reached" if result == puzzle.target else "unequal: No Solution"
    explored = f"Exploring Operation: {event.step.equation}, Resulting Numbers: [{result}]\n"
    return f"{explored}{result},{puzzle.target} {verdict}\n"


def _move(node: Node, puzzle: Puzzle) -> str:
    return f"Moving to Node #{_name(node)}\n" + _state_line(
        puzzle.numbers, puzzle.target, node.path
    )


def _start(level: int) -> str:
    return f"Start Sub Search at level {level}: "


def _parent(event: Leave) -> Node:
    node = event.node
    return Node((), node.path[:-1], node.place[:-1])


def _name(node: Node) -> str:
    return ",".join(map(str, node.place))
