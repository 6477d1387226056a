"""The compact text form, read back by a parser that shares no code with the renderer."""

import re

import pytest
from helpers.puzzles import countdown

from apr_jax.tasks import flatten
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.problems import draw
from apr_jax.tasks.countdown.puzzle import Puzzle
from apr_jax.tasks.countdown.solvers import METHODS, PARALLEL, successors
from apr_jax.tasks.countdown.task import count_tokens
from apr_jax.text.sentence_piece import SentencePieceTokenizer

MINI = CountdownConfig()
GROUP = re.compile(r"(\d+),(\d+)(:\d+(?:,\d+)*)?((?:\|[+\-*/]\d+(?:[+\-*/]\d*)*!?)+)")
SUCCESSOR = re.compile(r"\|([+\-*/])(\d+)([^|]*)")


def combine(a, op, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else None}[op]


def check_compact(text, reach, target):
    """Every group follows exactly from a state written before; `reach` collects these.

    Returns whether it hit.
    """
    hit = False
    state = None
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
        a = int(match[1])
        b = int(match[2])
        rest = tuple(map(int, (match[3] or ":")[1:].split(",")))
        assert any(sorted((a, b, *rest)) == sorted(state) for state in reach)
        for op, result, tests in SUCCESSOR.findall(match[4]):
            assert not hit and combine(
                *((a, op, b) if op in "+*" else (max(a, b), op, min(a, b)))
            ) == int(result)
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
    # The trace of a queue writes two numbers down first, and tries them out when it takes them from
    # the queue.
    assert text in (expected, "")
    return text.endswith("!")


def message_state(message, target):
    """The state that a child's message stands for."""
    expression, _, goal = message.rpartition(";")[2].partition(":")
    assert int(goal) == target
    step, *rest = expression.split(",")
    a, op, b = re.fullmatch(r"(\d+)([+\-*/])(\d+)", step).groups()
    return (combine(int(a), op, int(b)), *map(int, rest))


def check_thread(thread, reach, target):
    """A thread and all below it; returns the number of threads."""
    threads = 1
    hit = False
    answers = []
    for part in thread.body:
        assert not any(answers), "nothing may follow an answer"
        if isinstance(part, str):
            hit = check_compact(part, reach, target)
            continue
        for child in part.children:
            state = message_state(child.prompt, target)
            threads += check_thread(child, {state}, target)
            answers.append(child.answer)
    assert bool(thread.answer) == (hit or any(answers))
    assert not any(answers) or thread.answer == next(filter(None, answers))
    return threads


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_traces_are_exact(method, shuffle):
    task = countdown(MINI, SolverConfig(shuffle=shuffle, max_children=60))
    threads = 0
    for seed in range(150):
        problem = draw(MINI, seed)
        threads += check_thread(
            task.demonstrate(problem, method, seed),
            {Puzzle.of(problem).numbers},
            Puzzle.of(problem).target,
        )
    assert (threads > 250) == (method in PARALLEL)


@pytest.mark.parametrize(
    ("render", "search"), [("compact", "beam"), ("compact", "bidirectional"), ("sos", "beam")]
)
def test_numbers_are_one_token_each_if_asked(render, search):
    solver = {"render": render, "search": search, "number_pieces": 250}
    task = countdown(MINI, SolverConfig(**solver), children=10, depth=1)
    texts = []
    for seed in range(40):
        for thread in flatten(task.demonstrate(draw(MINI, seed), "apr", seed)):
            texts += [thread.prompt, thread.answer]
            texts += [part for part in thread.body if isinstance(part, str)]
    tokenizer = SentencePieceTokenizer.train(texts, task.phrases, task.alphabet)
    assert len(tokenizer.encode("99,100,250,7")) == 7
    # A larger number falls into such numbers from the left.
    pieces = [tokenizer.decode([one]) for one in tokenizer.encode("251=1234")]
    assert pieces == ["25", "1", "=", "123", "4"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) == count_tokens(text, task.phrases)


def test_as_many_numbers_as_may_be_one_token_fit_a_vocabulary():
    task = countdown(MINI, SolverConfig(number_pieces=5_000))
    tokenizer = SentencePieceTokenizer.train(["1"], task.phrases, task.alphabet)
    assert tokenizer.vocab_size > 5_000 and len(tokenizer.encode("5000,4999")) == 3


@pytest.mark.parametrize("most", [-1, 5_001])
def test_a_senseless_number_of_pieces_is_refused(most):
    with pytest.raises(ValueError, match=rf"number_pieces={most} must be in 0\.\.5000"):
        SolverConfig(number_pieces=most)
