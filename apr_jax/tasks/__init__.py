"""Tasks: problems, their text, symbolic demonstrations and a verifier. Plain Python, no JAX, no
tokens.

    task = Countdown(config.task, config.solver)
    split = split_problems(config.task, train=30_000, heldout=1_000)
    thread = task.demonstration(split.train[0], "apr", seed=7)   # a tree of Thread, text and Spawn
    verdict = task.verify(split.test[0], "22+26=48,48-2=46")     # never raises

`Task` (base.py) is what a new task fills in. Countdown is the first; `HiddenDigit` is a toy, the
smallest there is."""

from apr_jax.tasks.base import Fault, Problem, Reading, Spawn, Task, Thread, Verdict, flatten
from apr_jax.tasks.countdown.config import CountdownConfig, SolverConfig
from apr_jax.tasks.countdown.problem_files import (
    load_problems,
    parse_problem,
    require_solvable,
    save_problems,
)
from apr_jax.tasks.countdown.problems import (
    Split,
    draw,
    problem_key,
    reachable,
    solve,
    split_problems,
)
from apr_jax.tasks.countdown.solvers import METHODS, PARALLEL
from apr_jax.tasks.countdown.task import Countdown
from apr_jax.tasks.sandbox import Failure, SandboxedVerifier
from apr_jax.tasks.toy import HiddenDigit

__all__ = [
    "METHODS",
    "PARALLEL",
    "Countdown",
    "CountdownConfig",
    "Failure",
    "Fault",
    "HiddenDigit",
    "Problem",
    "Reading",
    "SandboxedVerifier",
    "SolverConfig",
    "Spawn",
    "Split",
    "Task",
    "Thread",
    "Verdict",
    "draw",
    "flatten",
    "load_problems",
    "parse_problem",
    "problem_key",
    "reachable",
    "require_solvable",
    "save_problems",
    "solve",
    "split_problems",
]
