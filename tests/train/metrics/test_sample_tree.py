"""A tree as text, and where a run shows it."""

import jax
import numpy as np
import pytest
from helpers.whole_runs import shown

from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.threads import Limits, interpret, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.threads.keys import KEYS
from apr_jax.train.metrics import sample_tree
from apr_jax.train.metrics.recorder import Recorder
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


def test_tensorboard_gets_text_as_it_is(tmp_path):
    with Recorder(tmp_path, 0, 9, 1, "rl", ("trees",), (), progress=False) as recorder:
        recorder.show_text(4, "validation_tree", "a *b*\n\n<join>")
    # Markdown shows what is indented by four as code, line by line.
    assert shown(tmp_path) == {("validation_tree/text_summary", 4): "    a *b*\n    \n    <join>\n"}


def test_tensorboard_shows_a_step_that_is_done_again_once(tmp_path):
    """A killed run goes on from its last checkpoint: what it had shown of the steps after it is
    taken back.
    """
    for start, stop in ((0, 5), (3, 7)):
        with Recorder(tmp_path, start, 9, 1, "sft", ("tokens",), (), progress=False) as recorder:
            for step in range(start + 1, stop + 1):
                recorder.record(step, {"loss": start + step / 8})
                recorder.show_text(step, "validation_tree", f"of {start}")
            recorder.flush()
        # Starts of one second write to one file.
        for file in (tmp_path / "tensorboard").glob("events.out*"):
            file.rename(file.with_name(f"events.{start}"))
    found = shown(tmp_path)
    assert {step: value for (name, step), value in found.items() if name == "loss"} == {
        step: 3 * (step > 3) + step / 8 for step in range(1, 8)
    }
    assert [found["validation_tree/text_summary", step].strip() for step in (3, 4)] == [
        "of 0",
        "of 3",
    ]
