"""Scale mini: the paper's own problems (4 numbers below 100, target 10..100), for a laptop.

    apr reproduce --scale mini --out runs/mini

At most 5M parameters and at most 3 hours on 2 CPU cores. Not tuned and not run yet: there is no figure to expect.
"""

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.config import DataConfig
from apr_jax.learn.config import LearnConfig, OptimizerConfig, RlConfig, SftConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks.config import CountdownConfig, SolverConfig
from apr_jax.threads.limits import Limits, Schedule


def experiment() -> Experiment:
    """4.4M parameters, window 1,024."""
    window = 1_024
    children = 10
    return Experiment(
        name="mini",
        seed=0,
        task=CountdownConfig(numbers=4, low=1, high=99, target_low=10, target_high=100),
        solver=SolverConfig(shuffle=False, max_children=children, parent_beam=children, window_bin=128),
        data=DataConfig(demonstrations=100_000, heldout=1_000),
        model=ModelConfig(layers=6, width=256, heads=8, kv_heads=2, head_size=32, mlp=704),
        # A stream holds its hidden spawn blocks too; one takes some 16 tokens a child.
        limits=Limits(window=window, stream=window + 256, slots=2 * children + 1, children=children, max_depth=1),
        schedule=Schedule(lanes=16, admit=1, chunk=16, buckets=(128, 256, 512)),
        learn=LearnConfig(
            sft=SftConfig(steps=3_000, rows=16, optimizer=OptimizerConfig(name="muon", lr=2e-3, warmup=100)),
            rl=RlConfig(
                steps=50,
                problems=16,
                group=5,
                optimizer=OptimizerConfig(lr=1e-4, warmup=5, decay=1.0, weight_decay=0.0),
                rows=16,
            ),
        ),
        evaluate=EvalConfig(batch=200),
    )
