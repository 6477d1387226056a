"""What a prompt asks for is what its demonstration does, in every render; and nobody asks for what
the data never state.
"""

import collections
import dataclasses
import json
from pathlib import Path

import pytest
from helpers.puzzles import countdown, with_solver
from helpers.small_data import PAPER

from apr_jax.config import load
from apr_jax.data import dataset
from apr_jax.data.build import build
from apr_jax.data.demonstrate import unflatten
from apr_jax.data.encode import read_thread, tokenize_tree
from apr_jax.errors import UsageError, UserError
from apr_jax.paper import suite
from apr_jax.tasks import flatten, make_task
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.problems import draw
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.tasks.countdown.solvers import METHODS
from apr_jax.tasks.countdown.task import count_tokens
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.stored import tokenizer_from_bytes


@pytest.fixture(scope="module")
def paper():
    """Scale paper with a few demonstrations, all of which state a condition."""
    return load(PAPER, ["data.demonstrations=300", "data.heldout=5", "task.solver.condition=1"])


@pytest.fixture(scope="module")
def paper_data(paper, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("paper")
    build(paper, out, methods=("apr", "sos+"), progress=False, workers=1)
    return out


def stated_in(prompt: str) -> int:
    """The condition, read off a prompt of either render."""
    if prompt.startswith("Sub Call Budget: "):
        return int(prompt.split()[3])
    return int(prompt.partition("#")[2])


@pytest.mark.parametrize(
    ("render", "window_bin"), [("compact", 1), ("compact", 32), ("sos", 64), ("sos", 512)]
)
def test_stated_bins_are_those_that_the_tokens_fill(render, window_bin):
    task = countdown(
        CountdownConfig(), SolverConfig(render=render, window_bin=window_bin, condition=1.0)
    )
    # No text is needed to train on: the tokenizer knows the task's characters and phrases.
    tokenizer = SentencePieceTokenizer.train(["0"], task.phrases, task.alphabet)
    bins = collections.Counter()
    for seed in range(120):
        problem = draw(task.config, seed)
        thread = task.demonstrate(problem, "sos+", seed)
        (stream,) = tokenize_tree(thread, tokenizer)
        bins[stated_in(thread.prompt)] += 1
        assert thread.condition == stated_in(thread.prompt) == -(-len(stream.tokens) // window_bin)
        assert thread.prompt == task.prompt(problem, thread.condition)
    assert len(bins) >= 7


@pytest.mark.parametrize("render", ["compact", "sos"])
def test_tokens_are_counted_as_the_tokenizer_cuts(render):
    task = countdown(CountdownConfig(), SolverConfig(render=render))
    tokenizer = SentencePieceTokenizer.train(["0"], task.phrases, task.alphabet)
    written = set()
    for seed in range(20):
        for method in METHODS:
            thread = task.demonstrate(draw(task.config, seed), method, seed)
            parts = [
                part for one in flatten(thread) for part in (one.prompt, one.answer, *one.body)
            ]
            for text in filter(lambda part: isinstance(part, str), parts):
                assert count_tokens(text, task.phrases) == len(tokenizer.encode(text))
                written |= set(text)
    assert written - set("#") == set(task.alphabet) - set("#"), (
        "an alphabet that is known without drawing"
    )
    phrases = ("ab", "abc", "bcd", "c")
    cutter = SentencePieceTokenizer.train(["abcd"], phrases)
    for text in ("abcd", "abbcdc", "ababcabcd", "dcba", ""):
        assert count_tokens(text, phrases) == len(cutter.encode(text))


@pytest.mark.thorough
def test_scale_paper_is_built_as_configured(paper, paper_data):
    """A part of its demonstrations is built, and states the conditions that the config asks for."""
    tokenizer = tokenizer_from_bytes((paper_data / "tokenizer.model").read_bytes())
    record = json.loads((paper_data / "data.json").read_text())
    for method in ("apr", "sos+"):
        source = dataset.read(paper_data, method, "train")
        counted = collections.Counter()
        for example in (source[k] for k in range(len(source))):
            streams = unflatten(example)
            thread = read_thread(streams, tokenizer)
            done = (
                len(streams) - 1
                if method == "apr"
                else -(-len(streams[0].tokens) // paper.task.options.solver.window_bin)
            )
            assert stated_in(thread.prompt) == done
            counted[done] += 1
        facts = record["methods"][method]["train"]
        assert facts["conditions"] == {str(done): counted[done] for done in sorted(counted)}
        assert 200 < facts["demonstrations"] == sum(counted.values()) < 300
    # Whatever the published sweeps ask for, some demonstration states.
    suite.check(load("paper"))
    suite.check_conditions(paper, paper_data, METHODS)


@pytest.mark.parametrize(
    ("field", "values", "line"),
    [
        (
            "children",
            (0, 1),
            (
                r"evaluate.children=\(0, 1\): no demonstration of 'apr' in .* states 1; they state"
                r" 0, 2, 3"
            ),
        ),
        (
            "bins",
            (2, 9, 10),
            r"evaluate.bins=\(2, 9, 10\): .*'sos\+' in .* states 9 or 10; they state 1, 2, .*, 8$",
        ),
    ],
)
def test_sweep_over_conditions_absent_from_data_is_refused(paper, paper_data, field, values, line):
    swept = dataclasses.replace(
        paper, evaluate=dataclasses.replace(paper.evaluate, **{field: values})
    )
    with pytest.raises(UsageError, match=line):
        suite.check_conditions(swept, paper_data, METHODS)
    other = {"children": "sos+", "bins": "apr"}[field]
    suite.check_conditions(swept, paper_data, (other,))  # Whose conditions nobody sweeps.


def test_data_of_an_unknown_kind_are_named(config, data_dir, tmp_path):
    swept = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, children=(2,), bins=(2,))
    )
    suite.check_conditions(swept, data_dir, METHODS)
    with pytest.raises(
        UserError,
        match=r"data.json: does not say which conditions the demonstrations of 'apr' state",
    ):
        suite.check_conditions(swept, tmp_path, METHODS)


@pytest.mark.parametrize("count", [1, 2])
def test_the_tokenizer_knows_every_character_of_the_task(config, tmp_path, count):
    """Whatever its demonstrations hold: here none states a condition, and there are one or two."""
    data = dataclasses.replace(config.data, demonstrations=count)
    few = dataclasses.replace(with_solver(config, condition=0.0), data=data)
    build(few, tmp_path, methods=("apr", "sos+"), progress=False, workers=1)
    tokenizer = tokenizer_from_bytes((tmp_path / "tokenizer.model").read_bytes())
    problem = make_problem("p", (29, 30, 17), 68)
    for text in (
        make_task(few.task).alphabet,
        make_task(few.task).prompt(problem, 35),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
