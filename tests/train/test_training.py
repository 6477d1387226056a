"""Whole tiny runs: resume = unbroken, bit for bit, in both stages; signals; bad steps; RL after
supervision.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.puzzles import read_problems
from helpers.whole_runs import (
    SHARES,
    WALL_CLOCK,
    Interrupt,
    changed,
    compilations,
    logged,
    repeatable,
    shown,
    train_command,
    write_config,
)

from apr_jax.config import MeshConfig
from apr_jax.data.packing import Rows
from apr_jax.data.pipeline import LocalRows
from apr_jax.errors import UsageError, UserError
from apr_jax.tasks.countdown.puzzle import Puzzle
from apr_jax.train import grader, sft
from apr_jax.train.checkpoint import FOLDER, load_checkpoint
from apr_jax.train.config import RewardConfig
from apr_jax.train.metrics.recorder import FILE, Recorder
from apr_jax.train.rl import trainer
from apr_jax.train.rl.objective import cross_entropy
from apr_jax.train.rl.rescoring import token_logprobs
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.sft import train_sft

_ROOT = Path(__file__).parents[2]
_METRICS = _ROOT / "docs" / "metrics.md"


def _documented(stage):
    """Names of the tables of docs/metrics.md that a stage logs."""
    rows = re.findall(
        r"^\| `(\w+)` \| (sft|rl|both) \|.*\|.*\|.*\| `([\w/.]+)` \|$", _METRICS.read_text(), re.M
    )
    assert len({name for name, *_ in rows}) == len(rows) > 30, "each name is defined once"
    for name, _, file in rows:
        assert (_ROOT / "apr_jax" / file).is_file(), name
    return {name for name, of, _ in rows if of in (stage, "both")}


def _shown(workdir):
    """The same of two equal runs."""
    return {key: value for key, value in shown(workdir).items() if key[0] not in WALL_CLOCK}


def _equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture(scope="module")
def unbroken(config, data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return workdir, train_sft(config, data_dir, workdir, "apr", progress=False)


def test_sft_learns_and_saves(unbroken, config):
    workdir, state = unbroken
    lines = repeatable(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    restored = load_checkpoint(workdir)
    assert (restored.step, restored.method, restored.stage) == (6, "apr", "sft")
    _equal(restored.params, state.params)
    assert restored.config == config


@pytest.mark.parametrize(
    ("number", "error", "at"),
    [
        (signal.SIGINT, KeyboardInterrupt, 3),
        pytest.param(signal.SIGTERM, SystemExit, 5, marks=pytest.mark.thorough),
    ],
)
def test_sft_stopped_and_resumed_is_the_unbroken_run(
    unbroken, config, data_dir, tmp_path, monkeypatch, number, error, at
):
    with monkeypatch.context() as patch, compilations() as compiled:
        patch.setattr(sft, "make_sft_step", Interrupt(sft.make_sft_step, at, number))
        with pytest.raises(error) as caught:
            train_sft(config, data_dir, tmp_path, "apr", progress=False)
    assert compiled.count("jit(step)") == 1, "for the first state, and for what comes out of a step"
    if error is SystemExit:
        assert caught.value.code == 143
    assert load_checkpoint(tmp_path).step == at, "the step under way is finished and saved"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with compilations() as compiled:
        state = train_sft(config, data_dir, tmp_path, "apr", progress=False)
    assert compiled.count("jit(step)") == 1, "for what a checkpoint gives, too"
    _equal(state, unbroken[1])
    assert repeatable(tmp_path) == repeatable(unbroken[0])


@pytest.fixture(scope="module")
def validated(config, data_dir, tmp_path_factory):
    """`unbroken`, with greedy answers to the validation problems after the fourth step and at the
    end.
    """
    workdir = tmp_path_factory.mktemp("validated")
    return workdir, train_sft(
        changed(config, sft={"validate_every": 4}), data_dir, workdir, "apr", progress=False
    )


@pytest.mark.thorough
def test_a_validation_changes_nothing_in_supervised_training(validated, unbroken):
    _equal(validated[1], unbroken[1])
    lines = repeatable(validated[0])
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [4, 6]
    plain = [
        {name: line[name] for name in line if not name.startswith("validation_")} for line in lines
    ]
    assert plain == repeatable(unbroken[0])
    assert 0 < lines[-1]["validation_total_tokens"] <= 200
    assert _scores(validated[0], 6)["validation_accuracy"] == lines[-1]["validation_accuracy"]


@pytest.mark.thorough
def test_next_start_does_a_due_supervised_validation(
    validated, config, data_dir, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_sft_step", Interrupt(sft.make_sft_step, 4, signal.SIGTERM))
        with pytest.raises(SystemExit):
            train_sft(
                changed(config, sft={"validate_every": 4}),
                data_dir,
                tmp_path,
                "apr",
                progress=False,
            )
    assert "validation_accuracy" not in logged(tmp_path)[-1]
    train_sft(changed(config, sft={"validate_every": 4}), data_dir, tmp_path, "apr", progress=False)
    assert repeatable(tmp_path) == repeatable(validated[0])
    assert _scores(tmp_path, 4) == _scores(validated[0], 4) != {}
    assert _shown(tmp_path) == _shown(validated[0])


def test_a_finished_run_trains_no_more(unbroken, config, data_dir):
    workdir, state = unbroken
    before = repeatable(workdir)
    _equal(train_sft(config, data_dir, workdir, "apr", progress=False), state)
    assert repeatable(workdir) == before


def test_another_config_in_the_same_workdir_is_refused(unbroken, config, data_dir):
    other = _bad_steps(config, 7)
    with pytest.raises(UserError, match=r"train.max_consecutive_skipped=3 \(now 7\)"):
        train_sft(other, data_dir, unbroken[0], "apr", progress=False)
    assert (
        json.loads((unbroken[0] / "config.json").read_text())["train"]["max_consecutive_skipped"]
        == 3
    )


class _Spoiled:
    """Batches of which those from the second on make the loss NaN: a token id that no embedding
    has.
    """

    def __init__(self, *args):
        self._batches = LocalRows(*args)
        self._taken = 0

    def __next__(self):
        rows = next(self._batches)
        self._taken = self._taken + 1
        return (
            rows
            if self._taken == 1
            else dataclasses.replace(rows, tokens=np.full_like(rows.tokens, 10_000))
        )

    def __getattr__(self, name):
        return getattr(self._batches, name)


def _bad_steps(config, count):
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, max_consecutive_skipped=count)
    )


@pytest.mark.thorough
def test_too_many_bad_steps_end_the_run(config, data_dir, tmp_path, monkeypatch):
    """The last good parameters are saved, and the bad batch beside them."""
    monkeypatch.setattr(sft, "LocalRows", _Spoiled)
    with pytest.raises(
        UserError,
        match=(
            r"3 updates in a row had a NaN or Inf .* the last of them in step"
            r" 4;.*train\.sft\.optimizer\.lr"
        ),
    ) as caught:
        train_sft(config, data_dir, tmp_path, "apr", progress=False)
    # The bad batches came after step 1: nothing of them got into the parameters.
    assert [line["loss"] is None for line in repeatable(tmp_path)] == [False, True, True, True]
    assert [line["skipped"] for line in repeatable(tmp_path)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="1 updates in a row"):
        train_sft(_bad_steps(config, 1), data_dir, tmp_path / "once", "apr", progress=False)
    _equal(load_checkpoint(tmp_path).params, load_checkpoint(tmp_path / "once").params)
    assert str(tmp_path / "bad_batch" / "4.npz") in str(caught.value)
    batch = np.load(tmp_path / "bad_batch" / "4.npz")
    assert set(batch) == {field.name for field in dataclasses.fields(Rows)}
    assert (batch["tokens"] == 10_000).all()
    # Batch and parameters reproduce the fault.
    restored = load_checkpoint(tmp_path)
    params = jax.tree.map(jnp.asarray, restored.params)
    logprobs, _ = token_logprobs(params, restored.config.model, Rows(**batch))
    assert not np.isfinite(cross_entropy(logprobs, Rows(**batch)))


def test_run_ended_by_bad_steps_leaves_no_gap(config, data_dir, tmp_path, monkeypatch):
    """It goes on from where it ended."""
    config = _bad_steps(config, 2)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "LocalRows", _Spoiled)
        with pytest.raises(
            UserError,
            match=(
                r"2 updates in a row had a NaN or Inf .* the last of them in step 3;.* as step 4,"
            ),
        ):
            train_sft(config, data_dir, tmp_path, "apr", progress=False)
    assert [line["step"] for line in repeatable(tmp_path)] == [
        1,
        2,
        3,
        4,
    ], "4 was under way when 3 was found to be bad"
    assert load_checkpoint(tmp_path).step == 4
    assert np.load(tmp_path / "bad_batch" / "3.npz")["tokens"].max() == 10_000
    train_sft(config, data_dir, tmp_path, "apr", progress=False)
    lines = repeatable(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] is None for line in lines] == [False, True, True, True, False, False]
    assert (lines[-1]["skipped"], lines[-1]["bad_in_a_row"]) == (3, 0)


def _scores(workdir, step):
    """What the checkpoint of a step is ranked by."""
    return json.loads((workdir / FOLDER / str(step) / "meta" / "metadata").read_text())["metrics"]


@pytest.fixture(scope="module")
def unbroken_rl(unbroken, config, data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rl")
    return workdir, train_rl(config, data_dir, workdir, unbroken[0], progress=False)


def test_rl_validates_and_saves_the_first_policy(unbroken_rl):
    """The metrics of its steps are right, too."""
    workdir, state = unbroken_rl
    lines = repeatable(workdir)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line["step"] for line in lines if "validation_accuracy" in line] == [0, 2, 3]
    for line in lines[1:]:
        assert line["trees"] == 4
        assert line["skipped"] == 0
        assert 0 < line["total_tokens"] <= 200
        assert line["sequential_tokens"] <= line["total_tokens"]
        # The training pass gives the log-probs that the rollout recorded, on real trees of the real
        # engine.
        assert line["logprob_difference_worst"] < 1e-4
        assert line["entropy"] > 0.1
    assert int(state.step) == 3
    restored = load_checkpoint(workdir)
    assert (restored.stage, restored.method) == ("rl", "apr")


@pytest.mark.thorough
def test_rl_that_is_preempted_in_each_batch_of_a_validation_ends(
    unbroken, config, data_dir, tmp_path, monkeypatch
):
    """Each start answers one batch more. Once, each began anew and the run never ended.

    Scores and lines are those of a run that was left alone.
    """
    small = changed(config, rl={"steps": 2, "problems": 1, "group": 2, "validation": 8})
    train_rl(small, data_dir, tmp_path / "whole", unbroken[0], progress=False)

    asked = []

    def stop_in_a_validation(self, params, problems, temperature, key):
        if temperature == 0:
            asked.append(problems)
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(self, params, problems, temperature, key)

    ask = grader.Grader.ask
    monkeypatch.setattr(grader.Grader, "ask", stop_in_a_validation)
    broken = tmp_path / "broken"
    batches = 4
    for start in range(2 * batches):
        with pytest.raises(SystemExit):
            train_rl(small, data_dir, broken, unbroken[0], progress=False)
        assert len(asked) == start + 1
    train_rl(small, data_dir, broken, unbroken[0], progress=False)
    assert len(asked) == 2 * batches
    assert repeatable(broken) == repeatable(tmp_path / "whole")
    for step in (0, 2):
        assert _scores(broken, step) == _scores(tmp_path / "whole", step) != {}


@pytest.mark.thorough
def test_trees_are_padded_to_shards_with_uncounted_copies(
    unbroken, unbroken_rl, config, data_dir, tmp_path
):
    """4 trees on 8 shards, in rollouts of 8: what comes of them is what comes of them on 2
    shards.
    """
    learn = dataclasses.replace(
        config.train, rl=dataclasses.replace(config.train.rl, steps=2, micro_batch_rows=8)
    )
    wide = dataclasses.replace(config, train=learn, mesh=MeshConfig(data=8))
    train_rl(wide, data_dir, tmp_path, unbroken[0], progress=False)
    for got, expected in zip(logged(tmp_path)[:2], logged(unbroken_rl[0]), strict=False):
        for name in (
            "accuracy",
            "reward",
            "total_tokens",
            "children",
            "trees",
            "validation_accuracy",
        ):
            assert got.get(name) == pytest.approx(expected.get(name)), name


def test_every_logged_name_is_documented_and_no_other(validated, unbroken_rl):
    for (workdir, _), stage in ((validated, "sft"), (unbroken_rl, "rl")):
        lines = logged(workdir)
        assert {line["stage"] for line in lines} == {stage}
        assert set().union(*lines) == _documented(stage)


def test_tensorboard_shows_all_metrics_and_validation_trees(validated, unbroken_rl, data_dir):
    problem = read_problems(data_dir / "validation.jsonl")[0]
    asked = f"{' '.join(map(str, Puzzle.of(problem).numbers))} -> {Puzzle.of(problem).target}: "
    for (workdir, _), validations in ((validated, [4, 6]), (unbroken_rl, [0, 2, 3])):
        found = shown(workdir)
        lines = logged(workdir)
        numbers = {
            (name, line["step"]): value
            for line in lines
            for name, value in line.items()
            if name not in ("step", "stage")
        }
        texts = {
            step: found.pop(("validation_tree/text_summary", step)).split() for step in validations
        }
        assert found == pytest.approx(numbers, rel=1e-6)  # TensorBoard's are float32.
        for words in texts.values():
            assert (
                " ".join(words).startswith((asked + "right ", asked + "wrong ")) and "root" in words
            ), words


def test_rl_step_shares_add_up_to_one(unbroken_rl):
    """The seconds of a step are those of its throughput."""
    lines = logged(unbroken_rl[0])[1:]
    for line in lines:
        assert sum(line[name] for name in SHARES) == pytest.approx(1.0)
        assert all(0 < line[name] < 1 for name in SHARES)
    # Record to record, another clock: recording is outside the parts, and tiny steps are short.
    elapsed = sum(line["trees"] / line["trees_per_second"] for line in lines)
    assert 0.5 * elapsed < sum(line["step_seconds"] for line in lines) <= 1.05 * elapsed


@pytest.mark.thorough
def test_next_rollout_is_queued_before_update_is_awaited(
    unbroken, config, data_dir, tmp_path, monkeypatch
):
    """Else the device idles between steps: metrics, which wait for the update, are read a step
    late.
    """
    done = []

    def noting(what, call):
        def noted(*arguments):
            done.append(what)
            return call(*arguments)

        return noted

    def making(what, make):
        return lambda *arguments: noting(what, make(*arguments))

    monkeypatch.setattr(
        grader, "make_policy_rollout", making("rollout", grader.make_policy_rollout)
    )
    monkeypatch.setattr(trainer, "make_rl_step", making("update", trainer.make_rl_step))
    fetch = Recorder._fetch

    def reading(recorder):
        done.append(recorder._pending and f"read {recorder._pending[0]}")
        return fetch(recorder)

    monkeypatch.setattr(Recorder, "_fetch", reading)
    settings = {"validate_every": 3, "save_every": 3, "ppo_epochs": 1}
    train_rl(changed(config, rl=settings), data_dir, tmp_path, unbroken[0], progress=False)
    first = done.index("update")
    # The first policy was read when it was saved; the last step is not, since it is saved and
    # validated.
    assert done[first - 1 : first + 5] == ["rollout", "update", None, "rollout", "update", "read 1"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("module", "maker", "call", "stopped"),
    [(trainer, "make_rl_step", 3, 2), (grader, "make_policy_rollout", 3, 1)],
)
def test_rl_stopped_and_resumed_is_the_unbroken_run(
    unbroken, unbroken_rl, config, data_dir, tmp_path, monkeypatch, module, maker, call, stopped
):
    """In an update of step 2, which is then not validated, though that is due; and in its rollout,
    which is thrown away.

    Two PPO epochs a step; the first rollout is that of the first validation.
    """
    with monkeypatch.context() as patch:
        patch.setattr(module, maker, Interrupt(getattr(module, maker), call, signal.SIGTERM))
        with pytest.raises(SystemExit):
            train_rl(config, data_dir, tmp_path, unbroken[0], progress=False)
    assert sorted(int(e.name) for e in (tmp_path / FOLDER).iterdir())[-1] == stopped
    assert ["validation_accuracy" in line for line in logged(tmp_path)] == [True, False, False][
        : stopped + 1
    ]
    state = train_rl(config, data_dir, tmp_path, unbroken[0], progress=False)
    _equal(state, unbroken_rl[1])
    assert repeatable(tmp_path) == repeatable(unbroken_rl[0])
    assert _shown(tmp_path) == _shown(unbroken_rl[0])
    scores = [_scores(workdir, 2) for workdir in (tmp_path, unbroken_rl[0])]
    assert scores[0] == scores[1] != {}, "the checkpoint of step 2 can be the best one"


@pytest.mark.thorough
def test_bad_steps_of_rl_end_the_run(unbroken, config, data_dir, tmp_path, monkeypatch):
    """The bad batch is saved."""
    advantages = dict.fromkeys(
        trainer.ADVANTAGES, lambda rewards, counted: jnp.full_like(rewards, jnp.inf)
    )
    monkeypatch.setattr(trainer, "ADVANTAGES", advantages)
    with pytest.raises(
        UserError,
        match=(
            r"4 updates in a row had a NaN or Inf .* the last of them in step 2;.*rl\.optimizer\.lr"
        ),
    ):
        train_rl(config, data_dir, tmp_path, unbroken[0], progress=False)  # Two PPO epochs a step.
    _equal(load_checkpoint(tmp_path).params, load_checkpoint(unbroken[0]).params)
    assert [line["step"] for line in repeatable(tmp_path)] == [0, 1, 2]
    batch = np.load(tmp_path / "bad_batch" / "2.npz")
    assert set(batch) == {field.name for field in dataclasses.fields(Rows)} | {
        "weights",
        "advantages",
    }
    assert np.isinf(batch["advantages"]).all()
    assert (batch["logprob"] < 0).any()


@pytest.mark.thorough
def test_token_price_resumes_where_it_stood(unbroken, config, data_dir, tmp_path, monkeypatch):
    reward = RewardConfig(token_price=0.01, token_budget=40, price_step=0.0007)
    priced = changed(config, rl={"reward": reward})
    whole = train_rl(priced, data_dir, tmp_path / "whole", unbroken[0], progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_rl_step", Interrupt(trainer.make_rl_step, 3, signal.SIGTERM))
        with pytest.raises(SystemExit):
            train_rl(priced, data_dir, tmp_path / "broken", unbroken[0], progress=False)
    _equal(train_rl(priced, data_dir, tmp_path / "broken", unbroken[0], progress=False), whole)
    lines = repeatable(tmp_path / "whole")
    assert repeatable(tmp_path / "broken") == lines
    prices = [line["token_price"] for line in lines[1:]]
    tokens = [line["total_tokens"] for line in lines[1:]]
    assert prices[0] == 0.01
    for before, after, taken in zip(prices, prices[1:], tokens, strict=False):
        assert after == before + 0.0007 * (taken / 40 - 1) != before


def test_rl_refuses_another_model(unbroken, config, data_dir, tmp_path):
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp=24))
    with pytest.raises(UsageError, match=r"was trained with model.mlp=16, not 24"):
        train_rl(wider, data_dir, tmp_path, unbroken[0], progress=False)


def test_rl_may_keep_less_for_its_backward_pass_and_tell_others_more(
    unbroken, config, data_dir, tmp_path
):
    """The first is the advice for a lack of memory."""
    model = dataclasses.replace(config.model, remat="layer", max_positions=8192)
    learn = dataclasses.replace(config.train, rl=dataclasses.replace(config.train.rl, steps=1))
    less = dataclasses.replace(config, model=model, train=learn)
    state = train_rl(less, data_dir, tmp_path, unbroken[0], progress=False)
    assert int(state.step) == 1
    assert load_checkpoint(tmp_path).config.model == model


@pytest.mark.thorough
@pytest.mark.parametrize(
    "step", [3, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 5))]
)
def test_a_killed_process_goes_on_to_the_unbroken_result(
    unbroken, config, data_dir, tmp_path, step
):
    """SIGKILL as soon as the metrics tell of `step`, wherever the saving thread may be."""
    command = train_command("sft", write_config(config, tmp_path / "config.py"), data_dir, tmp_path)
    process = subprocess.Popen(command, cwd=_ROOT)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / FILE).exists() and f'"step": {step},' in (tmp_path / FILE).read_text():
            process.kill()
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=_ROOT, check=True, timeout=240)
    _equal(load_checkpoint(tmp_path).params, load_checkpoint(unbroken[0]).params)
    assert repeatable(tmp_path) == repeatable(unbroken[0])
