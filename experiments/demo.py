"""Scale demo: serial search and thread trees from nothing, and what RL teaches, in minutes.

It runs on 2 CPU cores. Its models are deliberately early: they have seen few demonstrations, and
roots of thread trees have seen all numbers of children alike, so they often spawn too few. RL over
whole trees teaches them to spawn more, which solves more. Serial search gets the same window, the
same steps on as many tokens, and RL on as many trees.

    apr reproduce --scale demo --out runs/demo
"""

from apr_jax.config import EvalConfig, Experiment
from apr_jax.data.config import DataConfig
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import TaskConfig
from apr_jax.tasks.countdown.config import SolverConfig
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig


def experiment() -> Experiment:
    """Makes the experiment of scale demo."""
    window = 176
    return Experiment(
        name="demo",
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
                window_bin=32,
            ),
        ),
        data=DataConfig(demonstrations=10_000, heldout=250),
        model=ModelConfig(layers=3, width=96, heads=3, kv_heads=1, head_size=32, mlp=256),
        limits=Limits(
            window=window, max_thread_tokens=window + 64, max_threads=13, children=12, max_depth=1
        ),
        schedule=Schedule(slots=32, prefill_batch=1, prefill_chunk=16, context_buckets=(88,)),
        train=TrainConfig(
            sft=SftConfig(
                steps=2800,
                batch_rows=4,
                save_every=2800,
                log_every=50,
                optimizer=OptimizerConfig(name="muon", lr=4e-3),
            ),
            rl=RlConfig(
                steps=48,
                problems=16,
                group=8,
                objective=ObjectiveConfig(advantage="leave_one_out", kl=0.0),
                micro_batch_rows=8,
                # Greedy answers do not show what is learned here, so they choose no step.
                validate_every=0,
                save_every=48,
                optimizer=OptimizerConfig(lr=3e-4, warmup=2, decay=0.1, weight_decay=0.0),
            ),
        ),
        # Sampled answers, as in RL: the widest beam that it knows is likelier at each message than
        # the end, so greedily even an early model spawns nearly all that it has learned.
        evaluate=EvalConfig(
            compared=False, headline=1.0, batch=250, problems=250, samples=1, temperatures=()
        ),
    )
