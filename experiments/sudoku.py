"""Mini-sudoku: one thread that guesses and goes back, and a child for each digit of a guess.

The experiment trains on 2 CPU cores. Of the three methods in its data, "serial" tries one digit
after the other in one thread, "parallel" has one level of children, and in "nested" a child of a
child may spawn, too. Every puzzle needs one guess, or two within one another.

    apr reproduce --config experiments/sudoku.py --out runs/sudoku

It trains "serial" and "nested". Both are also evaluated in windows of 512 and 400: nearly every
nested demonstration fits in them, and of the serial ones 87% and 58%.
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
        name="sudoku",
        seed=0,
        task=TaskConfig("sudoku", least_levels=1, most_levels=2),
        data=DataConfig(demonstrations=12_000, heldout=1_000),
        model=ModelConfig(layers=3, width=96, heads=3, kv_heads=1, head_size=32, mlp=256),
        limits=Limits(window=768, max_thread_tokens=768, max_threads=9, children=2, max_depth=2),
        schedule=Schedule(slots=64, prefill_batch=8, prefill_chunk=16, context_buckets=(192, 384)),
        train=TrainConfig(
            sft=SftConfig(
                steps=6_000,
                batch_rows=2,
                save_every=3_000,
                log_every=50,
                validate_every=3_000,
                validation=200,
                optimizer=OptimizerConfig(name="muon", lr=4e-3),
            ),
            rl=RlConfig(
                steps=20,
                problems=16,
                group=8,
                objective=ObjectiveConfig(advantage="leave_one_out"),
                micro_batch_rows=16,
                validate_every=10,
                validation=200,
                optimizer=OptimizerConfig(lr=6e-5, warmup=2, decay=0.1, weight_decay=0.0),
            ),
        ),
        evaluate=EvalConfig(
            batch=250, problems=1_000, windows=(512, 400), methods=("serial", "nested")
        ),
    )
