"""An experiment on the task `MyTask`: a small model, for minutes on two CPU cores.

Any field can be changed here, or for one command by `--set`, for example
`--set train.sft.steps=500`.
"""

from apr_jax.config import Experiment
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment() -> Experiment:
    """Makes the experiment."""
    return Experiment(
        name="my_task",
        seed=0,
        task=TaskConfig("my_task.py:MyTask", count=4, high=30),
        # `apr task check my_task.py:MyTask` says which limits hold all demonstrations.
        limits=Limits(
            window=64, max_thread_tokens=96, max_threads=3, children=2, max_depth=1, constrain=True
        ),
        data=DataConfig(demonstrations=8_000, heldout=200),
        model=ModelConfig(layers=3, width=96, heads=3, kv_heads=3, head_size=32, mlp=256),
        schedule=Schedule(slots=32, prefill_batch=8, prefill_chunk=16),
        train=TrainConfig(
            sft=SftConfig(
                steps=800,
                batch_rows=16,
                validate_every=200,
                validation=100,
                optimizer=OptimizerConfig(lr=3e-3),
            ),
            rl=RlConfig(
                steps=30,
                problems=16,
                group=8,
                micro_batch_rows=16,
                validate_every=10,
                validation=100,
                objective=ObjectiveConfig(advantage="leave_one_out"),
                optimizer=OptimizerConfig(lr=1e-4, warmup=2, weight_decay=0.0),
            ),
        ),
    )
