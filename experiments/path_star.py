"""Path-star: graphs of three arms with four edges each, answered at once, serially, in parallel.

The experiment trains on 2 CPU cores. Its data have three methods: "direct" answers the path at
once, "serial" writes out arm after arm in one thread, "parallel" has a child for each arm.

    apr reproduce --config experiments/path_star.py --out runs/path_star

All three are trained and evaluated at the same window. Whoever answers at once and never looks
ahead is right in one of three cases.
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
        name="path_star",
        seed=0,
        task=TaskConfig("path_star", arms=3, length=4),
        data=DataConfig(demonstrations=20_000, heldout=1_000),
        model=ModelConfig(layers=3, width=96, heads=3, kv_heads=1, head_size=32, mlp=256),
        # Three messages with twelve edges each make the root of a parallel tree 69 positions long,
        # and 86 tokens with what is joined. All other threads are shorter than 40.
        limits=Limits(window=80, max_thread_tokens=96, max_threads=4, children=3, max_depth=1),
        schedule=Schedule(slots=64, prefill_batch=8, prefill_chunk=16, context_buckets=(40,)),
        train=TrainConfig(
            sft=SftConfig(
                steps=5_000,
                batch_rows=8,
                save_every=2_500,
                log_every=50,
                validate_every=2_500,
                validation=200,
                optimizer=OptimizerConfig(name="muon", lr=4e-3),
            ),
            rl=RlConfig(
                steps=10,
                problems=16,
                group=8,
                objective=ObjectiveConfig(advantage="leave_one_out"),
                micro_batch_rows=24,
                validate_every=10,
                validation=200,
                optimizer=OptimizerConfig(lr=6e-5, warmup=2, decay=0.1, weight_decay=0.0),
            ),
        ),
        # A parallel tree takes as many tokens as 12 direct answers.
        evaluate=EvalConfig(batch=250, problems=1_000, samples=12),
    )
