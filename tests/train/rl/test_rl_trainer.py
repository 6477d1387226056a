"""The trainer against the objective: what real steps of `train_rl` do with their trees, worked out
again by hand.

`test_enumeration` proves what the loss follows, given rows, weights and advantages. Here is the way
between a rollout and the next parameters: each step's forest is listened to, and what becomes of it
compared with plain numpy and a gradient that has neither rows, nor chunks, nor groups. Only a sign,
a grouping, a price, a KL and a packing that are all right get there.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from helpers.whole_runs import changed, compilations, logged
from jax.flatten_util import ravel_pytree

from apr_jax.config import MeshConfig
from apr_jax.data.packing import Rows
from apr_jax.tasks import Failure, SandboxedVerifier
from apr_jax.tasks.countdown.problems import solve
from apr_jax.train import grader
from apr_jax.train.checkpoint import load_checkpoint
from apr_jax.train.config import ObjectiveConfig, OptimizerConfig, RewardConfig
from apr_jax.train.rl import trainer
from apr_jax.train.rl.rescoring import token_logprobs
from apr_jax.train.rl.trainer import train_rl

PROBLEMS, GROUP = 3, 4  # Unequal, so that groups by the wrong axis are other groups.
RATE = 0.01
KL = 0.3
CLIP = 0.01
TEMPERATURE = 0.9
GRADIENT_CLIP = 0.2  # Only logged: plain gradient descent takes the optimizer's place.
TOKEN_PRICE = 0.01
SEQUENTIAL_PRICE = 0.004
BUDGET, PRICE_STEP = 20, 0.003  # Trees are longer, so the second step's price is another.


def _spawning(config, **options):
    """A barely trained model spawns as soon as it can't break the protocol.

    Its parameters are split over two devices.
    """
    options = {
        "problems": PROBLEMS,
        "group": GROUP,
        "temperature": TEMPERATURE,
        "validate_every": 99,
        **options,
    }
    limits = dataclasses.replace(config.limits, constrain=True)
    return changed(config, rl=options, limits=limits, mesh=MeshConfig(data=1, fsdp=2))


def _asked(forest, tree, tokenizer):
    """Numbers and target that a root was given."""
    given = int(forest.sampled[tree, 0].argmax())
    *numbers, target = map(
        int, re.findall(r"\d+", tokenizer.decode(forest.tokens[tree, 0, :given].tolist()))
    )
    return tuple(numbers), target


def _says_a_solution(forest):
    return forest.total_tokens % 2 == 1


def _is_unknown(forest):
    """Trees whose answer the verifier gives no verdict on; right and wrong ones among them."""
    return forest.total_tokens % 5 == 0


class Forgetful(SandboxedVerifier):
    """The real verifier, but for the verdicts that are lost."""

    lost = ()  # bool [B], set by `_answers`: the trees whose verdict is lost.

    def verify(self, pairs, most_unknown=None):
        outcomes = super().verify(pairs, most_unknown)
        return [
            Failure.TIMED_OUT if lost else one
            for one, lost in zip(outcomes, Forgetful.lost, strict=True)
        ]


def _answers(forest, tokenizer):
    """Answers in place of those of the trees: a model this small never hits a target.

    Trees that `_says_a_solution` picks give a right answer, the others none. The verifier is the
    real one.
    """
    validating = len(forest.total_tokens) != PROBLEMS * GROUP
    Forgetful.lost = _is_unknown(forest) & (not validating)
    return [
        ",".join(solve(*_asked(forest, tree, tokenizer))) if says else ""
        for tree, says in enumerate(_says_a_solution(forest))
    ]


@pytest.fixture(scope="module", params=[pytest.param("masked", marks=pytest.mark.thorough), "kl"])
def heard(request, config, data_dir, checkpoint, tmp_path_factory):
    """Two steps of two updates each, by plain gradient descent, and all that went into them.

    "masked": truncated trees are left out, no KL, a fixed price. "kl": all trees count but those of
    unknown worth, KL is part of the reward, and the price of a token follows a budget.
    """
    kl, overlong = {"masked": (0.0, "masked"), "kl": (KL, "scored")}[request.param]
    settings = _spawning(
        config,
        steps=2,
        optimizer=OptimizerConfig(clip=GRADIENT_CLIP),
        objective=ObjectiveConfig(
            advantage="leave_one_out", kl=kl, kl_estimator="reward", clip=CLIP
        ),
        reward=RewardConfig(
            token_price=TOKEN_PRICE,
            sequential_price=SEQUENTIAL_PRICE,
            token_budget=BUDGET if kl else 0,
            price_step=PRICE_STEP if kl else 0.0,
            overlong=overlong,
            max_unknown=0.9,
        ),
    )
    # With this seed, trees that change the gradient have children in both variants.
    settings = dataclasses.replace(settings, seed=4)
    forests = []
    updates = []
    first_trees = trainer.first_trees
    make_rl_step = trainer.make_rl_step

    def hear_forest(*arguments):
        forest, work = first_trees(*arguments)
        forests.append(forest)
        return forest, work

    def hear_updates(*arguments):
        step = make_rl_step(*arguments)

        def update(state, batch, advantages):
            before, given, heard_advantages = jax.device_get((state.params, batch, advantages))
            state, metrics, behaviour = step(state, batch, advantages)
            after, heard_metrics = jax.device_get((state.params, metrics))
            used = jax.tree.map(lambda x: x[: given.used], given.chunks)
            updates.append(
                SimpleNamespace(
                    forest=forests[-1],
                    rows=used,
                    advantages=heard_advantages,
                    before=before,
                    after=after,
                    metrics=heard_metrics,
                )
            )
            return state, metrics, behaviour

        return update

    workdir = tmp_path_factory.mktemp("heard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "first_trees", hear_forest)
        patch.setattr(trainer, "make_rl_step", hear_updates)
        patch.setattr(trainer, "make_optimizer", lambda *_: _descent(forests))
        patch.setattr(grader, "extract_answers", _answers)
        if kl:
            patch.setattr(grader, "SandboxedVerifier", Forgetful)
        train_rl(settings, data_dir, workdir, checkpoint, progress=False)
    first, _, third, _ = updates
    return SimpleNamespace(
        config=settings,
        kl=kl,
        start=load_checkpoint(checkpoint),
        updates=updates,
        firsts=[first, third],
        lines=logged(workdir)[1:],
    )


def _descent(forests):
    """Plain gradient descent at the rate RATE x c, where c is the mean tokens of a first-step tree.

    Losses are divided by c, so a step moves by RATE times the undivided gradient. The update is
    traced once, when `forests` holds the first forest alone: a divisor of another step would show.
    """

    def update(gradient, state, params=None):
        del params
        rate = RATE * forests[0].total_tokens.mean()
        return jax.tree.map(lambda x: -rate * x, gradient), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _one_thread_a_row(forest):
    """Nothing is packed: a row for every thread index, used or not."""
    trees, max_threads, length = forest.tokens.shape
    tree = np.indices((trees, max_threads, length))[0]
    inside = np.arange(length) < forest.length[..., None]
    names = ("tokens", "position", "hidden_block", "sampled", "logprob", "allowed")
    fields = {name: getattr(forest, name) for name in names} | {
        "tree": tree,
        "segment": inside.astype(np.int32),
    }
    return Rows(**{name: values.reshape(-1, length) for name, values in fields.items()})


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(model, params, rows):
    return token_logprobs(params, model, rows, TEMPERATURE)[0]


@functools.partial(jax.jit, static_argnums=0)
def _gradient(model, params, rows, advantages):
    """Gradient of the sum over trees of A x the log-prob of all tokens sampled in the tree."""
    return jax.grad(
        lambda params: (
            advantages[rows.tree] * token_logprobs(params, model, rows, TEMPERATURE)[0]
        ).sum()
    )(params)


def _sum_by_tree(forest, values):
    """Sums over each tree [B] what each sampled token of `_one_thread_a_row` is worth."""
    return np.where(
        forest.sampled, np.asarray(values, np.float64).reshape(forest.sampled.shape), 0.0
    ).sum((1, 2))


def _counted(heard, forest):
    return ~_is_unknown(forest) if heard.kl else forest.truncations == 0


def _price(heard, forest):
    """Price of a token: TOKEN_PRICE in the first step of a run.

    In the second step it has moved by how far the first step's trees were from the budget.
    """
    first = heard.firsts[0].forest
    if forest is first or not heard.kl:
        return TOKEN_PRICE
    return TOKEN_PRICE + PRICE_STEP * (first.sampled.sum() / len(first.sampled) / BUDGET - 1)


def _rewards(heard, forest):
    """A right answer less the prices less KL, the last by the reference's own log-probs."""
    cost = (
        _price(heard, forest) * _sum_by_tree(forest, forest.sampled)
        + SEQUENTIAL_PRICE * forest.sequential_tokens
    )
    anchor = _logprobs(heard.config.model, heard.start.params, _one_thread_a_row(forest))
    kl = _sum_by_tree(forest, forest.logprob) - _sum_by_tree(forest, anchor)
    return _says_a_solution(forest) - cost - heard.kl * kl, kl


def _advantages(heard, forest):
    """Each tree's reward less the mean of those of the other trees that were asked the same, and
    count.
    """
    rewards, _ = _rewards(heard, forest)
    asked = [_asked(forest, tree, heard.start.tokenizer) for tree in range(len(rewards))]
    assert sorted(map(asked.count, asked)) == [GROUP] * len(asked), "no problem came up twice"
    advantages = np.zeros(len(rewards))
    counted = _counted(heard, forest)
    for tree in np.flatnonzero(counted):
        others = [o for o in np.flatnonzero(counted) if o != tree and asked[o] == asked[tree]]
        advantages[tree] = rewards[tree] - np.mean(rewards[others]) if others else 0.0
    return advantages


def test_advantages_follow_from_answers_prices_and_kl(
    heard,
):
    """They are set against the other trees of the same problem."""
    for update in heard.updates:
        np.testing.assert_allclose(
            update.advantages, _advantages(heard, update.forest), rtol=1e-4, atol=1e-4
        )
    first, second = (_rewards(heard, update.forest)[1] for update in heard.firsts)
    assert np.abs(first).max() < 1e-3 and np.abs(second).max() > 1, (
        "the reference is the policy that begins"
    )
    for update in heard.firsts:
        assert 0 < _says_a_solution(update.forest).sum() < PROBLEMS * GROUP
        assert (update.advantages > 0.05).any() and (update.advantages < -0.05).any()


def test_token_price_follows_tokens_of_all_threads(heard):
    first = heard.firsts[0].forest
    assert first.total_tokens.mean() > first.sequential_tokens.mean() + 1, "threads side by side"
    prices = [_price(heard, update.forest) for update in heard.firsts]
    assert [line["token_price"] for line in heard.lines] == pytest.approx(prices, rel=1e-9)
    assert (prices[1] > 1.1 * prices[0]) == bool(heard.kl)


def test_unknown_answers_have_no_part_in_step_metrics(heard):
    for update, line in zip(heard.firsts, heard.lines, strict=True):
        forest = update.forest
        known = ~_is_unknown(forest) if heard.kl else np.ones(PROBLEMS * GROUP, bool)
        assert not heard.kl or 0 < known.sum() < PROBLEMS * GROUP
        assert (
            line["reward_timeouts"] == np.sum(~known)
            and line["reward_errors"] == line["reward_unverified"] == 0
        )
        assert line["accuracy"] == pytest.approx(np.mean(_says_a_solution(forest)[known]))
        cost = (
            _price(heard, forest) * forest.total_tokens
            + SEQUENTIAL_PRICE * forest.sequential_tokens
        )
        assert line["reward"] == pytest.approx(np.mean((_says_a_solution(forest) - cost)[known]))
        assert line["total_tokens"] == pytest.approx(np.mean(forest.total_tokens)), (
            "what it cost is known"
        )
        assert line["masked_trees"] == (0 if heard.kl else np.sum(forest.truncations > 0))


def test_sampled_tokens_that_teach_are_rescored_once(heard):
    """Children's tokens too, and of trees without an advantage none, unless KL gives them one."""
    of_children = 0
    for update in heard.updates:
        forest = update.forest
        rows = update.rows
        taught = (
            np.ones(PROBLEMS * GROUP, bool)
            if heard.kl
            else np.abs(_advantages(heard, forest)) > 1e-9
        )
        got = np.bincount(rows.tree[rows.sampled], minlength=len(taught))
        assert got.tolist() == np.where(taught, forest.total_tokens, 0).tolist()
        of_children += forest.sampled[taught, 1:].sum()
        logprobs = np.bincount(rows.tree[rows.sampled], rows.logprob[rows.sampled], len(taught))
        np.testing.assert_allclose(
            logprobs, np.where(taught, _sum_by_tree(forest, forest.logprob), 0), rtol=1e-5
        )
    assert of_children > 50


def test_update_climbs_advantage_weighted_log_prob_of_trees(
    heard,
):
    """It climbs the mean over trees of advantage times the log-prob of the whole tree.

    The rate takes back the divisor of the first step, in the second step too, whose trees are of
    another length.
    """
    first, later = (update.forest.total_tokens.mean() for update in heard.firsts)
    assert abs(later / first - 1) > 0.01
    for update in heard.firsts:
        rows = _one_thread_a_row(update.forest)
        advantages = _advantages(heard, update.forest)
        share = np.float32(advantages / _counted(heard, update.forest).sum())
        gradient, _ = ravel_pytree(_gradient(heard.config.model, update.before, rows, share))
        moved = ravel_pytree(update.after)[0] - ravel_pytree(update.before)[0]
        largest = np.abs(gradient).max()
        assert largest > 0.5
        np.testing.assert_allclose(moved / RATE, gradient, rtol=0, atol=1e-4 * largest)


def test_clipped_updates_counts_gradients_beyond_the_clip(heard):
    norms = np.array([float(update.metrics["grad_norm"]) for update in heard.updates])
    shares = (norms > GRADIENT_CLIP).reshape(2, 2).mean(axis=1)
    assert [line["clipped_updates"] for line in heard.lines] == shares.tolist()
    assert shares.any()


def test_second_update_begins_where_the_first_ended(heard):
    """Only from there on are ratios away from 1: the tokens beyond the clip are counted by hand."""
    for first, second in zip(heard.firsts, heard.updates[1::2], strict=True):
        jax.tree.map(np.testing.assert_array_equal, second.before, first.after)
        assert first.metrics["clip_share"] == 0
        rows = _one_thread_a_row(second.forest)
        ratio = np.exp(_logprobs(heard.config.model, second.before, rows) - rows.logprob)
        advantage = np.where(rows.sampled, second.advantages[rows.tree], 0.0)
        beyond = ((advantage > 0) & (ratio > 1 + CLIP)) | ((advantage < 0) & (ratio < 1 - CLIP))
        rescored = second.rows.sampled.sum()
        assert beyond.sum() > 50
        assert second.metrics["clip_share"] == pytest.approx(
            beyond.sum() / rescored, abs=2 / rescored
        )
    assert [line["clip_share"] for line in heard.lines] == [
        float(u.metrics["clip_share"]) for u in heard.updates[1::2]
    ]


@pytest.mark.thorough
def test_steep_token_price_makes_trees_short(config, data_dir, checkpoint, tmp_path, monkeypatch):
    """One program serves all numbers of rows.

    Each update is given what the one before gave: another layout or type of that would be another
    program.
    """
    settings = _spawning(
        config,
        steps=12,
        micro_batch_rows=2,
        reward=RewardConfig(token_price=TOKEN_PRICE),
        objective=ObjectiveConfig(advantage="leave_one_out", kl=0.0),
        optimizer=OptimizerConfig(lr=3e-2, warmup=0, decay=1.0),
    )
    sizes = set()
    place_forest = trainer.place_forest
    embedding = load_checkpoint(checkpoint).params["embed"].shape
    before = _live(embedding)
    copies = set()

    def hear_size(rows, *arguments, **options):
        sizes.add(len(rows.tokens))
        copies.add(_live(embedding) - before)
        return place_forest(rows, *arguments, **options)

    monkeypatch.setattr(trainer, "place_forest", hear_size)
    with compilations() as compiled:
        train_rl(settings, data_dir, tmp_path, checkpoint, progress=False)
    tokens = [line["total_tokens"] for line in logged(tmp_path)[1:]]
    assert np.mean(tokens[-2:]) < np.mean(tokens[:2]) / 2
    assert compiled.count("jit(step)") == 1, "whatever the size of the forest"
    assert len(sizes) > 1
    assert compiled.count("jit(rollout)") == 1, "of training and of validation"
    assert compiled.count("jit(rescore)") == 0, "without KL nobody asks the reference"
    assert copies == {3}, "parameters and AdamW's two moments are on the devices, and no reference"


@pytest.mark.thorough
def test_without_validations_the_last_step_is_the_best(config, data_dir, checkpoint, tmp_path):
    settings = changed(config, rl={"validate_every": 0, "steps": 2, "ppo_epochs": 1})
    train_rl(settings, data_dir, tmp_path, checkpoint, progress=False)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [1, 2], "step 0 has nothing to tell"
    assert not [name for line in lines for name in line if name.startswith("validation_")]
    assert load_checkpoint(tmp_path).step == 2


def _live(shape):
    """Arrays of a shape that are on the devices."""
    return sum(array.shape == shape for array in jax.live_arrays())
