"""Both text forms read back by parsers that share no code with the renderers."""

import ast
import re

import pytest

from apr_jax.tasks import METHODS, Countdown, CountdownConfig, Problem, SolverConfig, Spawn, draw
from apr_jax.tasks.solvers import successors

MINI = CountdownConfig()
GROUP = re.compile(r"(\d+),(\d+)(:\d+(?:,\d+)*)?((?:\|[+\-*/]\d+(?:[+\-*/]\d*)*!?)+)")
SUCCESSOR = re.compile(r"\|([+\-*/])(\d+)([^|]*)")
STATE = re.compile(r"Current State: (\d+):(\[[\d, ]+\]), Operations: (\[.*\])")
EXPLORE = re.compile(r"Exploring Operation: (\d+)([+\-*/])(\d+)=(\d+), Resulting Numbers: (\[[\d, ]+\])")
GENERATED = re.compile(r"Generated Node #([\d,]+): (\d+):(\[[\d, ]+\]) Operation: (\S+)")
MOVE = re.compile(r"(?:Start Sub Search at level (\d+): )?Moving to Node #([\d,]+)")
LEAF = re.compile(r"(\d+),(\d+) (equal: Goal Reached|unequal: No Solution)")


def combine(a, op, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else None}[op]


def check_compact(text, reach, target):
    """Every group follows exactly from a state written before; `reach` collects these. Returns whether it hit."""
    hit, state = False, None
    for piece in text.split(";"):
        assert not hit, "nothing may follow the goal"
        if match := re.match(r">(\d+(?:,\d+)+)|=(\d+)", piece):
            queued = match[1] and tuple(map(int, match[1].split(",")))
            state = queued or next(s for s in reach if s[0] == int(match[2]))
            assert state in reach
            hit = check_tests(piece[match.end() :], state, target)
            continue
        match = GROUP.fullmatch(piece)
        assert match, piece
        a, b, rest = int(match[1]), int(match[2]), tuple(map(int, (match[3] or ":")[1:].split(",")))
        assert any(sorted((a, b, *rest)) == sorted(state) for state in reach)
        for op, result, tests in SUCCESSOR.findall(match[4]):
            assert not hit and combine(*((a, op, b) if op in "+*" else (max(a, b), op, min(a, b)))) == int(result)
            reach.add((int(result), *rest))
            hit = check_tests(tests, (int(result), *rest), target)
    return hit


def check_tests(text, state, target):
    """The tests of a state of two numbers, up to the hit. Returns whether there is one."""
    if len(state) > 2:
        assert not text
        return False
    expected = ""
    for step, _ in successors(state):
        expected += step.op + (str(step.result) if step.result < 10 ** len(str(target)) else "")
        if step.result == target:
            expected += "!"
            break
    # The trace of a queue writes two numbers down first, and tries them out when it takes them from the queue.
    assert text in (expected, "")
    return text.endswith("!")


def message_state(message, target):
    """The state that a child's message stands for."""
    expression, _, goal = message.rpartition(";")[2].partition(":")
    assert int(goal) == target
    step, *rest = expression.split(",")
    a, op, b = re.fullmatch(r"(\d+)([+\-*/])(\d+)", step).groups()
    return (combine(int(a), op, int(b)), *map(int, rest))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_compact_traces_are_exact(method, shuffle):
    task = Countdown(MINI, SolverConfig(shuffle=shuffle))
    spawned = 0
    for seed in range(150):
        problem = draw(MINI, seed)
        thread = task.demonstration(problem, method, seed)
        reach, hit, answers = {problem.numbers}, False, []
        for part in thread.body:
            if isinstance(part, str):
                hit = check_compact(part, reach, problem.target)
                continue
            spawned += len(part.children)
            for child in part.children:
                state = message_state(child.prompt, problem.target)
                assert bool(child.answer) == check_compact(child.body[0], {state}, problem.target)
                answers.append(child.answer)
        assert bool(thread.answer) == (hit or any(answers))
        if any(answers):
            assert thread.answer == next(filter(None, answers)) and isinstance(thread.body[-1], Spawn)
    assert (spawned > 100) == (method == "apr")


class Reader:
    """Reads the lines of Stream of Search: the tree of generated nodes, where the search stands, and what it claims."""

    def __init__(self, problem):
        self.target = problem.target
        self.nodes = {"0": list(problem.numbers)}
        self.level = 0
        self.standing = "0"
        self.resume = []
        self.goal = None

    def read(self, text):
        assert text.endswith("\n")
        lines = text.splitlines()
        while lines:
            line = lines.pop(0)
            assert self.goal is None, "nothing may follow the goal"
            if match := EXPLORE.fullmatch(line):
                self.explore(match, lines.pop(0))
            elif match := MOVE.fullmatch(line):
                self.move(match, lines.pop(0))
            elif match := STATE.fullmatch(line):
                assert ast.literal_eval(match[2]) == self.nodes[self.standing]
            elif line.startswith("Exit Sub Search"):
                assert line == f"Exit Sub Search at level {self.level}"
                assert lines.pop(0) == "No solution found in sub search"
                self.level -= 1
                self.standing = self.resume.pop()
            else:
                assert line == "No solution found." and not lines

    def explore(self, match, following):
        a, b, result = int(match[1]), int(match[3]), int(match[4])
        expected = list(self.nodes[self.standing])
        expected.remove(a)
        expected.remove(b)
        expected.append(result)
        assert combine(a, match[2], b) == result and ast.literal_eval(match[5]) == expected
        if len(expected) == 1:
            leaf = LEAF.fullmatch(following)
            assert (int(leaf[1]), int(leaf[2])) == (result, self.target)
            assert leaf[3].startswith("equal") == (result == self.target)
            self.goal = result if result == self.target else None
            return
        node = GENERATED.fullmatch(following)
        assert node[1] not in self.nodes and node[1].rpartition(",")[0] == self.standing
        assert int(node[2]) == self.target and ast.literal_eval(node[3]) == expected
        assert node[4] == f"{a}{match[2]}{b}={result}"
        self.nodes[node[1]] = expected

    def move(self, match, following):
        if match[1]:
            self.level += 1
            assert int(match[1]) == self.level
            self.resume.append(self.standing)
        self.standing = match[2]
        state = STATE.fullmatch(following)
        assert ast.literal_eval(state[2]) == self.nodes[self.standing]
        assert len(ast.literal_eval(state[3])) == self.standing.count(",")


@pytest.mark.parametrize("depth_first", ["beam", "near"])
@pytest.mark.parametrize("method", METHODS)
def test_sos_lines_are_read_by_an_independent_parser(method, depth_first):
    task = Countdown(MINI, SolverConfig(render="sos", depth_first=depth_first, condition=0))
    solved = spawned = 0
    for seed in range(150):
        problem = draw(MINI, seed)
        thread = task.demonstration(problem, method, seed)
        reader, joined = Reader(problem), ""
        reader.read(thread.prompt)
        for part in thread.body:
            if isinstance(part, str):
                reader.read(part)
                continue
            spawned += len(part.children)
            for child in part.children:
                below = Reader(problem)
                below.nodes |= reader.nodes
                below.read(child.prompt)
                for text in child.body:
                    below.read(text)
                assert bool(child.answer) == (below.goal is not None)
                joined = joined or child.answer
        assert bool(thread.answer) == (reader.goal is not None or bool(joined))
        solved += bool(thread.answer)
    assert 30 < solved < 149
    assert (spawned > 100) == (method == "apr")


def test_sos_text_by_hand():
    task = Countdown(MINI, SolverConfig(render="sos", serial_beam=1))
    problem = Problem("p", (22, 26, 2), 46)
    texts = {task.demonstration(problem, "sos", seed).body[0] for seed in range(20)}
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
