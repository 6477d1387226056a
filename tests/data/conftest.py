"""A small data set of the nano task, built once for the tests of this folder."""

from pathlib import Path

import pytest
from helpers.small_data import small

from apr_jax.config import Experiment
from apr_jax.data.build import build


@pytest.fixture(scope="session")
def config() -> Experiment:
    return small()


@pytest.fixture(scope="session")
def data_dir(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data")
    build(config, out, progress=False, workers=1)
    return out
