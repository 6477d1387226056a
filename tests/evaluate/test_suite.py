"""What is declared is what is drawn: the list of evaluations, and everything that is made of them, whole and in part."""

import copy
import dataclasses
import itertools
import json
import xml.etree.ElementTree

import made_run
import pytest

from apr_jax.config import EvalConfig
from apr_jax.data.tokenizer import Tokenizer
from apr_jax.errors import UsageError, UserError
from apr_jax.evaluate import charts, controls, figures, paper, suite, tables
from apr_jax.evaluate.claims import claims
from apr_jax.evaluate.results import read_run
from apr_jax.tasks import METHODS, Countdown, draw, flatten

TRAINED = ("sos+/sft", "sos+/rl", "apr/sft", "apr/rl")


@pytest.fixture(scope="module")
def tokenizer(config):
    task = Countdown(config.task, config.solver)
    trees = [task.demonstration(draw(task.config, k), method, k) for k in range(40) for method in METHODS]
    texts = [text for tree in trees for one in flatten(tree) for text in (one.prompt, one.answer, *one.body)]
    return Tokenizer.train([text for text in texts if isinstance(text, str) and text] + ["0123456789+-*/,:;=>|!#"])


@pytest.fixture(scope="module")
def whole(config, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    made_run.make_run(folder, config, tokenizer, TRAINED)
    return read_run(folder, folder / "data")


def test_every_evaluation_has_a_folder_of_its_own():
    declared = suite.declare(made_run.EVALUATE)
    names = [one.name for one in declared]
    assert len(set(names)) == len(names) == len(set(declared)) > 30
    assert names[: len(suite.MODELS)] == [model.replace("/", "-") for model in suite.MODELS]
    assert {
        "apr-sft-t1-c4-p6",
        "sos+-sft-t0.5-n3-p6",
        "sos+-rl-t0.5-p6",
        "sos+-rl-t1-n3-p6",
        "apr-rl-f3-p6",
        "sos+-sft-b2-p6",
        "apr-rl-t1-f3-p6",
    } <= set(names)
    assert {one.name for one in (*suite.timed(made_run.EVALUATE), *suite.laned(made_run.EVALUATE))} < set(names)
    other = suite.declare(dataclasses.replace(made_run.EVALUATE, samples=5, problems=7))
    assert {one.name for one in other} & set(names) == set(names[: len(suite.MODELS)]), "other samples, other folders"


def test_a_plain_config_asks_for_little():
    declared = suite.declare(EvalConfig())
    assert all(one.decoding.forced is None and not one.is_conditioned for one in declared)
    assert suite.timed(EvalConfig()) == suite.laned(EvalConfig()) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"children": (5,)}, r"evaluate.children=\(5,\): must be from 0 to 4"),
        ({"bins": (0,)}, r"evaluate.bins=\(0,\): must be from 1 to 2"),
        ({"forced": (2, 5)}, r"evaluate.forced=\(2, 5\): must be from 0 to 4"),
    ],
)
def test_what_the_models_cannot_do_is_refused(config, change, message):
    suite.check(dataclasses.replace(config, evaluate=made_run.EVALUATE))
    with pytest.raises(UsageError, match=message):
        suite.check(dataclasses.replace(config, evaluate=dataclasses.replace(made_run.EVALUATE, **change)))
    solver = dataclasses.replace(config.solver, condition=0.0)
    with pytest.raises(UsageError, match="trained without conditions"):
        suite.check(dataclasses.replace(config, solver=solver, evaluate=made_run.EVALUATE))


def test_every_figure_of_a_whole_run(whole, tmp_path):
    drawn = [figure(whole) for figure in (*figures.FIGURES, *controls.CONTROLS)]
    assert None not in drawn
    assert len({one.name for one in drawn}) == len(drawn) == 8
    for one in drawn:
        charts.save(one.figure, tmp_path / one.name)
        assert (tmp_path / f"{one.name}.png").read_bytes().startswith(b"\x89PNG")
        svg = charts.to_svg(one.figure, 'a "label" & <more>')
        element = xml.etree.ElementTree.fromstring(svg)
        assert element.get("aria-label") == 'a "label" & <more>'
        assert "currentColor" in svg and charts.INK not in svg, "it takes the ink of its page"
    again = figures.FIGURES[0](whole)
    assert charts.to_svg(again.figure, "x") == charts.to_svg(figures.FIGURES[0](whole).figure, "x")


def test_scores_by_hand(whole):
    """pass@n and cons@n are cut from one evaluation; a sweep is found by its condition."""
    serial = whole.get("sos+/rl", temperature=1.0)
    assert serial.summary["samples"] == 3 and len(serial.by_n) == 3
    for n, (passed, agreed, tokens) in enumerate(serial.by_n, start=1):
        cut = [trees[:n] for trees in serial.groups.values()]
        assert passed.mean == sum(any(tree["correct"] for tree in trees) for trees in cut) / 6
        assert agreed.mean <= passed.mean
        assert tokens == sum(tree["total_tokens"] for trees in cut for tree in trees) / 6
    assert serial.by_n[0][0].mean == serial.by_n[0][1].mean
    assert [one.evaluation.decoding.condition for one in whole.sweep("apr", 1.0)] == [2, 4]
    assert whole.get("apr/sft", forced=3).evaluation.name == "apr-sft-f3-p6"
    assert whole.get("apr/sft", forced=4) is None


def test_claims_of_a_whole_run(whole):
    rows = claims(whole)
    assert len(rows) == 11  # No APR answer here is as short as serial ones.
    for row in rows:
        assert row["low"] <= row["gap"] <= row["high"] and row["gap"] == pytest.approx(row["one"] - row["other"])
    gains = [row["gap"] for row in rows if row["claim"].startswith("RL's gain")]
    assert len(gains) == 3 and all(gain >= 0 for gain in gains), "the made-up answers are never worse after RL"
    window = rows[0]
    assert (window["n"], window["paper"]) == (made_run.PROBLEMS, "83.4 against 60.0 (+23.4)")
    tokens = next(row for row in rows if row["claim"].startswith("same total tokens, supervised"))
    spent = [tokens for *_, tokens in whole.get("sos+/sft", temperature=1.0).by_n]
    n = int(tokens["claim"][-1])
    budget = int(tokens["note"].split(": ")[1].split()[0])
    assert n == next((n for n, cost in enumerate(spent, start=1) if cost >= budget - 0.5), 3)


def test_the_best_point_with_chains_no_longer_than_those_of_serial_search(whole):
    """Over the problems that both answered; a better point with longer chains does not count."""

    def chain(one, problems):
        return sum(trees[0]["sequential_tokens"] for name, trees in one.groups.items() if name in problems)

    whole = copy.deepcopy(whole)
    serial = [whole.get("sos+/sft"), whole.get("sos+/rl"), *whole.sweep("sos+")]
    for one, change in [*((one, 20) for one in serial), (whole.get("apr/sft"), -10)]:
        for trees in one.groups.values():
            trees[0]["sequential_tokens"] += change
    (row,) = (row for row in claims(whole) if row["claim"].startswith("no more sequential tokens"))
    best = max(serial, key=lambda one: one.accuracy().mean)
    points = [whole.get("apr/sft"), *whole.sweep("apr")]
    allowed = [one for one in points if chain(one, best.groups) <= chain(best, one.groups)]
    assert 0 < len(allowed) < len(points)
    assert row["note"].startswith(max(allowed, key=lambda one: one.accuracy().mean).label + ":")
    assert best.label in row["note"]


def test_tables_show_what_was_not_run(whole):
    found = tables.all_tables(whole)
    assert [row["run"] for row in found["table1"]] == [False, True]
    assert [row["run"] for row in found["table2"]] == [True, False, False]
    assert all(row["run"] for row in found["table3"]) and len(found["table3"]) == 6
    cells = found["table3"][3]["cells"]
    assert cells["0"]["ours"]["n"] == made_run.PROBLEMS and cells["0"]["paper"] == 83.4
    assert cells["0.1"]["ours"] is None and cells["0.1"]["paper"] == 82.9
    assert "SoS+, beam 15: there is no trained model (sos+beam15/sft)" in whole.missing
    json.dumps([found, tables.main_table(whole), tables.every_score(whole), tables.oracle_table(whole)])


@pytest.mark.parametrize(
    "models", [("apr/sft",), ("sos+/sft",), ("sos+/sft", "apr/sft"), ("sos+/rl", "apr/rl"), ("sos/sft",)]
)
def test_a_part_of_a_run_gives_fewer_figures_and_says_so(models, config, tokenizer, tmp_path):
    made_run.make_run(tmp_path, config, tokenizer, models)
    results = read_run(tmp_path, tmp_path / "data")
    drawn = [one for figure in (*figures.FIGURES, *controls.CONTROLS) if (one := figure(results))]
    assert 0 < len(drawn) < 8
    for one in drawn:
        charts.to_svg(one.figure, one.caption)
    json.dumps([claims(results), tables.all_tables(results), tables.main_table(results)])
    for model in set(TRAINED) - set(models):
        assert any(f"({model})" in line for line in results.missing)


def test_folders_without_a_run_are_named(config, tokenizer, tmp_path):
    with pytest.raises(UserError, match="has no config.json; run `apr reproduce"):
        read_run(tmp_path, tmp_path / "data")
    made_run.make_run(tmp_path, config, tokenizer, ())
    with pytest.raises(UserError, match="has no evaluation of its suite; run `apr reproduce"):
        read_run(tmp_path, tmp_path / "data")


def test_the_papers_figures_agree_with_each_other():
    """What two places of the paper print must be the same number."""
    assert paper.APR_BY_CONDITION[1.0][-1] == paper.CLAIMS["tokens"][0] == paper.TABLE_3["apr/sft enforced"][1.0]
    assert paper.CONS_AT_N[1.0][6] == paper.CLAIMS["tokens"][1]
    assert paper.CLAIMS["window"] == (paper.AT_WINDOW["apr/rl"], paper.AT_WINDOW["sos+/rl"])
    for method, (before, after) in paper.RL["accuracy"].items():
        model, _, enforced = method.partition(" ")
        rows = [f"{model}/{stage}{' enforced' * bool(enforced)}" for stage in suite.STAGES]
        assert [paper.TABLE_3[row][0.0] for row in rows] == [before, after]
        assert paper.CLAIMS[f"rl {enforced or model}"] == (after, before)
    for one, other in itertools.combinations((paper.TABLE_1, paper.TABLE_2, paper.TABLE_3), 2):
        assert all(one["sos+/sft"][t] == other["sos+/sft"][t] for t in (0.0, 1.0))
