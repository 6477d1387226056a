"""Scale mini: the paper's own problems (4 numbers below 100, target 10..100), for a laptop.

    apr reproduce --scale mini --out runs/mini

The model has 1.1M parameters. On 2 CPU cores the supervised steps take 60 to 85 minutes a model, RL
takes 6 (SoS+) to 30 minutes (APR), and evaluation 40. README shows the results, and how the models
in `experiments/mini/` were trained.

The demonstrations are not the published ones. APR's parent lists every first step and spawns a
child for each, which tries what can follow: a search of everything, in threads of a hundred tokens.
The spawn probability is 1, so RL cannot learn to spawn more, which is most of what it learns in the
paper. With `--set task.solver.parent_beam_low=1` the parent beam is random, as published, and RL
can (docs/evaluation.md). SoS+ draws beams of 1 to 5 as published. But it always searches depth
first (`spawn_probability` decides that, too) and in a fixed order, and it leaves out steps to two
numbers with a result above 200.
"""

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment() -> Experiment:
    """Makes the experiment of scale mini."""
    window = 1_024
    children = 22  # No four numbers have more first steps.
    return Experiment(
        name="mini",
        seed=0,
        task=TaskConfig(
            "countdown",
            numbers=4,
            low=1,
            high=99,
            target_low=10,
            target_high=100,
            solver=SolverConfig(
                serial_beam=5,
                parent_beam=children,
                parent_beam_low=children,
                child_beam=children,
                max_children=children,
                spawn_probability=1.0,
                shuffle=False,
                max_intermediate=200,
                condition=0.25,
                window_bin=64,
            ),
        ),
        data=DataConfig(demonstrations=40_000, heldout=1_000),
        model=ModelConfig(layers=6, width=128, heads=4, kv_heads=1, head_size=32, mlp=352),
        # A thread's sequence holds its hidden spawn blocks too, some 14 tokens for each child.
        limits=Limits(
            window=window,
            max_thread_tokens=window + 256,
            max_threads=children + 1,
            children=children,
            max_depth=1,
        ),
        schedule=Schedule(
            slots=16, prefill_batch=1, prefill_chunk=16, context_buckets=(128, 256, 512)
        ),
        train=TrainConfig(
            sft=SftConfig(
                steps=6_000,
                batch_rows=4,
                save_every=500,
                log_every=20,
                validate_every=1_000,
                optimizer=OptimizerConfig(name="muon", lr=3e-3, warmup=100),
            ),
            rl=RlConfig(
                steps=20,
                problems=32,
                group=8,
                objective=ObjectiveConfig(advantage="leave_one_out", kl=0.0),
                micro_batch_rows=4,
                validate_every=10,
                validation=128,
                optimizer=OptimizerConfig(lr=1e-4, warmup=2, decay=0.1, weight_decay=0.0),
            ),
        ),
        evaluate=EvalConfig(
            batch=200,
            problems=160,
            validation=160,
            samples=10,
            temperatures=(0.1, 0.5, 1.0),
            children=(4, 8, 12, 16),
            bins=(1, 2, 3, 4, 6),
            # 12: what the model with a random parent beam spawns by itself. 18: few problems have
            # fewer first steps.
            forced=(12, 18),
            timed=10,
        ),
    )
