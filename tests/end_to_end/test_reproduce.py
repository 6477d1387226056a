"""The whole road at the smallest scale: every stage, an interruption, the second start, and what is
left behind.
"""

import dataclasses
import json
import os
import shutil

import pytest
from helpers.puzzles import read_problems, with_solver

from apr_jax.config import load, override
from apr_jax.errors import UsageError, UserError
from apr_jax.evaluate.folder import read_answers
from apr_jax.paper import pipeline, suite
from apr_jax.paper.stages import reserve, run_stages
from apr_jax.tasks.countdown.problems import numbers_of
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.checkpoint.exported import export_file

pytestmark = pytest.mark.thorough

EVALUATIONS = ("sos+-sft", "sos+-rl", "apr-sft", "apr-rl")


@pytest.fixture(scope="module")
def config(config):
    """With every kind of evaluation."""
    wanted = {"children": (2,), "bins": (1,), "forced": (2,), "timed": 2}
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **wanted))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run that was stopped after its third stage and started again, and ended by `--only
    training` before its evaluations.
    """
    out = tmp_path_factory.mktemp("reproduce") / "tiny"
    stages = pipeline.stages_of(config, pipeline.Folders.of(out))

    def interrupted():
        raise KeyboardInterrupt

    reserve(out, config)
    with pytest.raises(KeyboardInterrupt):
        run_stages([*stages[:3], dataclasses.replace(stages[3], run=interrupted)], out)
    assert [
        name
        for name, stage in json.loads((out / "stages.json").read_text()).items()
        if stage["done"]
    ] == [stage.name for stage in stages[:3]]
    pipeline.reproduce(config, out, only="training")
    assert (out / "apr" / "rl" / "checkpoints").is_dir() and not (out / "eval").exists()
    pipeline.reproduce(config, out)
    return out


def test_everything_is_left_in_the_run(run, config):
    for method in ("sos+", "apr"):
        for stage in ("sft", "rl"):
            folder = run / method / stage
            assert (folder / "metrics.jsonl").is_file() and list((folder / "tensorboard").iterdir())
            restored = load_checkpoint(folder)
            assert (restored.method, restored.stage, restored.config) == (method, stage, config)
    for name in EVALUATIONS:
        assert (
            json.loads((run / "eval" / name / "summary.json").read_text())["n"]
            == config.data.heldout
        )
    results = json.loads((run / "results.json").read_text())
    assert set(results["main"]) == set(EVALUATIONS)
    declared = [
        one
        for one in suite.declare(config.evaluate)
        if one.model in ("sos+/sft", "sos+/rl", "apr/sft", "apr/rl")
    ]
    assert {row["name"] for row in results["scores"]} == {one.name for one in declared}
    choosing = {
        one.name
        for one in suite.choosing(config.evaluate)
        if one.model in {one.model for one in declared}
    }
    assert set(os.listdir(run / "eval")) == {one.name for one in declared} | choosing
    assert set(results["latency"]) == {
        one.name for one in suite.timed(config.evaluate) if one in declared
    }
    assert [row["slots"] for row in results["cost"]["rows"]] == [1, 2, 4, 5]
    for method in ("sos+", "apr"):
        assert set(results["trainings"][f"{method}/sft"]) == {"steps", "tokens", "epochs"}
        assert set(results["trainings"][f"{method}/rl"]) <= {"steps", "tokens", "trees"}
    for one in suite.timed_votes(config.evaluate):
        if one in declared:
            votes = json.loads((run / "eval" / one.name / "votes.json").read_text())
            assert list(votes["seconds"]) == ["1", "2"]
    page = (run / "report.html").read_text()
    assert all(name in page for name in EVALUATIONS)
    assert len(list((run / "figures").glob("*.svg"))) == page.count("<figcaption>") >= 8


def test_the_last_validation_problems_choose(run, config):
    held = [problem.id for problem in read_problems(run / "data" / "validation.jsonl")]
    for one in suite.choosing(config.evaluate):
        if one.model in ("sos+/sft", "sos+/rl", "apr/sft", "apr/rl"):
            traces = read_answers(run / "eval" / one.name)[1]
            assert (
                list(dict.fromkeys(trace["id"] for trace in traces))
                == held[-config.evaluate.validation :]
            )
    rows = json.loads((run / "results.json").read_text())["comparisons"]
    assert {row["chosen"] for row in rows} == {
        "",
        f"chosen by {config.evaluate.validation} validation problems",
    }


def test_the_held_out_problems_were_never_trained_on(run):
    from helpers.small_data import problem_of

    from apr_jax.data import dataset
    from apr_jax.text.stored import tokenizer_from_bytes

    def numbers(problems):
        return {numbers_of(problem) for problem in problems}

    held = numbers(
        p
        for split in ("test", "validation")
        for p in read_problems(run / "data" / f"{split}.jsonl")
    )
    tokenizer = tokenizer_from_bytes((run / "data" / "tokenizer.model").read_bytes())
    for method in ("sos+", "apr"):
        source = dataset.read(run / "data", method, "train")
        trained = numbers(problem_of(source[k], tokenizer) for k in range(len(source)))
        assert trained and not trained & held
    drawn = numbers(read_problems(run / "data" / "train.jsonl"))  # What RL draws from.
    assert trained <= drawn and not drawn & held


def test_a_second_start_only_shows_the_results(run, config, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    pipeline.reproduce(config, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    pipeline.show_results(run)
    said = capsys.readouterr().out
    first = said[
        said.index("same window,") :
    ].splitlines()  # The tables of a pipe are as wide as they are, a line a row.
    assert first[0].startswith("same window, after RL: APR, SoS+ ")
    assert "thread tree, after RL" in said and "report.html" in said.replace("\n", "")
    assert said.count("\nroot ") == 2, "a tree before and after RL"
    assert (run / "figures" / "overview.png").is_file() and "overview.png" in said
    assert "not run" in said and "SoS: there is no trained model (sos/sft)" in said


def test_lost_stage_is_remade_with_all_that_follows(run, config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "eval" / "apr-sft" / "summary.json").unlink()
    old = (copy / "report.html").stat().st_mtime_ns
    pipeline.reproduce(config, copy)
    assert (copy / "eval" / "apr-sft" / "summary.json").is_file()
    assert (copy / "report.html").stat().st_mtime_ns > old


def test_only_figures_evaluates_the_models_that_are_there(run, config, tmp_path, capsys):
    """A kept file is a model as good as a checkpoint; another suite is no other run; nothing is
    trained.
    """
    lean = {"temperatures": (), "bins": (), "forced": (), "timed": 0}
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **lean))
    for folder in ("sos+/sft", "data"):
        shutil.copytree(run / folder, tmp_path / folder)
    export_file(load_checkpoint(run / "apr" / "rl"), tmp_path / "apr-rl.safetensors")
    pipeline.reproduce(config, tmp_path, only="figures")
    few = dataclasses.replace(config.evaluate, problems=2, samples=3, sweep="rl")
    pipeline.reproduce(dataclasses.replace(config, evaluate=few), tmp_path, only="figures")
    said = capsys.readouterr().err
    assert "(at least 1 min left)" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["main"]) == {"sos+-sft", "apr-rl"} and "apr-rl-c2-p2" in {
        row["name"] for row in results["scores"]
    }
    assert not (tmp_path / "apr").exists()
    assert "APR: there is no trained model (apr/sft)" in results["missing"]


def test_models_answer_fresh_problems_in_a_folder_of_its_own(run, config, tmp_path):
    """None has the numbers of an excluded one, and nothing is trained."""
    lean = {"temperatures": (), "children": (), "bins": (), "forced": (), "timed": 0}
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **lean))
    fresh = override(config, ["data.seed=5"])
    excluded = run / "data" / "test.jsonl"
    pipeline.reproduce(fresh, tmp_path / "fresh", exclude=[excluded], models=run)

    problems = read_problems(tmp_path / "fresh" / "data" / "test.jsonl")
    assert len(problems) == config.data.heldout
    assert not set(map(numbers_of, problems)) & set(map(numbers_of, read_problems(excluded)))
    results = json.loads((tmp_path / "fresh" / "results.json").read_text())
    assert set(results["main"]) == set(EVALUATIONS)
    assert results["problems"]["seed"] == 5
    assert set(results["trainings"]) >= {"sos+/sft", "apr/sft"}
    assert not (tmp_path / "fresh" / "apr").exists()

    # With another number of held-out problems, those of the same seed may have been trained on.
    more = override(config, ["data.heldout=9"])
    with pytest.raises(UserError, match=r"was trained with data\.heldout=8 of data\.seed=0, so"):
        pipeline.reproduce(more, tmp_path / "more", models=run)
    with pytest.raises(UsageError, match="--models .*: are evaluated and not trained"):
        pipeline.reproduce(fresh, tmp_path / "fresh", only="training", models=run)


def test_ablations_run_between_main_trainings_and_evaluations(config, tmp_path):
    plain = [stage.name for stage in pipeline.stages_of(config, pipeline.Folders.of(tmp_path))]
    config = _with_ablations(config)
    stages = pipeline.stages_of(config, pipeline.Folders.of(tmp_path))
    names = [stage.name for stage in stages]
    known = set()
    for stage in stages:
        assert set(stage.needs) <= known, stage.name
        known.add(stage.name)
    trained = [
        name
        for name in names
        if not name.startswith(("eval/", "latency/", "votes/", "slots/", "report"))
    ]
    assert trained[5:] == [
        *(
            "sos/data",
            "sos/sft",
            "sos+beam15/data",
            "sos+beam15/sft",
            "sos+beam15/rl",
            "sos+rejection/data",
            "sos+rejection/sft",
        ),
        *("apr+drawn/data", "apr+drawn/sft", "apr+drawn/rl"),
    ]
    evaluated = {stage.needs[0] for stage in stages if stage.name.startswith("eval/")}
    absent = ("apr-nested", suite.BOTH_ENDS)  # Not trained here.
    assert evaluated == {model for model in suite.MODELS if not model.startswith(absent)}
    assert set(plain) < set(names)
    assert [stage.name for stage in pipeline.part_of(stages, tmp_path, "training")] == trained
    assert [stage.name for stage in pipeline.part_of(stages, tmp_path, "figures")] == [
        "data",
        "report",
    ]


def test_ablation_equal_to_the_run_is_not_trained(config, tmp_path):
    """Nor is one that is there already."""

    def trained(config):
        stages = pipeline.part_of(
            pipeline.stages_of(config, pipeline.Folders.of(tmp_path)), tmp_path, "training"
        )
        return {stage.name.partition("/")[0] for stage in stages if stage.name.endswith("/sft")} - {
            "apr",
            "sos+",
        }

    config = _with_ablations(config)
    assert trained(config) == set(suite.ABLATIONS) - {suite.BOTH_ENDS}
    drawn = with_solver(config, parent_beam_low=1)
    assert trained(drawn) == set(suite.ABLATIONS) - {suite.RANDOM_PARENT_BEAM, suite.BOTH_ENDS}
    (tmp_path / "sos-sft.safetensors").touch()
    (tmp_path / "sos+beam15" / "sft" / "checkpoints").mkdir(parents=True)
    assert trained(config) == {suite.RANDOM_PARENT_BEAM, "sos+rejection"}
    # Its own unfinished one goes on; without the field it is neither trained nor evaluated.
    (tmp_path / "stages.json").write_text(
        json.dumps({"sos+beam15/sft": {"seconds": 1.0, "done": False}})
    )
    assert trained(config) == {suite.RANDOM_PARENT_BEAM, "sos+rejection", "sos+beam15"}
    plain = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, ablations=False)
    )
    names = [stage.name for stage in pipeline.stages_of(plain, pipeline.Folders.of(tmp_path))]
    assert "eval/sos-sft" in names and not [name for name in names if "sos+beam15" in name]


def test_serial_search_goes_forward_where_threads_search_from_both_ends(tmp_path):
    """SoS+ from both ends is one more model, which learns by the run's own config."""
    config = _with_ablations(load("experiments/mini2.py"))
    stages = {
        stage.name: stage for stage in pipeline.stages_of(config, pipeline.Folders.of(tmp_path))
    }
    trained = pipeline.part_of(list(stages.values()), tmp_path, "training")
    assert [stage.name for stage in trained if not stage.name.startswith("sos")] == [
        *("data", "apr/sft", "apr/rl", "apr+drawn/data", "apr+drawn/sft", "apr+drawn/rl")
    ]
    for folder in ("sos+", suite.BEAMS_1_TO_15, suite.BOTH_ENDS):
        assert stages[f"{folder}/sft"].needs == (f"{folder}/data",)
        assert stages[f"{folder}/rl"].needs == (f"{folder}/sft",)
        assert stages[f"eval/{folder}-rl"].needs == (f"{folder}/rl",)

    searches = {
        name: suite.own_config(config, name).task.options.solver
        for name in ("apr", "sos+", *suite.ABLATIONS)
    }
    assert {name for name, solver in searches.items() if solver.search == "bidirectional"} == {
        *("apr", suite.RANDOM_PARENT_BEAM, suite.BOTH_ENDS)
    }
    mini = load("experiments/mini.py").task.options.solver
    for name, solver in searches.items():
        if solver.search == "beam":
            assert solver.serial_beam == (15 if name == suite.BEAMS_1_TO_15 else 5)
            assert (solver.spawn_probability, solver.shuffle) == (
                mini.spawn_probability,
                mini.shuffle,
            )


@pytest.mark.slow
def test_each_ablation_is_trained_on_its_own_demonstrations(config, tmp_path):
    config = _with_ablations(config)
    pipeline.reproduce(config, tmp_path)
    for name, (method, settings) in suite.ABLATIONS.items():
        if name == suite.BOTH_ENDS:
            continue
        restored = load_checkpoint(tmp_path / name / "sft")
        wanted = override(config, list(settings))
        assert (restored.method, restored.config) == (method, wanted) and (
            wanted != config
        ) == bool(settings)
    assert load_checkpoint(tmp_path / suite.RANDOM_PARENT_BEAM / "rl").stage == "rl"
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["main"]) == {
        model.replace("/", "-")
        for model in suite.MODELS
        if not model.startswith(("apr-nested", suite.BOTH_ENDS))
    }


def _with_ablations(config):
    """And with a main model that tries two first steps at least, so that a random parent beam differs."""
    evaluate = dataclasses.replace(config.evaluate, ablations=True)
    return dataclasses.replace(with_solver(config, parent_beam_low=2), evaluate=evaluate)


def test_only_figures_without_a_model(config, tmp_path):
    with pytest.raises(UserError, match=r"has no model to evaluate; train with `apr reproduce"):
        pipeline.reproduce(config, tmp_path, only="figures")


def test_another_config_in_the_same_folder_is_refused(run, config):
    with pytest.raises(UsageError, match=r"is a run with seed=0, now seed=1; choose another --out"):
        pipeline.reproduce(dataclasses.replace(config, seed=1), run)
