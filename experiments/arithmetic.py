"""Arithmetic: expressions of four levels, worked out by one thread, by three, and by one for each.

The experiment trains on 2 CPU cores. Its data have three methods: "serial" works out all operations
in one thread, "parallel" has one level of children, "nested" a thread for each operation.

    apr reproduce --config experiments/arithmetic.py --out runs/arithmetic

All are also evaluated in a window of 80, in which every demonstration of the other methods fits and
the long serial ones do not.
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
        name="arithmetic",
        seed=0,
        task=TaskConfig("arithmetic", height=4, fullness=0.7, modulus=10),
        data=DataConfig(demonstrations=20_000, heldout=1_000),
        model=ModelConfig(layers=3, width=96, heads=3, kv_heads=1, head_size=32, mlp=256),
        # The longest serial demonstration, of 15 operations, takes 127 positions; the longest
        # thread of the other methods 73, and 87 tokens. A spawn divides the threads that are left
        # evenly among its children and their parent, so a tree of 15 threads needs 3^3 = 27.
        limits=Limits(window=128, max_thread_tokens=128, max_threads=27, children=2, max_depth=3),
        schedule=Schedule(slots=64, prefill_batch=8, prefill_chunk=16, context_buckets=(40, 80)),
        train=TrainConfig(
            sft=SftConfig(
                steps=8_000,
                batch_rows=4,
                save_every=4_000,
                log_every=50,
                validate_every=4_000,
                validation=200,
                optimizer=OptimizerConfig(name="muon", lr=4e-3),
            ),
            rl=RlConfig(
                steps=25,
                problems=16,
                group=8,
                objective=ObjectiveConfig(advantage="leave_one_out"),
                micro_batch_rows=24,
                validate_every=8,
                validation=200,
                optimizer=OptimizerConfig(lr=6e-5, warmup=2, decay=0.1, weight_decay=0.0),
            ),
        ),
        evaluate=EvalConfig(batch=250, problems=1_000, windows=(80,)),
    )
