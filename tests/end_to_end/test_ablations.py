"""An ablation at the smallest scale: what it trains, what it shares, and what its table says."""

import dataclasses
import json
import statistics

import pytest

from apr_jax.config import load
from apr_jax.errors import UsageError
from apr_jax.evaluate.folder import read_traces
from apr_jax.paper import Question, ablations
from apr_jax.train.checkpoint import load_checkpoint

SMALL = ablations.Ablation(
    "Does it run?",
    (
        ablations.Variant("base", requested=(2,), forced=(1,)),
        ablations.Variant(
            "priced", ("train.rl.reward.token_price=0.5",), after="base", sampled=(1.0,)
        ),
        ablations.Variant("other seed", ("seed=7",)),
        ablations.Variant(
            "serial", ("task.solver.serial_beam=1",), "sos+", reinforced=False, sampled=(0.5,)
        ),
    ),
    same=True,
    gaps=(("priced, after RL, T = 1", "base, supervised"),),
)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ablations.ABLATION_OF, Question.SEEDS, SMALL)
        yield out, ablations.run_ablation(Question.SEEDS, config, out)


def built(out):
    return [path.parent for path in out.rglob("data.json")]


@pytest.mark.slow
def test_every_model_is_trained_once_and_evaluated(run, config):
    out, found = run
    assert list(found["rows"]) == [
        "base, supervised",
        "2 requested children",
        "1 forced children",
        "base, after RL",
        "priced, after RL",
        "priced, after RL, T = 1",
        "other seed, supervised",
        "other seed, after RL",
        "serial, supervised",
        "serial, T = 0.5",
    ]
    assert not (out / "priced" / "sft").exists()
    assert load_checkpoint(out / "priced" / "rl").config.train.rl.reward.token_price == 0.5
    assert load_checkpoint(out / "other seed" / "sft").config == dataclasses.replace(config, seed=7)
    assert all(line["n"] == config.data.heldout for line in found["rows"].values())
    assert (
        json.loads((out / "base" / "eval-asked2" / "settings.json").read_text())["condition"] == 2
    )
    assert json.loads((out / "base" / "eval-held1" / "settings.json").read_text())["forced"] == 1
    assert found["rows"]["1 forced children"]["children"] <= 1
    assert (
        json.loads((out / "serial" / "eval-t0.5" / "settings.json").read_text())["temperature"]
        == 0.5
    )
    assert (
        load_checkpoint(out / "serial" / "sft").method == "sos+"
        and not (out / "serial" / "rl").exists()
    )
    beams = {
        folder: json.loads((folder / "data.json").read_text())["settings"][
            "task.solver.serial_beam"
        ]
        for folder in built(out)
    }
    assert (
        json.loads((out / "priced" / "eval-rl-t1" / "settings.json").read_text())["temperature"]
        == 1
    )
    assert beams == {
        out / "data": config.task.options.solver.serial_beam,
        out / "serial" / "data": 1,
    }
    assert (out / "ablation.svg").is_file() and (out / "ablation.png").is_file()


@pytest.mark.slow
def test_spread_is_over_the_variants_of_a_stage(run):
    _, found = run
    one, other = (
        found["rows"][f"{name}, after RL"]["total_tokens"] for name in ("base", "other seed")
    )
    priced = found["rows"]["priced, after RL"]["total_tokens"]
    plain = [
        found["rows"][f"{name}, supervised"]["total_tokens"]
        for name in ("base", "other seed", "serial")
    ]
    assert len({*plain}) == 3
    others = [
        found["rows"][name]["total_tokens"]
        for name in ("2 requested children", "1 forced children", "serial, T = 0.5")
    ]
    assert found["spread"]["sft"]["total_tokens"][0] != pytest.approx(
        statistics.mean([*plain, *others])
    )
    for stage, values in (("sft", plain), ("rl", [one, priced, other])):
        mean, spread = found["spread"][stage]["total_tokens"]
        assert mean == pytest.approx(statistics.mean(values)) and spread == pytest.approx(
            statistics.stdev(values)
        )


@pytest.mark.slow
def test_a_gap_is_of_the_problems_that_both_answered(run):
    out, found = run
    (gap,) = found["gaps"]
    assert (gap["one"], gap["other"]) == ("priced, after RL, T = 1", "base, supervised")
    rows = found["rows"]
    for measure in ablations.MEASURES:
        value, low, high = gap[measure]
        assert value == pytest.approx(rows[gap["one"]][measure] - rows[gap["other"]][measure])
        assert low <= value <= high
    tokens = [
        {trace["id"]: trace["total_tokens"] for trace in read_traces(out / folder / "traces.jsonl")}
        for folder in ("priced/eval-rl-t1", "base/eval-sft")
    ]
    assert gap["total_tokens"][0] == pytest.approx(
        statistics.mean(tokens[0][name] - tokens[1][name] for name in tokens[1])
    )


@pytest.mark.slow
def test_a_second_start_trains_nothing(run, config, capsys):
    out, found = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert ablations.run_ablation(Question.SEEDS, config, out) == found
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    ablations.show_ablation(found, out)
    said = capsys.readouterr().out
    assert "priced, after RL, T = 1, less base, supervised: accuracy" in said
    assert "Does it run?" in said and "sft, mean and standard deviation: accuracy" in said
    with pytest.raises(UsageError, match="seed=0, now seed=1"):
        ablations.run_ablation(Question.SEEDS, dataclasses.replace(config, seed=1), out)


@pytest.mark.parametrize("question", list(Question))
def test_what_is_declared_can_be_trained(question, tmp_path):
    """Every variant's settings name fields, its `after` an earlier variant with a supervised model
    of its own.
    """
    declared = ablations.ABLATION_OF[question]
    stages = ablations.stages_of(declared, load("nano"), tmp_path)
    labels = [row.label for row in ablations.rows_of(declared)]
    assert len(set(labels)) == len(labels) and {
        label for pair in declared.gaps for label in pair
    } <= set(labels)
    known: set[str] = set()
    for stage in stages:
        assert set(stage.needs) <= known, stage.name
        known.add(stage.name)
    assert len(known) == len(stages)
