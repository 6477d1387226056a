"""Measures the parts of a step of reinforcement learning, each alone, on a model's own trees.

The parts are rollout, work of the host, rescoring, and update. In a training the next rollout is
queued behind the update, and the metrics show how a step's time is shared
(`train/metrics/step_times.py`). Rescoring and gradient are one program there. Here the rescoring
(the log-probs of all sampled tokens) is also measured by itself.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from apr_jax.bench.paired import Contestant
from apr_jax.config import override
from apr_jax.data.packing import Rows, pack_forest
from apr_jax.tasks import Problem, load_problems, make_task
from apr_jax.threads import ThreadForest, Work
from apr_jax.train.checkpoint.restored import Restored
from apr_jax.train.distributed import fetch_held
from apr_jax.train.grader import first_trees, grading
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.rl.objective import token_weights
from apr_jax.train.rl.rewards import counted_trees, tree_rewards
from apr_jax.train.session import build_mesh
from apr_jax.train.state import init_state
from apr_jax.train.step import (
    make_rescore,
    make_rl_step,
    most_chunks,
    place_everywhere,
    place_forest,
    place_whole,
)


@contextmanager
def contest(restored: Restored, problems: Path) -> Iterator[list[Contestant]]:
    """Makes the contestants: the parts of a step; rollout and update also with half the trees.

    Args:
      restored: the model; its config decides the step.
      problems: a file of problems. The first `train.rl.problems` get `train.rl.group` trees each.
    """
    config = restored.config
    known = load_problems(problems, make_task(config.task))
    half = override(config, [f"train.rl.problems={math.ceil(config.train.rl.problems / 2)}"])
    with ExitStack() as stack:
        parts = _parts(restored, known, stack)
        rollout, *_, update = _parts(dataclasses.replace(restored, config=half), known, stack)
        halves = [
            dataclasses.replace(part, name=f"{part.name}, half the trees")
            for part in (rollout, update)
        ]
        yield [*parts, *halves]


def _parts(restored: Restored, problems: list[Problem], stack: ExitStack) -> list[Contestant]:
    """Makes the contestants of one step: rollout, work of the host, rescoring, and update.

    Args:
      restored: the model; its config decides the step.
      problems: the problems; those that the step does not need are left out.
      stack: closes the grader at its end.
    """
    config = restored.config
    rl = config.train.rl
    mesh = build_mesh(config)
    of_trees = [problem for problem in problems[: rl.problems] for _ in range(rl.group)]
    grader = stack.enter_context(grading(config, restored.tokenizer, of_trees[:1], mesh))
    params = place_whole(restored.params, mesh)
    trees = float(len(of_trees))
    optimizer = make_optimizer(rl.optimizer, 1_000)
    step = make_rl_step(config, optimizer, mesh)
    rescore = make_rescore(config, mesh)
    state: Any = init_state(restored.params, optimizer, mesh)

    def roll() -> tuple[ThreadForest, Work]:
        return grader.ask(params, of_trees, rl.temperature, jax.random.key(0))

    def rollout() -> float:
        jax.block_until_ready(roll())
        return trees

    # One forest, on which host, rescoring and update are measured.
    forest, _ = first_trees(fetch_held(roll()), len(of_trees))
    counted = counted_trees(forest, rl.reward)

    def pack() -> tuple[Rows, np.ndarray]:
        rows = pack_forest(forest, rl.micro_batch_rows, config.limits.max_thread_tokens)
        return rows, token_weights(rows, counted, rl.objective.loss_aggregation)

    def host() -> float:
        grades = grader.verify(of_trees, forest)
        tree_rewards(grades.rewards, grades.correct, forest, 0.0, rl.reward)
        pack()
        return trees

    batch = place_forest(
        *pack(),
        rl.micro_batch_rows,
        mesh,
        most_chunks(config, mesh),
        recompute=rl.objective.importance_cap > 0,
    )
    scored = batch
    if rl.objective.kl_in_loss:
        scored = dataclasses.replace(batch, reference=rescore(params, batch))
    # Every second tree is reinforced. With advantages of 0 some of the work would be left out.
    signs = np.where(np.arange(len(of_trees)) % 2, 1.0, -1.0).astype(np.float32)  # [B]
    advantages = place_everywhere(signs, mesh)

    def rescore_alone() -> float:
        jax.block_until_ready(rescore(params, batch))
        return trees

    def update() -> float:
        nonlocal state
        state, *_ = step(state, scored, advantages)
        jax.block_until_ready(state)
        return trees

    return [
        Contestant("rollout", rollout, "trees"),
        Contestant("host: verify, reward, pack", host, "trees"),
        Contestant("rescoring alone", rescore_alone, "trees"),
        Contestant("update: rescoring and gradient", update, "trees"),
    ]
