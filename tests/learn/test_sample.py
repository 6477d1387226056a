"""A tree as text, and where a run shows it."""

import struct

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from apr_jax.data.tokenizer import Tokenizer
from apr_jax.learn import sample
from apr_jax.learn.metrics import Recorder
from apr_jax.learn.sample import tree_text
from apr_jax.tasks import Problem
from apr_jax.threads import Limits, interpret, make_prompts
from apr_jax.threads import protocol as p

TOKENIZER = Tokenizer.train(["ab"])
A, B = TOKENIZER.encode("ab")


@pytest.fixture(scope="module")
def forest():
    """The root spawns two children, "a" and "b"; the second ends without an answer."""
    written = iter(
        [A, p.SPAWN, p.MSG, A, p.MSG, B, p.END_SPAWN] + [B, B, p.JOIN, A, p.EOS] + [A, p.EOS] + [A, p.JOIN, B, p.EOS]
    )
    limits = Limits(window=32, stream=48, slots=4, children=3, max_depth=1)
    prompts = make_prompts([[p.BOS, B]], 4, temperature=0.0)

    def logits_of(seen):
        return np.eye(TOKENIZER.vocab_size, dtype=np.float32)[next(written)] * 50

    one = interpret(logits_of, prompts, 0, jax.random.key(0, impl=p.KEYS), limits)
    return jax.tree.map(lambda field: np.asarray(field)[None], one)


def test_a_tree_shows_lanes_and_what_every_thread_read_and_wrote(forest):
    text = tree_text(forest, 0, Problem("x", (3, 4), 7), True, TOKENIZER)
    assert text.splitlines() == [
        "3,4 -> 7: right",
        f"{int(forest.total_tokens[0])} tokens, {int(forest.sequential_tokens[0])} in sequence, 2 children",
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
    whole = tree_text(forest, 0, Problem("x", (3, 4), 7), False, TOKENIZER)
    monkeypatch.setattr(sample, "MOST", 50)
    cut = tree_text(forest, 0, Problem("x", (3, 4), 7), False, TOKENIZER)
    assert cut == f"{whole[:50]}\n... {len(whole) - 50} characters more"


def _texts(folder):
    """(step, name, text) of the event files of TensorBoard: length, its checksum, event, its checksum."""
    for path in sorted(folder.glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                if value.tensor.string_val:
                    yield event.step, value.tag, value.tensor.string_val[0].decode()


def test_tensorboard_gets_text_as_it_is(tmp_path):
    with Recorder(tmp_path, 0, 9, 1, "rl", ("trees",), (), progress=False) as recorder:
        recorder.show_text(4, "validation_tree", "a *b*\n\n<join>")
    ((step, name, text),) = _texts(tmp_path / "tensorboard")
    assert (step, name) == (4, "validation_tree/text_summary")
    # Markdown shows what is indented by four as code, line by line.
    assert text == "    a *b*\n    \n    <join>\n"
