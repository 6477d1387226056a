"""What a report opens with: which tree, which models, which answers."""

import dataclasses

import pytest
from helpers import made_run

from apr_jax.paper import opening, suite
from apr_jax.paper.opening import _choose, overview
from apr_jax.paper.results import Answered, read_run
from apr_jax.text.sentence_piece import SentencePieceTokenizer

MODELS = ("sos+/sft", "sos+/rl", "apr/sft", "apr/rl", "sos/sft")


def results_of(models, config, folder):
    made_run.make_run(
        folder, config, SentencePieceTokenizer.train(["0123456789+-*/,:;=>|!#"]), models
    )
    return read_run(folder, folder / "data")


def answered(*trees):
    """An evaluation whose trees were (right, children), one for each problem: a, b, c, ..."""
    traces = [
        {"id": name, "sample": 0, "correct": right, "children": children}
        for name, (right, children) in zip("abcd", trees, strict=False)
    ]
    return Answered(suite.Evaluation("apr/rl"), traces, {})


@pytest.mark.parametrize(
    ("before", "after", "problem", "why"),
    [
        # b was solved before, c by no more children, so d shows what was learned.
        (
            [(False, 0), (True, 2), (False, 3), (False, 1)],
            [(True, 5), (True, 5), (True, 3), (True, 4)],
            "d",
            "after RL alone, by more children",
        ),
        ([(False, 0), (True, 2)], [(False, 5), (True, 5)], "b", "solved with children"),
        (None, [(True, 0), (True, 3)], "b", "solved with children"),
        (None, [(False, 0), (True, 0)], "b", "the first"),
        (None, [(False, 0), (False, 2)], "a", "the first"),
    ],
)
def test_the_tree_that_shows_what_was_learned_is_chosen(before, after, problem, why):
    chosen = _choose(answered(*after), *([answered(*before)] if before else []))
    assert chosen[0] == problem and chosen[1].endswith(why)


def test_four_models_stand_in_the_first_table(config, tmp_path):
    results = results_of(MODELS, config, tmp_path)
    first = opening.opening(results)
    assert list(first["rows"]) == list(suite.MAIN_MODELS.values()), "and no ablation"
    assert first["rows"]["thread tree (APR)"] == results.get("apr/sft").summary
    assert first["trees"] == {"after RL": "apr-rl", "before RL": "apr-sft"}
    gains = []
    for method in ("sos+", "apr"):
        after = results.get(f"{method}/rl").mean("correct")
        before = results.get(f"{method}/sft").mean("correct")
        gains.append(100 * (after - before))
    for sentence, gain in zip(first["gains"], gains, strict=True):
        assert f" by {gain:+.1f} points (" in sentence
    assert ["children" in sentence for sentence in first["gains"]] == [False, True]
    assert first["answers"] == "one answer to each of 10 problems, greedy"
    assert first["title"] == results.answered["apr-rl"].groups[first["problem"]][0]["problem"]


def test_sampled_answers_may_be_the_headline(config, tmp_path, monkeypatch):
    sampled = dataclasses.replace(made_run.EVALUATE, headline=1.0, compared=False)
    monkeypatch.setattr(made_run, "EVALUATE", sampled)
    results = results_of(MODELS, config, tmp_path)
    assert list(results.headline()) == ["sos+-sft-t1", "sos+-rl-t1", "apr-sft-t1", "apr-rl-t1"]
    assert len(results.get("apr/rl", temperature=1.0).groups) == made_run.PROBLEMS
    assert len(results.get("apr/rl").groups) == made_run.EVALUATE.problems < made_run.PROBLEMS
    assert all("failure" in trace for trace in results.answered["apr-rl-t1"].traces)
    assert results.missing == [] and suite.choosing(sampled) == ()
    first = opening.opening(results)
    assert first["trees"] == {"after RL": "apr-rl-t1", "before RL": "apr-sft-t1"}
    assert first["answers"].endswith("10 problems, sampled at temperature 1")


@pytest.mark.parametrize("models", [("apr/sft",), ("sos+/sft", "sos+/rl"), ("sos/sft",)])
def test_a_part_of_a_run_opens_with_what_there_is(models, config, tmp_path):
    results = results_of(models, config, tmp_path)
    first = opening.opening(results)
    expected = [suite.MAIN_MODELS[model] for model in models if model in suite.MAIN_MODELS]
    assert list(first["rows"]) == expected
    assert set(first["trees"].values()) <= set(results.headline())
    assert bool(overview(results)) == bool(first["trees"]) == bool(expected)


def test_the_figure_counts_children(config, tmp_path):
    results = results_of(MODELS, config, tmp_path)
    drawn = overview(results)
    left, right = drawn.figure.axes
    heights = [bar.get_height() for bar in right.patches]
    assert sum(heights) == pytest.approx(200), "all trees before RL, and all after"
    assert len(left.texts) == 2, "an arrow for each method"
    traces = results.answered["apr-rl"].traces
    none = 100 * sum(not trace["children"] for trace in traces) / len(traces)
    assert right.containers[1].patches[0].get_height() == pytest.approx(none)
