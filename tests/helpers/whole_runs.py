"""What the tests of whole runs share: a config with other settings, the command, a signal at a
step, what a run logged.
"""

import contextlib
import dataclasses
import json
import os
import struct
import sys

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from apr_jax.config import EvalConfig, Experiment, MeshConfig, to_dict
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig, RopeScaling
from apr_jax.tasks import TaskConfig
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.config import (
    LoraConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    RlConfig,
    SftConfig,
    TrainConfig,
)
from apr_jax.train.metrics.recorder import FILE

# Names of metrics that are times or rates: two equal runs differ in them and in nothing else.
SHARES = ("rollout_share", "idle_share", "update_share")
WALL_CLOCK = (
    "tokens_per_second",
    "trees_per_second",
    "mfu",
    "data_seconds",
    "step_seconds",
    *SHARES,
)


def changed(config, sft=None, rl=None, **fields):
    """The config with other values of `train.sft`, `train.rl` and its own fields."""
    learn = dataclasses.replace(
        config.train,
        sft=dataclasses.replace(config.train.sft, **(sft or {})),
        rl=dataclasses.replace(config.train.rl, **(rl or {})),
    )
    return dataclasses.replace(config, train=learn, **fields)


def write_config(config, path):
    """Makes the config an experiment file."""
    values = to_dict(config)
    path.write_text(
        "from apr_jax.config import from_dict\n\n\ndef experiment():\n    return"
        f" from_dict({values!r})\n"
    )
    return path


def train_command(stage, config_file, data_dir, workdir, *more):
    """`apr train`, to be started from the root of the repository."""
    paths = ["--config", config_file, "--data", data_dir, "--workdir", workdir, *more]
    return [sys.executable, "-m", "apr_jax", "train", stage, *map(str, paths)]


class Interrupt:
    """Wraps a step maker so that the given signal arrives during call number `at`, as from a
    user.
    """

    def __init__(self, make, at, number):
        self._make = make
        self._left = at
        self._number = number

    def __call__(self, *args):
        step = self._make(*args)

        def interrupted(*args):
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._number)
            return step(*args)

        return interrupted


def logged(workdir):
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


def repeatable(workdir):
    """The same without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in WALL_CLOCK}
        for line in logged(workdir)
    ]


def assert_close(workdir, other, but=()):
    """The runs logged the same lines and ended with the same parameters, within float32; metrics
    named by `but` aside.

    On other devices sums are taken in another order. What is logged is a mean over hundreds of
    tokens: 1e-4 of it, or 1e-5 where it is a small difference (losses of advantages that cancel
    out, KL). Parameters may be off by more: the optimizer divides gradients by their size, so where
    one is next to nothing its rounding decides. 1e-4 is a tenth of one update of RL (learning rate
    1e-3) and a hundredth of a supervised one (1e-2).
    """
    got, expected = repeatable(workdir), repeatable(other)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["stage"] == theirs["stage"]
        assert mine.get("tokens") == theirs.get("tokens")
        for name in theirs.keys() - {"stage", *but}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (
                mine["step"],
                name,
            )
    params = load_checkpoint(workdir).params, load_checkpoint(other).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), *params)


def unlike():
    """An experiment in which no setting is its default, nor what the tests' shared `config` has.

    A setting that gets lost on its way is replaced by one of these two, so only here it shows. Nor
    are two counts equal that could be mistaken for each other. `end_to_end/test_unlike.py` makes
    sure that a new field has a value here.
    """
    optimizer = OptimizerConfig(
        name="muon", lr=3e-3, warmup=3, decay=0.5, weight_decay=0.1, clip=0.7, b2=0.9
    )
    learn = TrainConfig(
        sft=SftConfig(
            batch_rows=4,
            optimizer=optimizer,
            lora=LoraConfig(rank=3, alpha=5.0, targets=("q", "v", "down", "control")),
            epochs=0.5,
            streams=2,
            save_every=1,
            log_every=2,
            validate_every=3,
            validation=5,
        ),
        rl=RlConfig(
            steps=1,
            problems=6,
            group=4,
            optimizer=dataclasses.replace(optimizer, lr=2e-3),
            lora=LoraConfig(rank=2, alpha=7.0, targets=("k", "o", "gate", "up")),
            objective=ObjectiveConfig(
                advantage="leave_one_out",
                loss_aggregation="token",
                clip=0.3,
                dual_clip=4.0,
                kl=0.05,
                kl_estimator="k2",
                entropy=0.01,
                importance_cap=2.0,
            ),
            reward=RewardConfig(
                token_price=0.002,
                sequential_price=0.001,
                critical_path=0.2,
                token_budget=50,
                price_step=0.0003,
                overlong="penalised",
                overlong_penalty=0.5,
                time_limit=20.0,
                memory_limit=3.0,
                workers=2,
                max_unknown=0.3,
            ),
            ppo_epochs=3,
            temperature=0.8,
            max_staleness=2,
            micro_batch_rows=4,
            validate_every=1,
            validation=5,
            save_every=2,
            difference_bound=0.5,
            mean_difference_bound=0.4,
            outside_clip_bound=0.6,
        ),
        max_consecutive_skipped=4,
        hang_factor=30.0,
        hang_seconds=900.0,
        tracker="wandb",
    )
    return Experiment(
        name="unlike",
        seed=5,
        task=TaskConfig(
            "countdown",
            numbers=2,
            low=2,
            high=12,
            target_low=4,
            target_high=40,
            solver=SolverConfig(
                serial_beam=3,
                depth_first="near",
                parent_beam=3,
                parent_beam_low=2,
                child_beam=6,
                max_children=5,
                spawn_probability=0.8,
                shuffle=True,
                max_intermediate=60,
                condition=0.75,
                window_bin=16,
                render="sos",
                number_pieces=30,
            ),
        ),
        data=DataConfig(demonstrations=24, heldout=5, seed=3, correct_only=True),
        model=ModelConfig(
            layers=2,
            width=24,
            heads=4,
            kv_heads=2,
            head_size=4,
            mlp=20,
            tied=False,
            norm_epsilon=1e-5,
            qkv_bias=True,
            qk_norm=True,
            rope_base=500.0,
            rope_scaling=RopeScaling(
                factor=2.0,
                low_frequency_turns=1.5,
                high_frequency_turns=5.0,
                original_length=64,
            ),
            max_positions=512,
            dtype="bfloat16",
            param_dtype="bfloat16",
            remat="layer",
        ),
        limits=Limits(
            window=160,
            max_thread_tokens=224,
            max_threads=7,
            children=3,
            max_depth=2,
            max_tokens=150,
            max_sequential=120,
            constrain=True,
        ),
        schedule=Schedule(
            slots=6, prefill_batch=2, prefill_chunk=4, context_buckets=(80,), small_batch_sizes=(2,)
        ),
        train=learn,
        evaluate=EvalConfig(
            compared=False,
            headline=0.5,
            batch=4,
            problems=2,
            validation=4,
            samples=3,
            temperatures=(0.7,),
            children=(1,),
            bins=(2,),
            forced=(2,),
            sweep="rl",
            timed=1,
            repeats=2,
            ablations=True,
        ),
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
    )


def shown(workdir):
    """What TensorBoard shows of a run, {(name, step): number or text}.

    Its event files are of records: length, its checksum, event, its checksum. A start of the run
    takes back what earlier ones said of its first step and those after it.
    """
    found = {}
    for path in sorted((workdir / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                key = (value.tag, event.step)
                text = value.tensor.string_val
                assert key not in found, "a step is shown once"
                found[key] = text[0].decode() if text else value.simple_value
    return found


@contextlib.contextmanager
def compilations():
    """Names of the programs compiled inside, or taken from the cache on disk; "jit(step)" is the
    update of both stages.

    `_cache_size` is no count of them: a state that comes out of the step itself is known by another
    key.
    """
    names = []

    def hear(event, seconds, fun_name="", **_):
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
