"""RL whose steps do not wait for their longest trees: which trees a step learns from, what it says
of them, and how such a run is resumed.
"""

import re
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.whole_runs import Interrupt, changed, logged, repeatable

from apr_jax.errors import UsageError
from apr_jax.train import grader
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RewardConfig
from apr_jax.train.rl import trainer
from apr_jax.train.rl.trainer import train_rl

STEPS = 5
STALENESS = 2


@pytest.fixture(scope="module")
def carrying(config):
    """Four groups a step, two for each shard; every step changes the policy a lot."""
    rl = {
        "steps": STEPS,
        "problems": 4,
        "max_staleness": STALENESS,
        "ppo_epochs": 1,
        "optimizer": OptimizerConfig(lr=3e-2, warmup=0),
        "objective": ObjectiveConfig(advantage="none", kl=0.0),
        "reward": RewardConfig(token_price=0.01),  # So every tree teaches something.
        "validate_every": 0,
    }
    return changed(config, rl=rl)


@pytest.fixture(scope="module")
def run(carrying, data_dir, checkpoint, tmp_path_factory):
    """A whole run: its folder, its last state, and each step's rollout and update."""
    rollouts = []
    batches = []
    roll_out = trainer._Trainer._roll_out
    place_forest = trainer.place_forest

    def hear_rollout(*arguments):
        rollouts.append(roll_out(*arguments))
        return rollouts[-1]

    def hear_batch(*arguments, **options):
        batches.append(place_forest(*arguments, **options))
        return batches[-1]

    workdir = tmp_path_factory.mktemp("carrying")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Trainer, "_roll_out", hear_rollout)
        patch.setattr(trainer, "place_forest", hear_batch)
        state = train_rl(carrying, data_dir, workdir, checkpoint, progress=False)
    batches = jax.device_get(batches)
    return SimpleNamespace(workdir=workdir, state=state, rollouts=rollouts, batches=batches)


def _documented():
    """Names that docs/metrics.md says are logged with carry-over alone."""
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    return set(re.findall(r"^\| `(\w+)` \| rl, carry-over \|", page, re.M))


def test_each_tree_is_graded_on_its_own_problem(run, config, checkpoint):
    """Its root begins with the prompt of the problem that its step drew for it."""
    task = grader.make_task(config.task)
    tokenizer = trainer.load_checkpoint(checkpoint).tokenizer
    for rollout in run.rollouts:
        forest = rollout.forest
        for tree, problem in enumerate(rollout.problems):
            prompt = int(forest.sampled[tree, 0].argmax())
            words = tokenizer.decode(forest.tokens[tree, 0, 1:prompt].tolist())
            assert words == tokenizer.decode(tokenizer.encode(task.prompt(problem)))
        keys = [problem.id for problem in rollout.problems]
        assert keys[::2] == keys[1::2], "a group is of one problem"
    assert len({problem.id for problem in run.rollouts[0].problems}) == 4


def test_staleness_is_logged_and_bounded(run):
    lines = logged(run.workdir)
    assert max(line["staleness_worst"] for line in lines) == STALENESS
    assert lines[0]["staleness"] == lines[0]["older_tokens"] == lines[0]["carried_trees"] == 0
    for line, rollout in zip(lines, run.rollouts, strict=True):
        ages = rollout.staleness[rollout.forest.sampled]
        assert ages.min() >= 0
        assert line["staleness"] == pytest.approx(ages.mean())
        assert line["staleness_worst"] == ages.max()
        assert line["older_tokens"] == pytest.approx((ages > 0).mean())
        assert line["carried_trees"] >= (rollout.staleness.max(axis=(1, 2)) > 0).sum()
    assert any(0 < line["older_tokens"] < 1 for line in lines)
    assert {"staleness", "staleness_worst", "older_tokens", "carried_trees"} == _documented()


def test_only_older_tokens_have_ratios_away_from_one(run):
    """The rollout's log-probs are those of training where one policy drew and learns."""
    lines = logged(run.workdir)
    assert max(line.get("logprob_difference_worst", 0) for line in lines) < 1e-3
    assert max(line.get("outside_clip_share", 0) for line in lines) == 0
    assert max(line["clip_share"] for line in lines) > 0


def test_update_knows_which_tokens_are_older(run):
    for rollout, batch in zip(run.rollouts, run.batches, strict=True):
        rows = batch.chunks
        older = batch.older & rows.sampled
        by_tree = np.bincount(rows.tree[older], minlength=len(rollout.problems))
        expected = np.sum(rollout.staleness > 0, axis=(1, 2))
        taught = np.bincount(rows.tree[rows.sampled], minlength=len(by_tree)) > 0
        np.testing.assert_array_equal(by_tree, np.where(taught, expected, 0))
        logprobs = [
            rollout.forest.logprob[(rollout.staleness > 0) & taught[:, None, None]],
            rows.logprob[older],
        ]
        np.testing.assert_array_equal(*map(np.sort, logprobs))


@pytest.mark.parametrize(
    ("module", "maker", "call"),
    [
        (trainer, "make_rl_step", 3),
        pytest.param(grader, "make_policy_carry_over", 3, marks=pytest.mark.thorough),
    ],
    ids=["in an update", "in a rollout"],
)
def test_stopped_and_resumed_is_the_unbroken_run(
    run, carrying, data_dir, checkpoint, tmp_path, monkeypatch, module, maker, call
):
    with monkeypatch.context() as patch:
        patch.setattr(module, maker, Interrupt(getattr(module, maker), call, signal.SIGTERM))
        with pytest.raises(SystemExit):
            train_rl(carrying, data_dir, tmp_path, checkpoint, progress=False)
    assert 0 < len(logged(tmp_path)) < STEPS
    state = train_rl(carrying, data_dir, tmp_path, checkpoint, progress=False)
    jax.tree.map(np.testing.assert_array_equal, state, run.state)
    assert repeatable(tmp_path) == repeatable(run.workdir)


def test_without_carry_over_no_tree_is_kept(config, data_dir, checkpoint, tmp_path):
    settings = changed(config, rl={"steps": 1, "ppo_epochs": 1, "validate_every": 0})
    state = train_rl(settings, data_dir, tmp_path, checkpoint, progress=False)
    assert state.carried is None
    (line,) = logged(tmp_path)
    assert not line.keys() & {"staleness", "staleness_worst", "older_tokens", "carried_trees"}


def test_groups_must_divide_over_the_shards(carrying, data_dir, checkpoint, tmp_path):
    settings = changed(carrying, rl={"problems": 3})
    with pytest.raises(
        UsageError, match=r"train.rl.problems=3: must be a multiple of the 2 shards"
    ):
        train_rl(settings, data_dir, tmp_path, checkpoint, progress=False)
