"""Which steps are kept, and which one is the best."""

import shutil

import pytest
from helpers.checkpoints import save_steps

from apr_jax.errors import UserError
from apr_jax.train.checkpoint import FOLDER, load_checkpoint

# Orbax's reading threads trip over damage too, after the error is known.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("late_complaints"),
]


@pytest.mark.thorough
def test_last_two_and_best_steps_are_kept(tmp_path, run, blank):
    """The best one is the one that is evaluated."""
    save_steps(tmp_path, run, blank, {0: 0.2, 1: 0.7, 2: 0.7, 3: 0.1, 4: None, 5: 0.3})
    kept = sorted(int(entry.name) for entry in (tmp_path / FOLDER).iterdir())
    assert kept == [2, 4, 5]
    assert load_checkpoint(tmp_path).step == 2
    assert load_checkpoint(tmp_path / FOLDER / "5").step == 5
    save_steps(tmp_path, run, blank, {6: 0.6, 7: 0.6})
    assert sorted(int(entry.name) for entry in (tmp_path / FOLDER).iterdir()) == [2, 6, 7]


def test_without_validation_the_last_step_is_evaluated(saved):
    assert load_checkpoint(saved).step == 4


def _cut_off(folder):
    meta = folder / "meta" / "metadata"
    meta.write_bytes(meta.read_bytes()[:100])


def _not_there(folder):
    shutil.rmtree(folder / "meta")


@pytest.mark.thorough
@pytest.mark.parametrize("hurt", [_cut_off, _not_there])
@pytest.mark.parametrize("step", ["2", "4"])
def test_older_model_never_replaces_a_damaged_one(copied, hurt, step):
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


def test_step_without_readable_score_is_not_deleted(tmp_path, run, blank):
    """It may have been the best, and may be read again."""
    save_steps(tmp_path, run, blank, {1: 0.9, 2: 0.1, 3: 0.2})
    meta = tmp_path / FOLDER / "1" / "meta"
    meta.rename(tmp_path / "away")
    save_steps(tmp_path, run, blank, {4: 0.3, 5: 0.2})
    (tmp_path / "away").rename(meta)
    assert sorted(int(entry.name) for entry in (tmp_path / FOLDER).iterdir()) == [1, 4, 5]
    assert load_checkpoint(tmp_path).step == 1
