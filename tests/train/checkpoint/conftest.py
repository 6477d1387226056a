"""A run with two saved steps, and what it is compared with."""

import gc
import shutil
import time

import jax
import pytest
from helpers.checkpoints import OPTIMIZER, save_steps

from apr_jax.model.transformer import init_params
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.train.checkpoint import Run
from apr_jax.train.state import init_state


@pytest.fixture
def late_complaints():
    """Lets Orbax's reading threads end while the test's filter of warnings holds."""
    yield
    gc.collect()
    time.sleep(0.1)
    gc.collect()


@pytest.fixture(scope="module")
def run(config):
    return Run(
        config, "apr", "sft", SentencePieceTokenizer.train(["0123456789+-*/,:;=#>"]), origin=""
    )


@pytest.fixture(scope="module")
def blank(config, mesh):
    return init_state(init_params(config.model, 31, jax.random.key(0)), OPTIMIZER, mesh)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, run, blank):
    workdir = tmp_path_factory.mktemp("saved")
    save_steps(workdir, run, blank, {2: None, 4: None})
    return workdir


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of that run, to be hurt."""
    return shutil.copytree(saved, tmp_path / "copied")
