"""Countdown, all solutions: every way to a target, found by one thread or by children.

The experiment trains on 2 CPU cores. Every problem has three numbers and two solutions at least. Of
the two methods in its data, "serial" tries every step in one thread, and "parallel" has a child for
each first step; each child joins the set of the solutions that it found.

    apr reproduce --config experiments/countdown_all.py --out runs/countdown_all

Both are also evaluated in a window of 160, in which 91% of the parallel demonstrations fit and 18%
of the serial ones.
"""

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment() -> Experiment:
    """Makes the experiment."""
    return Experiment(
        name="countdown_all",
        seed=0,
        task=TaskConfig(
            "countdown",
            numbers=3,
            low=1,
            high=30,
            target_low=2,
            target_high=100,
            solutions="all",
            least_solutions=2,
        ),
        data=DataConfig(demonstrations=20_000, heldout=1_000),
        model=ModelConfig(layers=3, width=96, heads=3, kv_heads=1, head_size=32, mlp=256),
        # Demonstrations of problems with eight solutions and more are too long for this.
        limits=Limits(window=280, max_thread_tokens=344, max_threads=13, children=12, max_depth=1),
        schedule=Schedule(slots=64, prefill_batch=8, prefill_chunk=16, context_buckets=(80, 160)),
        train=TrainConfig(
            sft=SftConfig(
                steps=5_000,
                batch_rows=4,
                save_every=2_500,
                log_every=50,
                validate_every=2_500,
                validation=200,
                optimizer=OptimizerConfig(name="muon", lr=4e-3),
            ),
            rl=RlConfig(
                steps=15,
                problems=16,
                group=8,
                objective=ObjectiveConfig(advantage="leave_one_out"),
                micro_batch_rows=10,
                validate_every=15,
                validation=200,
                optimizer=OptimizerConfig(lr=6e-5, warmup=2, decay=0.1, weight_decay=0.0),
            ),
        ),
        evaluate=EvalConfig(batch=250, problems=1_000, samples=4, windows=(160,)),
    )
