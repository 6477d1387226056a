"""A tiny experiment with the task of examples/anagrams.py, and thread trees of it."""

from pathlib import Path

from apr_jax.config import EvalConfig, Experiment, MeshConfig
from apr_jax.data.config import DataConfig
from apr_jax.data.tree_files import Demonstration
from apr_jax.model.config import ModelConfig
from apr_jax.tasks import Task, TaskConfig, load_problems, make_task
from apr_jax.threads.limits import Limits, Schedule
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RlConfig, SftConfig, TrainConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "anagrams.py"
TASK = TaskConfig(f"{EXAMPLE}:Anagrams", letters=3)


def experiment(demonstrations: int | str, **data) -> Experiment:
    optimizer = OptimizerConfig(lr=1e-3, warmup=1)
    return Experiment(
        name="anagrams",
        seed=0,
        task=TASK,
        data=DataConfig(demonstrations=demonstrations, **({"heldout": 3} | data)),
        model=ModelConfig(layers=1, width=16, heads=2, kv_heads=1, head_size=8, mlp=16),
        limits=Limits(
            window=64, max_thread_tokens=80, max_threads=5, children=4, max_depth=1, max_tokens=90
        ),
        schedule=Schedule(slots=4, prefill_batch=2, prefill_chunk=8),
        train=TrainConfig(
            sft=SftConfig(
                steps=2, batch_rows=4, optimizer=optimizer, validate_every=2, validation=2
            ),
            rl=RlConfig(
                steps=1,
                problems=2,
                group=2,
                micro_batch_rows=4,
                objective=ObjectiveConfig(),
                optimizer=optimizer,
                validation=2,
            ),
        ),
        evaluate=EvalConfig(batch=4, problems=2),
        mesh=MeshConfig(data=1),
    )


def own_demonstrations(config: Experiment, data_dir: Path, method: str) -> list[Demonstration]:
    """The demonstrations that a build of the task's own method has made, as text."""
    task = make_task(config.task, config.limits)
    problems = load_problems(data_dir / "train.jsonl", task)
    return [
        Demonstration(problem, task.demonstrate(problem, method, (config.data.seed << 32) + k))
        for k, problem in enumerate(problems)
    ]


def some_demonstrations(task: Task, count: int) -> list[Demonstration]:
    """Demonstrations of random problems by all methods in turn."""
    problems = map(task.draw, range(count))
    names = list(task.methods)
    return [
        Demonstration(problem, task.demonstrate(problem, names[k % len(names)], k))
        for k, problem in enumerate(problems)
    ]
