"""A damaged step is reported and set aside; what is not damaged is left alone."""

import contextlib
import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import assert_equal, assert_reported, restored_step, save_steps, state_at

from apr_jax.errors import UserError
from apr_jax.train.checkpoint import FOLDER, Checkpoints, load, load_checkpoint, resume

# Orbax's reading threads trip over damage too, after the error is known.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("late_complaints"),
]


def _files(saved):
    return sorted(
        str(f.relative_to(saved)) for f in (saved / FOLDER / "4").rglob("*") if f.is_file()
    )


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["missing", "truncated", "empty"])
def test_damaged_step_is_reported_and_previous_used(saved, run, blank, tmp_path, capsys, how):
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
        step = restored_step(workdir, run, blank)
        assert_reported(capsys.readouterr().out, workdir, step)
        if step == 2:
            damaged += 1
            assert not (workdir / FOLDER / "4").exists(), "in the way of saving step 4 anew"
            assert (workdir / "damaged" / "4.0").is_dir(), "set aside, not deleted"
            if damaged == 1:
                save_steps(workdir, run, blank, {4: None})
                assert load_checkpoint(workdir).step == 4
    assert damaged >= 6


@pytest.mark.thorough
@pytest.mark.parametrize("seed", [0, 1])
def test_a_flipped_bit_anywhere_is_harmless_or_reported(saved, run, blank, tmp_path, capsys, seed):
    """One bit in each file: inside arrays neither Orbax nor TensorStore would notice."""
    reported = set()
    random = np.random.default_rng(seed)
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
            assert_equal(load_checkpoint(workdir / FOLDER / "4").params, state_at(blank, 4).params)
        step = restored_step(workdir, run, blank)
        assert_reported(capsys.readouterr().out, workdir, step)
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
    assert restored_step(copied, run, blank) == 2
    told = capsys.readouterr().out
    assert_reported(told, copied, 2)
    assert problem in told


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
    assert restored_step(copied, run, blank) == 4


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


@pytest.mark.thorough
@pytest.mark.parametrize("error", _OF_THE_MACHINE, ids=repr)
@pytest.mark.parametrize("wrapped", [False, True])
def test_machine_faults_are_never_called_damage(copied, run, blank, monkeypatch, error, wrapped):
    """Neither evaluation nor a restart takes another step, moves one, or says that one should be
    deleted.
    """
    if wrapped:  # As Orbax does.
        inner = error
        error = Exception("Encountered error while reading array index")
        error.__cause__ = inner

    def failing(*arguments):
        raise error

    monkeypatch.setattr(load, "_read_arrays", failing)
    monkeypatch.setattr(resume, "_read_arrays", failing)
    told = r"checkpoints/4: cannot be read here and now \(.+\); this is no damage"
    for path in (copied, copied / FOLDER / "4"):
        with pytest.raises(UserError, match=told) as caught:
            load_checkpoint(path)
        assert "delete" not in str(caught.value)
    with Checkpoints(copied, run) as checkpoints, pytest.raises(UserError, match=told):
        checkpoints.restore_latest(blank)
    assert {entry.name for entry in (copied / FOLDER).iterdir()} == {"2", "4"}
    assert not (copied / "damaged").exists()


def test_unreadable_file_is_no_damage(copied, run, blank, monkeypatch):
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
    assert restored_step(copied, run, blank) == 4
