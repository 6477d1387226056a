"""Scale nano: a model of less than 1M parameters, for minutes on 2 CPU cores.

Its problems have three numbers from 1 to 30.

    apr reproduce --scale nano --out runs/nano
"""

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment() -> Experiment:
    """Makes the experiment of scale nano."""
    window = 176
    return Experiment(
        name="nano",
        seed=0,
        task=TaskConfig(
            "countdown",
            numbers=3,
            low=1,
            high=30,
            target_low=10,
            target_high=100,
            solver=SolverConfig(
                parent_beam=12,
                parent_beam_low=10,
                max_children=12,
                spawn_probability=0.9,
                shuffle=False,
                condition=0.25,
                window_bin=32,
            ),
        ),
        data=DataConfig(demonstrations=30_000, heldout=1_000),
        model=ModelConfig(layers=4, width=128, heads=4, kv_heads=1, head_size=32, mlp=352),
        limits=Limits(
            window=window, max_thread_tokens=window + 64, max_threads=13, children=12, max_depth=1
        ),
        schedule=Schedule(slots=32, prefill_batch=1, prefill_chunk=16, context_buckets=(88,)),
        train=TrainConfig(
            sft=SftConfig(
                steps=2400,
                batch_rows=8,
                save_every=500,
                log_every=20,
                validate_every=800,
                validation=300,
                optimizer=OptimizerConfig(name="muon", lr=4e-3),
            ),
            rl=RlConfig(
                steps=25,
                problems=16,
                group=8,
                objective=ObjectiveConfig(advantage="leave_one_out"),
                micro_batch_rows=8,
                validate_every=8,
                validation=300,
                optimizer=OptimizerConfig(lr=6e-5, warmup=2, decay=0.1, weight_decay=0.0),
            ),
        ),
        evaluate=EvalConfig(
            batch=250,
            problems=250,
            validation=250,
            samples=8,
            temperatures=(1.0,),
            children=(2, 5, 8, 11),
            bins=(1, 2),
            # Most problems have 9 or 10 first steps, and few have fewer than 8. A root that is
            # forced to spawn more children than there are first steps breaks the protocol.
            forced=(8,),
            timed=12,
        ),
    )
