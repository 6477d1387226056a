"""A trace holds its tree: it can be drawn again from the line alone."""

import dataclasses
import json

import numpy as np
from helpers import trees
from helpers.puzzles import countdown
from helpers.traces import scored_trace

from apr_jax.evaluate.trace import to_forest
from apr_jax.tasks.countdown.config import CountdownConfig
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.threads import Status
from apr_jax.threads.draw import draw_tree, thread_names

NOT_RECORDED = {"position", "allowed", "child"}


def test_a_tree_comes_back_from_its_trace():
    tokenizer = SentencePieceTokenizer.train(["0123456789+-*/=,:"])
    forest = trees.to_forest(trees.family((3, 2)), tokenizer)
    forest.status[0, 2] = Status.OUT_OF_WINDOW
    forest.truncations[0] = 1
    forest.refusals[0, 1] = 4
    problem = make_problem("test-0", (3, 4, 5), 12)
    line = scored_trace(forest, 0, problem, "", countdown(CountdownConfig()), tokenizer)

    again = to_forest(json.loads(json.dumps(line)))

    for field in dataclasses.fields(forest):
        mine = getattr(again, field.name)
        if field.name in NOT_RECORDED:
            assert not mine.any(), field.name
        else:
            np.testing.assert_allclose(mine, getattr(forest, field.name), atol=5.1e-4)
    assert thread_names(again, 0) == thread_names(forest, 0)
    assert draw_tree(again, 0) == draw_tree(forest, 0)
