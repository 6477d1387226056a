"""The published line format: read by a parser that shares no code with the renderer, and by hand;
no mutation passes.
"""

import dataclasses
import random
import re

import pytest
from helpers.puzzles import countdown
from helpers.sos_parser import Rejected, read_tree

from apr_jax.tasks import Spawn
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.problems import draw
from apr_jax.tasks.countdown.puzzle import Puzzle, make_problem
from apr_jax.tasks.countdown.solvers import METHODS, PARALLEL

MINI = CountdownConfig()


def demonstrations(method, count, **fields):
    task = countdown(
        MINI, SolverConfig(render="sos", max_children=60, parent_beam=6, **fields), children=12
    )
    for seed in range(count):
        problem = draw(MINI, seed)
        yield problem, task.demonstrate(problem, method, seed)


@pytest.mark.thorough
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("depth_first", ["beam", "near"])
@pytest.mark.parametrize("method", METHODS)
def test_the_parser_accepts_every_demonstration(method, depth_first, shuffle):
    solved = threads = 0
    for problem, thread in demonstrations(method, 200, depth_first=depth_first, shuffle=shuffle):
        threads += read_tree(thread, counts_children=method in PARALLEL)
        puzzle = Puzzle.of(problem)
        state = f"Current State: {puzzle.target}:{list(puzzle.numbers)}, Operations: []\n"
        assert state in thread.prompt
        solved += bool(thread.answer)
    assert 40 < solved < 199
    assert (threads > 400) == (method in PARALLEL)


def parts_of(thread, path=()):
    """Where text is in a tree: (path to the thread, "prompt", "answer" or place in its body)."""
    yield from ((path, "prompt"), (path, "answer"))
    for place, part in enumerate(thread.body):
        if isinstance(part, str):
            yield path, place
        else:
            for k, child in enumerate(part.children):
                yield from parts_of(child, (*path, (place, k)))


def changed(thread, where, change):
    """The tree with `change` applied to one text."""
    path, part = where
    if path:
        (place, k), *rest = path
        children = list(thread.body[place].children)
        children[k] = changed(children[k], (rest, part), change)
        body = (*thread.body[:place], Spawn(tuple(children)), *thread.body[place + 1 :])
        return dataclasses.replace(thread, body=body)
    if isinstance(part, str):
        return dataclasses.replace(thread, **{part: change(getattr(thread, part))})
    return dataclasses.replace(
        thread, body=(*thread.body[:part], change(thread.body[part]), *thread.body[part + 1 :])
    )


def replace_one(pattern, text, rng):
    """One number among the matches becomes another."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        return text
    match = rng.choice(matches)
    others = [
        number
        for number in (*range(12), int(match[0]) + 1, 10 * int(match[0]))
        if number != int(match[0])
    ]
    return text[: match.start()] + str(rng.choice(others)) + text[match.end() :]


def change_a_number(text, rng):
    return replace_one(r"\d+", text, rng)


def change_a_node(text, rng):
    return replace_one(r"(?<=#)\d+|(?<=,)\d+(?=[,:\n][^ ]*)", text, rng)


def drop_a_line(text, rng):
    lines = text.splitlines(keepends=True)
    if lines:
        del lines[rng.randrange(len(lines))]
    return "".join(lines)


def swap_neighbours(text, rng):
    lines = text.splitlines(keepends=True)
    if len(lines) > 1:
        k = rng.randrange(len(lines) - 1)
        lines[k : k + 2] = lines[k + 1], lines[k]
    return "".join(lines)


def change_an_operator(text, rng):
    matches = list(re.finditer(r"(?<=\d)[-+*/](?=\d)", text))
    if not matches:
        return text
    match = rng.choice(matches)
    return text[: match.start()] + rng.choice("+-*/".replace(match[0], "")) + text[match.end() :]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "mutate", [change_a_number, change_a_node, drop_a_line, swap_neighbours, change_an_operator]
)
@pytest.mark.parametrize("method", METHODS)
def test_the_parser_rejects_every_mutation(method, mutate):
    rng = random.Random(f"{method} {mutate.__name__}")
    tried = 0
    # The condition of SoS+ counts the tokens of another text form; no reader of this one can check
    # it.
    for _, thread in demonstrations(method, 60, condition=0.5 if method in PARALLEL else 0.0):
        for _ in range(5):
            where = rng.choice(list(parts_of(thread)))
            mutant = changed(thread, where, lambda text: mutate(text, rng))
            if mutant == thread:
                continue
            tried += 1
            with pytest.raises(Rejected):
                read_tree(mutant)
    assert tried > 50


def test_lines_by_hand():
    task = countdown(MINI, SolverConfig(render="sos", serial_beam=1))
    problem = make_problem("p", (22, 26, 2), 46)
    texts = {task.demonstrate(problem, "sos", seed).body[0] for seed in range(20)}
    depth_first = (
        "Exploring Operation: 22+26=48, Resulting Numbers: [2, 48]\n"
        "Generated Node #0,0: 46:[2, 48] Operation: 22+26=48\n"
        "Moving to Node #0,0\n"
        "Current State: 46:[2, 48], Operations: ['22+26=48']\n"
        "Exploring Operation: 48+2=50, Resulting Numbers: [50]\n"
        "50,46 unequal: No Solution\n"
        "Moving to Node #0,0\n"
        "Current State: 46:[2, 48], Operations: ['22+26=48']\n"
        "Exploring Operation: 48-2=46, Resulting Numbers: [46]\n"
        "46,46 equal: Goal Reached\n"
    )
    assert depth_first in texts
    assert any("No solution found.\n" in text for text in texts)
