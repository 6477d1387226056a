"""The whole road at the smallest scale: every stage, an interruption, the second start, and what is left behind."""

import dataclasses
import json

import pytest

from apr_jax import reproduce
from apr_jax.errors import UsageError
from apr_jax.learn.checkpoint import load_checkpoint

EVALUATIONS = ("sos+-sft", "sos+-rl", "apr-sft", "apr-rl")


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run that was stopped after its third stage and started again."""
    out = tmp_path_factory.mktemp("reproduce") / "tiny"
    stages = reproduce.stages_of(config, out)

    def interrupted():
        raise KeyboardInterrupt

    reproduce._claim(out, config)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_stages([*stages[:3], dataclasses.replace(stages[3], run=interrupted)], out)
    assert [name for name, stage in json.loads((out / "stages.json").read_text()).items() if stage["done"]] == [
        stage.name for stage in stages[:3]
    ]
    reproduce.reproduce(config, out)
    return out


def test_everything_is_left_in_the_run(run, config):
    for method in ("sos+", "apr"):
        for stage in ("sft", "rl"):
            folder = run / method / stage
            assert (folder / "metrics.jsonl").is_file() and list((folder / "tensorboard").iterdir())
            restored = load_checkpoint(folder)
            assert (restored.method, restored.stage, restored.config) == (method, stage, config)
    for name in EVALUATIONS:
        summary = json.loads((run / "eval" / name / "summary.json").read_text())
        assert summary["n"] == config.data.heldout // 2 or summary["n"] > 0
    results = json.loads((run / "results.json").read_text())
    assert set(results["summaries"]) == set(EVALUATIONS)
    page = (run / "report.html").read_text()
    assert all(name in page for name in EVALUATIONS)


def test_the_held_out_problems_were_never_trained_on(run):
    from apr_jax.data import builder
    from apr_jax.tasks import load_problems, problem_key

    held = {problem_key(p) for split in ("test", "validation") for p in load_problems(run / "data" / f"{split}.jsonl")}
    for method in ("sos+", "apr"):
        source = builder.read(run / "data", method, "train", ("numbers", "target"))
        trained = {
            (tuple(sorted(int(n) for n in e["numbers"])), int(e["target"]))
            for e in map(source.__getitem__, range(len(source)))
        }
        assert trained and not trained & held


def test_a_second_start_only_shows_the_results(run, config, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    reproduce.reproduce(config, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    reproduce.show_results(run)
    said = capsys.readouterr().out.replace("\n", "")
    assert "apr after rl" in said and "report.html" in said and "accuracy_against_window.png" in said


def test_a_lost_stage_is_made_again_with_all_that_follows(run, config, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "eval" / "apr-sft" / "summary.json").unlink()
    old = (copy / "report.html").stat().st_mtime_ns
    reproduce.reproduce(config, copy)
    assert (copy / "eval" / "apr-sft" / "summary.json").is_file()
    assert (copy / "report.html").stat().st_mtime_ns > old


def test_another_config_in_the_same_folder_is_refused(run, config):
    with pytest.raises(UsageError, match=r"is a run with seed=0, now seed=1; choose another --out"):
        reproduce.reproduce(dataclasses.replace(config, seed=1), run)
