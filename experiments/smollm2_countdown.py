"""SmolLM2 learns the thread protocol: Countdown with three numbers, in compact text.

The first part of `make smollm2` (experiments/smollm2.py). The problems are those of scale demo. The
model is left open: network and tokenizer are those of the model that a training starts from.

    apr data build --config experiments/smollm2_countdown.py --out runs/mine/data --init MODEL
    apr train sft --config experiments/smollm2_countdown.py --workdir runs/mine/sft --init MODEL
    apr eval --checkpoint runs/mine/sft --problems runs/mine/data/test.jsonl --out runs/mine/eval

Roots of the demonstrations try any number of first steps, so reinforcement learning can find that
more children solve more.
"""

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment() -> Experiment:
    """Makes the experiment."""
    return Experiment(
        name="smollm2_countdown",
        seed=0,
        task=TaskConfig(
            "countdown",
            numbers=3,
            low=1,
            high=20,
            target_low=10,
            target_high=50,
            solver=SolverConfig(
                parent_beam=12,
                parent_beam_low=1,
                max_children=12,
                spawn_probability=0.9,
                shuffle=False,
                condition=0.0,
                max_intermediate=100,
            ),
        ),
        data=DataConfig(demonstrations=1_200, heldout=200),
        model=ModelConfig(),
        limits=Limits(window=192, max_thread_tokens=256, max_threads=13, children=12, max_depth=1),
        schedule=Schedule(slots=32, prefill_batch=4, prefill_chunk=16, context_buckets=(96,)),
        train=TrainConfig(
            sft=SftConfig(
                epochs=1,
                batch_rows=2,
                save_every=50,
                log_every=10,
                validate_every=150,
                validation=100,
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
        evaluate=EvalConfig(compared=False, batch=64, problems=150, samples=1, temperatures=()),
    )
