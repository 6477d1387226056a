"""Traces of trees whose answers are scored in the test's own process."""

import jax
import numpy as np

from apr_jax.evaluate.trace import to_trace
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.train.answers import extract_answers
from helpers.puzzles import countdown

DIGITS = SentencePieceTokenizer.train(["0123456789+-*/=,:"])


def scored_trace(forest, tree, problem, answer, task, tokenizer):
    """The first sample's line of `traces.jsonl` of a tree that joined `answer`."""
    return to_trace(forest, tree, problem, 0, task.score(problem, answer), task, tokenizer)


def traced(forest, tree, tokenizer, **changes):
    """The line of tree number `tree`, as the answer to a problem of Countdown."""
    problem = make_problem(f"test-{tree}", (3, 4, 5), 12 + tree)
    answer, *_ = extract_answers(
        jax.tree.map(lambda leaf: leaf[tree : tree + 1], forest), tokenizer
    )
    return (
        scored_trace(forest, tree, problem, answer, countdown(CountdownConfig()), tokenizer)
        | changes
    )


def kinds_of(thread):
    """Of each token, [length]."""
    return np.repeat([kind for kind, _ in thread["spans"]], thread["lengths"])
