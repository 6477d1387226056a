"""Tasks: problems, their text, demonstrations and a score. Plain Python, no JAX, no tokens.

    task = make_task(TaskConfig("countdown", numbers=4), config.limits)
    split = task.split(train=30_000, heldout=1_000, seed=0)
    thread = task.demonstrate(split.train[0], "apr", seed=7)   # a tree of Thread, text and Spawn
    score = task.score(split.test[0], "22+26=48,48-2=46")      # never raises

A task of your own is a subclass of `Task` (base.py). Tasks are made by `make_task` and nowhere else
(registry.py). `SandboxedVerifier` scores the answers of models in a process of its own
(sandbox.py). Countdown (countdown/) is the paper's puzzle; Arithmetic (arithmetic/) works out
expressions; PathStar (path_star/) finds the right arm of a graph; Sudoku (sudoku/) fills boards;
`HiddenDigit` (toy.py) is the smallest task there is.
"""

from apr_jax.tasks.base import (
    Bounds,
    Condition,
    Diagnosis,
    Fault,
    Method,
    Problem,
    Score,
    Spawn,
    Split,
    Task,
    Thread,
    flatten,
)
from apr_jax.tasks.problem_files import load_problems, save_problems
from apr_jax.tasks.registry import TaskConfig, make_task
from apr_jax.tasks.sandbox import Failure, SandboxedVerifier

__all__ = [
    "Bounds",
    "Condition",
    "Diagnosis",
    "Failure",
    "Fault",
    "Method",
    "Problem",
    "SandboxedVerifier",
    "Score",
    "Spawn",
    "Split",
    "Task",
    "TaskConfig",
    "Thread",
    "flatten",
    "load_problems",
    "make_task",
    "save_problems",
]
