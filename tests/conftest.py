"""How every test runs: eight simulated devices, shapes and types checked at each call, compiled
programs kept on disk.
"""

import os
import signal
import sys
from pathlib import Path

# Before JAX is imported: the number of simulated devices can't change afterwards.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".lstrip()
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("APR_CACHE", str(Path(__file__).parents[1] / ".cache" / "xla"))

# A shell that starts the tests in the background makes them and their processes deaf to Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Helpers are imported from the package `helpers`, which stands beside this file.
sys.path.insert(0, str(Path(__file__).parent))

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes and types are checked at each call where a shape error would broadcast silently. Of the
# threads, forests, prompts and the reference interpreter also hold arrays of numpy, and are left
# out.
_CHECKED = (
    "model",
    "threads.decode_step",
    "threads.engine",
    "threads.keys",
    "threads.positions",
    "threads.prefill",
    "threads.protocol",
    "threads.sampling",
    "threads.scheduler",
    "threads.sharded",
    "threads.spawn_join",
    "train.rl.objective",
)
install_import_hook([f"apr_jax.{module}" for module in _CHECKED], "helpers.check")

from apr_jax.config import EvalConfig, Experiment, MeshConfig
from apr_jax.data.build import build
from apr_jax.data.config import DataConfig
from apr_jax.io.runtime import keep_compiled
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import OptimizerConfig, RlConfig, SftConfig, TrainConfig
from apr_jax.train.sft import train_sft

keep_compiled()


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """Unloads a module's programs after it: each takes memory maps, and a process that has 65,530
    of them crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def config() -> Experiment:
    """A model, data and training so small that whole runs take seconds, on two of the simulated
    devices.
    """
    learn = TrainConfig(
        sft=SftConfig(
            steps=6,
            batch_rows=2,
            optimizer=OptimizerConfig(lr=1e-2, warmup=2),
            save_every=2,
            log_every=1,
        ),
        rl=RlConfig(
            steps=3,
            problems=2,
            group=2,
            optimizer=OptimizerConfig(lr=1e-3, warmup=1),
            micro_batch_rows=2,
            ppo_epochs=2,
            validate_every=2,
            validation=3,
            save_every=1,
        ),
        max_consecutive_skipped=3,
        tracker="tensorboard",
    )
    return Experiment(
        name="tiny",
        seed=0,
        task=TaskConfig(
            "countdown",
            numbers=3,
            low=1,
            high=6,
            target_low=10,
            target_high=20,
            solver=SolverConfig(
                shuffle=False,
                condition=0.25,
                window_bin=32,
                parent_beam=4,
                max_children=4,
                serial_beam=2,
            ),
        ),
        data=DataConfig(demonstrations=48, heldout=8),
        model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_size=8, mlp=16),
        limits=Limits(
            window=64, max_thread_tokens=96, max_threads=5, children=4, max_depth=1, max_tokens=200
        ),
        schedule=Schedule(slots=8, prefill_batch=4, prefill_chunk=8),
        train=learn,
        evaluate=EvalConfig(batch=8, problems=3, validation=3, samples=2),
        mesh=MeshConfig(data=2),
    )


@pytest.fixture(scope="session")
def data_dir(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    build(config, path, methods=("apr",), progress=False, workers=1)
    return path


@pytest.fixture(scope="session")
def checkpoint(config, data_dir, tmp_path_factory):
    """The run of a barely trained model: it spawns, errs, and runs out of window."""
    path = tmp_path_factory.mktemp("run") / "sft"
    train_sft(config, data_dir, path, "apr", progress=False)
    return path
