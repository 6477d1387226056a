"""The toy task: a root shown `3+4` can guess the digit, or ask a child that knows it.

    apr data build --config experiments/hidden_digit.py --out runs/digit/data
    apr train sft --config experiments/hidden_digit.py --workdir runs/digit/sft
    apr train rl --config experiments/hidden_digit.py --workdir runs/digit/rl --init runs/digit/sft

A model that imitates the demonstrations is right in 0.55 of all cases; RL teaches it to ask always.
"""

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment() -> Experiment:
    return Experiment(
        name="hidden_digit",
        seed=0,
        task=TaskConfig("hidden_digit"),
        data=DataConfig(demonstrations=8_000, heldout=200),
        model=ModelConfig(layers=2, width=64, heads=2, kv_heads=2, head_size=32, mlp=128),
        limits=Limits(
            window=24,
            max_thread_tokens=32,
            max_threads=2,
            children=1,
            max_tokens=16,
            constrain=True,
        ),
        schedule=Schedule(slots=64, prefill_batch=16, prefill_chunk=8),
        train=TrainConfig(
            sft=SftConfig(
                steps=300,
                batch_rows=64,
                validate_every=100,
                validation=200,
                optimizer=OptimizerConfig(lr=3e-3),
            ),
            rl=RlConfig(
                steps=60,
                problems=16,
                group=16,
                objective=ObjectiveConfig(advantage="leave_one_out"),
                micro_batch_rows=64,
                validate_every=20,
                validation=200,
                optimizer=OptimizerConfig(lr=1e-3, warmup=2, weight_decay=0.0),
            ),
        ),
        evaluate=EvalConfig(batch=200, problems=200),
    )
