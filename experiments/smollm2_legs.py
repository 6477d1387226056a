"""SmolLM2 counts legs: a data set of reasoning-gym, in one thread and with a child for each item.

The second part of `make smollm2` (experiments/smollm2.py). The problems are those of reasoning-gym
as they are, lists of 3 to 10 kinds of animals (experiments/leg_counting_task.py). The model is left
open: network and tokenizer are those of the model that a training starts from.

    apr data build --config experiments/smollm2_legs.py --out runs/mine/data --init MODEL
    apr train sft --config experiments/smollm2_legs.py --workdir runs/mine/sft --init MODEL
    apr eval --checkpoint runs/mine/sft --problems runs/mine/data/test.jsonl --out runs/mine/eval
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
        name="smollm2_legs",
        seed=0,
        task=TaskConfig("leg_counting_task.py:LegCounting"),
        data=DataConfig(demonstrations=600, heldout=200),
        model=ModelConfig(),
        limits=Limits(window=320, max_thread_tokens=384, max_threads=11, children=10, max_depth=1),
        schedule=Schedule(slots=32, prefill_batch=4, prefill_chunk=32, context_buckets=(160,)),
        train=TrainConfig(
            sft=SftConfig(
                epochs=1,
                batch_rows=2,
                save_every=50,
                log_every=5,
                optimizer=OptimizerConfig(lr=2e-4, warmup=20, decay=0.1),
            ),
            rl=RlConfig(
                steps=8,
                problems=12,
                group=6,
                objective=ObjectiveConfig(advantage="leave_one_out", kl=0.0),
                micro_batch_rows=4,
                validate_every=0,
                save_every=2,
                optimizer=OptimizerConfig(lr=1e-5, warmup=2, decay=0.1, weight_decay=0.0),
            ),
        ),
        evaluate=EvalConfig(batch=64, problems=120, samples=1, temperatures=(), windows=(224, 160)),
    )
