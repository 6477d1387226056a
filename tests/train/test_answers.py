"""Answers are read off the recorded token ids of roots that joined, and of nothing else."""

import jax
import numpy as np

from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import BOS, END_JOINED, END_SPAWN, EOS, JOIN, JOINED, MSG, SPAWN
from apr_jax.threads import Limits, interpret, make_prompts
from apr_jax.train.answers import extract_answers

TOKENIZER = SentencePieceTokenizer.train(["0123456789+-*/,:;=#"])
LIMITS = Limits(window=24, max_thread_tokens=48, max_threads=3, children=2)


def _forest(written):
    """The tree in which the threads, one after the other, write the given tokens."""
    tokens = iter(written)

    def logits_of(seen):
        logits = np.zeros(TOKENIZER.vocab_size, np.float32)
        logits[next(tokens)] = 9.0
        return logits

    prompt = [BOS, *TOKENIZER.encode("1,2:3")]
    return interpret(logits_of, make_prompts([prompt], len(prompt)), 0, jax.random.key(0), LIMITS)


def test_only_the_root_of_a_finished_tree_answers():
    text = TOKENIZER.encode
    spawn = [SPAWN, MSG, *text("4"), END_SPAWN]
    child = [JOIN, *text("5+6=11"), EOS]
    trees = [
        [*text("7"), JOIN, *text("1+2=3"), EOS],
        [*spawn, *child, JOIN, *text("2+1=3"), EOS],  # What the child joins is not the answer.
        [JOIN, EOS],
        [*spawn, *child, EOS],  # No answer, though a child joined one.
        [JOIN, *text("1+2=3"), JOIN],  # Malformed after a right answer.
        [JOIN, *text("1" * 40)],  # The window ends it.
    ]
    forest = jax.tree.map(lambda *leaves: np.stack(leaves), *[_forest(tree) for tree in trees])
    assert JOINED in forest.tokens[1, 0]
    assert END_JOINED in forest.tokens[1, 0]
    assert extract_answers(forest, TOKENIZER) == ["1+2=3", "2+1=3", "", "", "", ""]
