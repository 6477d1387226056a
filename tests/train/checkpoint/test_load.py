"""Weights for evaluation: what they need, and what a damaged step does."""

import shutil

import pytest
from helpers.checkpoints import assert_equal, state_at

from apr_jax.errors import UserError
from apr_jax.train.checkpoint import FOLDER, load_checkpoint

# Orbax's reading threads trip over damage too, after the error is known.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("late_complaints"),
]


def test_evaluation_needs_neither_optimizer_nor_data(saved, run, blank, tmp_path):
    shutil.copytree(saved / FOLDER / "4", tmp_path / FOLDER / "4")
    shutil.rmtree(tmp_path / FOLDER / "4" / "state")
    shutil.rmtree(tmp_path / FOLDER / "4" / "data")
    for path in (tmp_path, tmp_path / FOLDER / "4"):
        restored = load_checkpoint(path)
        assert_equal(restored.params, state_at(blank, 4).params)
        assert restored.config == run.config
        assert restored.tokenizer.to_bytes() == run.tokenizer.to_bytes()
        assert (restored.method, restored.stage, restored.step) == ("apr", "sft", 4)
        assert restored.path == str(tmp_path / FOLDER / "4")


def test_evaluation_names_damaged_checkpoint_and_other_steps(copied):
    shutil.rmtree(copied / FOLDER / "4" / "params")
    with pytest.raises(UserError, match=r"checkpoints/4: damaged .*; other steps there: 2$"):
        load_checkpoint(copied / FOLDER / "4")
    with pytest.raises(UserError, match="no such checkpoint; give a run's folder"):
        load_checkpoint(copied / "nothing")
