"""Checkpoints: round trip, what is kept, damage, other runs, a full disk."""

import contextlib
import dataclasses
import errno
import gc
import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apr_jax.errors import UserError
from apr_jax.io.disk_errors import disk_errors
from apr_jax.model.transformer import init_params
from apr_jax.text.tokenizer import Tokenizer
from apr_jax.train.checkpoint import manager
from apr_jax.train.checkpoint.checksum import json_sum
from apr_jax.train.checkpoint.manager import BEST, FOLDER, Checkpoints, Run, load_checkpoint
from apr_jax.train.config import OptimizerConfig
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.state import init_state

# Orbax's reading threads trip over the damage too, after the error is known.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIMIZER = make_optimizer(OptimizerConfig(name="muon"), 10)


@pytest.fixture(autouse=True)
def _late_complaints():
    """Lets those threads end while the filter above holds."""
    yield
    gc.collect()
    time.sleep(0.1)
    gc.collect()


@pytest.fixture(scope="module")
def run(config):
    return Run(config, "apr", "sft", Tokenizer.train(["0123456789+-*/,:;=#>"]), origin="")


@pytest.fixture(scope="module")
def blank(config, mesh):
    return init_state(init_params(config.model, 31, jax.random.key(0)), OPTIMIZER, mesh)


def _at(state, step):
    """A state that tells its step in every array."""
    state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state)
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


def _save(workdir, run, blank, scores):
    with Checkpoints(workdir, run) as checkpoints:
        for step, score in scores.items():
            metrics = {} if score is None else {BEST: score}
            checkpoints.save(_at(blank, step), metrics, {"position": step})


def _equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, run, blank):
    workdir = tmp_path_factory.mktemp("saved")
    _save(workdir, run, blank, {2: None, 4: None})
    return workdir


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of that run, to be hurt."""
    return shutil.copytree(saved, tmp_path / "copied")


def _restored(workdir, run, blank):
    """The step that is restored, after checking that it is whole."""
    with Checkpoints(workdir, run) as checkpoints:
        found = checkpoints.restore_latest(blank)
    step = int(found.state.step)
    _equal(found.state, _at(blank, step))
    assert found.data == {"position": step}
    return step


def _assert_told(told, workdir, step):
    """If the newest step, 4, was not restored, one line says so."""
    if step == 4:
        assert told == ""
    else:
        assert step == 2
        assert told.count("\n") == 1
        assert f"checkpoint {workdir / FOLDER / '4'}: damaged (" in told


def test_round_trip(saved, run, blank):
    with Checkpoints(saved, run) as checkpoints:
        found = checkpoints.restore_latest(blank)
    _equal(found.state, _at(blank, 4))
    assert jax.tree.structure(found.state) == jax.tree.structure(blank)
    assert found.data == {"position": 4}
    assert not found.unvalidated


def test_a_step_gets_the_scores_that_it_was_saved_without(run, blank, tmp_path):
    """As when a run was stopped before the validation of the step: then it is the best."""
    _save(tmp_path, run, blank, {1: 0.4, 2: None})
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(_at(blank, 3), {}, {"position": 3}, unvalidated=True)
        checkpoints.wait()
        assert checkpoints.restore_latest(blank).unvalidated
        checkpoints.complete(3, {BEST: 0.5})
        assert not checkpoints.restore_latest(blank).unvalidated
    assert _restored(tmp_path, run, blank) == 3
    assert load_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_step_whose_scores_are_not_written_to_the_end_is_still_there(
    run, blank, tmp_path, monkeypatch, where
):
    """The disk fills up, or the process dies, before the new file is whole, or before it takes the
    place of the old one.
    """
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(_at(blank, 2), {}, {"position": 2}, unvalidated=True)
        checkpoints.wait()

        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, where, full)
            with pytest.raises(UserError, match="the disk is full"):
                checkpoints.complete(2, {BEST: 0.5})
        assert checkpoints.restore_latest(blank).unvalidated
    assert _restored(tmp_path, run, blank) == 2


def test_evaluation_needs_neither_optimizer_nor_data(saved, run, blank, tmp_path):
    shutil.copytree(saved / FOLDER / "4", tmp_path / FOLDER / "4")
    shutil.rmtree(tmp_path / FOLDER / "4" / "state")
    shutil.rmtree(tmp_path / FOLDER / "4" / "data")
    for path in (tmp_path, tmp_path / FOLDER / "4"):
        restored = load_checkpoint(path)
        _equal(restored.params, _at(blank, 4).params)
        assert restored.config == run.config
        assert restored.tokenizer.to_bytes() == run.tokenizer.to_bytes()
        assert (restored.method, restored.stage, restored.step) == ("apr", "sft", 4)
        assert restored.path == str(tmp_path / FOLDER / "4")


def test_a_save_is_not_changed_by_the_donation_that_follows(tmp_path, run, blank):
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    state = _at(blank, 1)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(state, {}, {})
        spoil(state)
        checkpoints.wait()
        _equal(checkpoints.restore_latest(blank).state, expected)


def test_the_last_two_and_the_best_are_kept_and_the_best_is_evaluated(tmp_path, run, blank):
    _save(tmp_path, run, blank, {0: 0.2, 1: 0.7, 2: 0.7, 3: 0.1, 4: None, 5: 0.3})
    kept = sorted(int(entry.name) for entry in (tmp_path / FOLDER).iterdir())
    assert kept == [2, 4, 5]
    assert load_checkpoint(tmp_path).step == 2
    assert load_checkpoint(tmp_path / FOLDER / "5").step == 5
    _save(tmp_path, run, blank, {6: 0.6, 7: 0.6})
    assert sorted(int(entry.name) for entry in (tmp_path / FOLDER).iterdir()) == [2, 6, 7]


def test_without_validation_the_last_step_is_evaluated(saved):
    assert load_checkpoint(saved).step == 4


def _files(saved):
    return sorted(
        str(f.relative_to(saved)) for f in (saved / FOLDER / "4").rglob("*") if f.is_file()
    )


@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
def test_a_damaged_step_is_reported_and_the_one_before_used(
    saved, run, blank, tmp_path, capsys, how
):
    """Whichever file is hurt: the step is read as it was saved, or the one before is used, never
    anything else.
    """
    damaged = 0
    for number, name in enumerate(_files(saved)):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        file = workdir / name
        content = file.read_bytes()
        file.unlink()
        if how != "missing":
            file.write_bytes(content[: len(content) // 2] if how == "truncated" else b"")
        step = _restored(workdir, run, blank)
        _assert_told(capsys.readouterr().out, workdir, step)
        if step == 2:
            damaged += 1
            assert not (workdir / FOLDER / "4").exists(), "in the way of saving step 4 anew"
            assert (workdir / "damaged" / "4.0").is_dir(), "set aside, not deleted"
            if damaged == 1:
                _save(workdir, run, blank, {4: None})
                assert load_checkpoint(workdir).step == 4
    assert damaged >= 6


@pytest.mark.parametrize("seed", [0, 1])
def test_a_flipped_bit_anywhere_is_harmless_or_reported(saved, run, blank, tmp_path, capsys, seed):
    """One bit in each file: inside arrays neither Orbax nor TensorStore would notice."""
    reported, random = set(), np.random.default_rng(seed)
    for number, name in enumerate(_files(saved)):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        content = bytearray((workdir / name).read_bytes())
        if not content:
            continue
        place = int(random.integers(8 * len(content)))
        content[place // 8] ^= 1 << place % 8
        (workdir / name).write_bytes(content)
        with contextlib.suppress(UserError):
            _equal(load_checkpoint(workdir / FOLDER / "4").params, _at(blank, 4).params)
        step = _restored(workdir, run, blank)
        _assert_told(capsys.readouterr().out, workdir, step)
        if step == 2:
            reported.add(Path(name).relative_to(f"{FOLDER}/4").parts[0])
    assert reported >= {"params", "state", "meta"}


@pytest.mark.parametrize(
    ("item", "damage", "problem"),
    [
        ("data", lambda text: text.replace("4", "5"), "data is not what was saved"),
        ("meta", lambda text: text.replace('"apr"', '"sos"'), "meta is not what was saved"),
        ("meta", lambda text: text.replace('"meta_sum"', '"no_sum"'), "meta is not what was saved"),
        ("meta", lambda text: "{}", "meta is not what was saved"),
    ],
    ids=["data", "meta", "no sum", "nothing"],
)
def test_what_changed_is_named(copied, run, blank, capsys, item, damage, problem):
    file = copied / FOLDER / "4" / item / "metadata"
    kept = file.read_text()
    assert damage(kept) != kept
    file.write_text(damage(kept))
    if item == "meta":
        with pytest.raises(UserError, match=f"damaged \\({problem}\\); other steps there: 2$"):
            load_checkpoint(copied / FOLDER / "4")
    assert _restored(copied, run, blank) == 2
    told = capsys.readouterr().out
    _assert_told(told, copied, 2)
    assert problem in told


def test_evaluation_of_a_damaged_checkpoint_names_it_and_other_steps(copied):
    shutil.rmtree(copied / FOLDER / "4" / "params")
    with pytest.raises(UserError, match=r"checkpoints/4: damaged .*; other steps there: 2$"):
        load_checkpoint(copied / FOLDER / "4")
    with pytest.raises(UserError, match="no such checkpoint; give a run's folder"):
        load_checkpoint(copied / "nothing")


def test_a_checkpoint_of_another_version_is_not_called_damaged(copied, run, blank):
    """Its config has a field that is no more, and lacks one."""
    file = copied / FOLDER / "4" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["meta_sum"]
    meta["config"]["train"]["sft"]["once"] = meta["config"]["train"].pop("max_consecutive_skipped")
    file.write_text(json.dumps(meta | {"meta_sum": json_sum(meta)}))
    told = r"is of another version of apr_jax \(config train.sft.once=3: .*\); train again"
    with pytest.raises(UserError, match=told):
        load_checkpoint(copied / FOLDER / "4")
    told = (
        r"was saved with train.max_consecutive_skipped=None \(now 3\), train.sft.once=3 \(now"
        r" None\); use the same settings"
    )
    with Checkpoints(copied, run) as checkpoints, pytest.raises(UserError, match=told):
        checkpoints.restore_latest(blank)


def test_a_checkpoint_that_does_not_say_whether_a_validation_is_due_is_of_another_version(
    copied, run, blank
):
    file = copied / FOLDER / "4" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["meta_sum"], meta["unvalidated"]
    file.write_text(json.dumps(meta | {"meta_sum": json_sum(meta)}))
    told = pytest.raises(
        UserError, match="/4: is of another version of apr_jax; use another --workdir"
    )
    with Checkpoints(copied, run) as checkpoints, told:
        checkpoints.restore_latest(blank)


def test_all_steps_damaged_is_an_error(copied, run, blank):
    for step in ("2", "4"):
        shutil.rmtree(copied / FOLDER / step / "params")
    with (
        Checkpoints(copied, run) as checkpoints,
        pytest.raises(UserError, match="all 2 steps are damaged; move it away to start anew"),
    ):
        checkpoints.restore_latest(blank)
    assert {entry.name for entry in (copied / FOLDER).iterdir()} == {
        "2",
        "4",
    }, "nothing may be deleted"


def test_a_passing_fault_costs_no_checkpoint(copied, run, blank):
    """What is missing now, as on a network disk that is not mounted, may be there later."""
    hidden = [(copied / FOLDER / step / "params", copied / f"hidden{step}") for step in ("2", "4")]
    for params, away in hidden:
        params.rename(away)
    with Checkpoints(copied, run) as checkpoints, pytest.raises(UserError):
        checkpoints.restore_latest(blank)
    for params, away in hidden:
        away.rename(params)
    assert _restored(copied, run, blank) == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: dataclasses.replace(run, method="sos"), "method='apr', not 'sos'"),
        (lambda run: dataclasses.replace(run, stage="rl"), "stage='sft', not 'rl'"),
        (lambda run: dataclasses.replace(run, origin="abc"), "init='', not 'abc'"),
        (
            lambda run: dataclasses.replace(run, tokenizer=Tokenizer.train(["0123456789+"])),
            "tokenizer=",
        ),
        (
            lambda run: dataclasses.replace(
                run, config=dataclasses.replace(run.config, seed=5, name="other")
            ),
            r"name='tiny' \(now 'other'\), seed=0 \(now 5\); use the same settings",
        ),
    ],
)
def test_another_run_is_refused_and_the_difference_named(saved, run, blank, change, told):
    with Checkpoints(saved, change(run)) as checkpoints, pytest.raises(UserError, match=told):
        checkpoints.restore_latest(blank)


def test_what_decides_speed_alone_may_change(saved, run, blank):
    schedule = dataclasses.replace(run.config.schedule, slots=3, prefill_batch=2)
    faster = dataclasses.replace(run, config=dataclasses.replace(run.config, schedule=schedule))
    with Checkpoints(saved, faster) as checkpoints:
        assert checkpoints.restore_latest(blank) is not None


@pytest.mark.parametrize(
    ("stage", "change", "told"),
    [
        ("sft", {"steps": 7}, ""),
        ("rl", {"steps": 7, "problems": 5}, ""),
        ("sft", {"batch_rows": 3}, r"train.sft.batch_rows=\d+ \(now 3\); use the same"),
    ],
)
def test_a_run_may_be_lengthened_and_the_other_stage_is_no_business_of_it(
    saved, run, blank, stage, change, told
):
    learn = dataclasses.replace(
        run.config.train, **{stage: dataclasses.replace(getattr(run.config.train, stage), **change)}
    )
    changed = dataclasses.replace(run, config=dataclasses.replace(run.config, train=learn))
    refused = pytest.raises(UserError, match=told) if told else contextlib.nullcontext()
    with Checkpoints(saved, changed) as checkpoints, refused:
        assert checkpoints.restore_latest(blank) is not None


def test_an_unfinished_save_is_ignored(copied, run, blank):
    shutil.copytree(copied / FOLDER / "2", copied / FOLDER / "6.orbax-checkpoint-tmp")
    assert _restored(copied, run, blank) == 4
    assert load_checkpoint(copied).step == 4


# What is wrong with the machine, as Python, TensorStore, gRPC and XLA say it.
_OF_THE_MACHINE = [
    MemoryError(),
    RuntimeError("can't start new thread"),
    AssertionError(),
    RuntimeError("Unable to initialize backend 'tpu': it is in use"),
    PermissionError(errno.EACCES, "Permission denied", "x"),
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.EIO, "Input/output error"),
    ValueError("PERMISSION_DENIED: Error opening file [OS error 13: EACCES Permission denied]"),
    ValueError("Error reading file [OS error 24: EMFILE Too many open files]"),
    ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes"),
    ValueError("UNAVAILABLE: connection to the bucket lost"),
    ImportError("no such module"),
]


@pytest.mark.parametrize("error", _OF_THE_MACHINE, ids=repr)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_wrong_with_the_machine_is_never_called_damage(
    copied, run, blank, monkeypatch, error, wrapped
):
    """Neither evaluation nor a restart takes another step, moves one, or says that one should be
    deleted.
    """
    if wrapped:  # As Orbax does.
        inner, error = error, Exception("Encountered error while reading array index")
        error.__cause__ = inner

    def failing(*arguments):
        raise error

    monkeypatch.setattr(manager, "_read_params", failing)
    monkeypatch.setattr(manager, "_read_arrays", failing)
    told = r"checkpoints/4: cannot be read here and now \(.+\); this is no damage"
    for path in (copied, copied / FOLDER / "4"):
        with pytest.raises(UserError, match=told) as caught:
            load_checkpoint(path)
        assert "delete" not in str(caught.value)
    with Checkpoints(copied, run) as checkpoints, pytest.raises(UserError, match=told):
        checkpoints.restore_latest(blank)
    assert {entry.name for entry in (copied / FOLDER).iterdir()} == {"2", "4"}
    assert not (copied / "damaged").exists()


def test_a_file_that_may_not_be_read_is_no_damage(copied, run, blank, monkeypatch):
    """Root may read everything, so the reading itself says no: as it does where only the newest
    step is another user's.
    """
    read_text = Path.read_text

    def refused(path, *arguments, **options):
        if path.parts[-3:] == ("4", "meta", "metadata"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    told = (
        r"checkpoints/4: cannot be read here and now \(.*Permission denied.*\); this is no damage"
    )
    with pytest.raises(UserError, match=told):
        load_checkpoint(copied)
    with Checkpoints(copied, run) as checkpoints, pytest.raises(UserError, match=told):
        checkpoints.restore_latest(blank)
    monkeypatch.undo()
    assert _restored(copied, run, blank) == 4


def _cut_off(folder):
    meta = folder / "meta" / "metadata"
    meta.write_bytes(meta.read_bytes()[:100])


def _not_there(folder):
    shutil.rmtree(folder / "meta")


@pytest.mark.parametrize("hurt", [_cut_off, _not_there])
@pytest.mark.parametrize("step", ["2", "4"])
def test_an_older_model_never_takes_the_place_of_a_damaged_one(copied, hurt, step):
    """Which step is the best is written in the metas; where one is damaged, the user names a step,
    or nothing is done.
    """
    hurt(copied / FOLDER / step)
    other = copied / FOLDER / ("2" if step == "4" else "4")
    told = (
        rf"checkpoints/{step}: damaged \(.*\), so which step of the run is the best is not known;"
        rf" .* name it \({other}\)"
    )
    with pytest.raises(UserError, match=told):
        load_checkpoint(copied)
    with pytest.raises(
        UserError, match=rf"checkpoints/{step}: damaged \(.*\); other steps there: {other.name}$"
    ):
        load_checkpoint(copied / FOLDER / step)
    assert load_checkpoint(other).step == int(other.name)


def test_a_step_that_cannot_say_its_score_is_not_deleted(tmp_path, run, blank):
    """It may have been the best, and may be read again."""
    _save(tmp_path, run, blank, {1: 0.9, 2: 0.1, 3: 0.2})
    meta = tmp_path / FOLDER / "1" / "meta"
    meta.rename(tmp_path / "away")
    _save(tmp_path, run, blank, {4: 0.3, 5: 0.2})
    (tmp_path / "away").rename(meta)
    assert sorted(int(entry.name) for entry in (tmp_path / FOLDER).iterdir()) == [1, 4, 5]
    assert load_checkpoint(tmp_path).step == 1


def test_a_full_disk_says_so(tmp_path):
    with (
        pytest.raises(UserError, match="the disk is full; make room"),
        disk_errors(tmp_path),
        open("/dev/full", "w") as f,
    ):
        f.write("x" * 100_000)
    # The way TensorStore reports it.
    with pytest.raises(UserError, match="the disk is full"), disk_errors(tmp_path):
        raise ValueError(
            "RESOURCE_EXHAUSTED: Error writing x: No space left on device [OS error 28: ENOSPC]"
        )
