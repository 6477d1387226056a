"""A tree as text."""

import jax
import numpy as np
import pytest

from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.threads import Limits, interpret, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.threads.keys import KEYS
from apr_jax.train.metrics import sample_tree
from apr_jax.train.metrics.sample_tree import tree_text

TOKENIZER = SentencePieceTokenizer.train(["ab"])
A, B = TOKENIZER.encode("ab")


@pytest.fixture(scope="module")
def forest():
    """The root spawns two children, "a" and "b"; the second ends without an answer."""
    written = iter(
        [A, p.SPAWN, p.MSG, A, p.MSG, B, p.END_SPAWN]
        + [B, B, p.JOIN, A, p.EOS]
        + [A, p.EOS]
        + [A, p.JOIN, B, p.EOS]
    )
    limits = Limits(window=32, max_thread_tokens=48, max_threads=4, children=3, max_depth=1)
    prompts = make_prompts([[p.BOS, B]], 4, temperature=0.0)

    def logits_of(seen):
        return np.eye(TOKENIZER.vocab_size, dtype=np.float32)[next(written)] * 50

    one = interpret(logits_of, prompts, 0, jax.random.key(0, impl=KEYS), limits)
    return jax.tree.map(lambda field: np.asarray(field)[None], one)


def test_tree_text_shows_slots_and_every_threads_tokens(forest):
    text = tree_text(forest, 0, "3 4 -> 7", True, TOKENIZER)
    assert text.splitlines() == [
        "3 4 -> 7: right",
        (
            f"{int(forest.total_tokens[0])} tokens, {int(forest.sequential_tokens[0])} in sequence,"
            " 2 children"
        ),
        "",
        "root  ━━━━━━┳┄┄┄┄┻━━━╸",
        "└ 1          ━━━━╸",
        "└ 2          ━╸",
        "",
        "root (done)",
        "ba<spawn><msg>a<msg>b</spawn><joined><msg>a<msg></joined>a<join>b",
        "",
        "└ 1 (done)",
        "abb<join>a",
        "",
        "└ 2 (no answer)",
        "ba",
    ]


def test_a_long_tree_is_cut(forest, monkeypatch):
    whole = tree_text(forest, 0, make_problem("x", (3, 4), 7), False, TOKENIZER)
    monkeypatch.setattr(sample_tree, "MOST", 50)
    cut = tree_text(forest, 0, make_problem("x", (3, 4), 7), False, TOKENIZER)
    assert cut == f"{whole[:50]}\n... {len(whole) - 50} characters more"
