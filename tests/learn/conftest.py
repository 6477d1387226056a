"""A data set, a model and configs so small that whole runs take seconds, on two simulated devices."""

import jax
import pytest

from apr_jax.config import EvalConfig, Experiment, MeshConfig
from apr_jax.data.build import build
from apr_jax.data.config import DataConfig
from apr_jax.learn.config import LearnConfig, OptimizerConfig, RlConfig, SftConfig
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import make_mesh
from apr_jax.tasks.config import CountdownConfig, SolverConfig
from apr_jax.threads.limits import Limits, Schedule


@pytest.fixture(scope="session")
def config() -> Experiment:
    learn = LearnConfig(
        sft=SftConfig(steps=6, rows=2, optimizer=OptimizerConfig(lr=1e-2, warmup=2), save_every=2, log_every=1),
        rl=RlConfig(
            steps=3,
            problems=2,
            group=2,
            optimizer=OptimizerConfig(lr=1e-3, warmup=1),
            rows=2,
            inner_steps=2,
            validate_every=2,
            validation=3,
            save_every=1,
        ),
        bad_steps=3,
    )
    return Experiment(
        name="tiny",
        seed=0,
        task=CountdownConfig(numbers=3, low=1, high=6, target_low=10, target_high=20),
        solver=SolverConfig(shuffle=False, condition=0.25, window_bin=32, parent_beam=4, max_children=4, serial_beam=2),
        data=DataConfig(demonstrations=48, heldout=8),
        model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_size=8, mlp=16),
        limits=Limits(window=64, stream=96, slots=5, children=4, max_depth=1, max_tokens=200),
        schedule=Schedule(lanes=8, admit=4, chunk=8),
        learn=learn,
        evaluate=EvalConfig(batch=8),
        mesh=MeshConfig(data=2),
    )


@pytest.fixture(scope="session")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def data_dir(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    build(config, path, methods=("apr",), progress=False, workers=1)
    return path
