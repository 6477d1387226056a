"""Eight devices in every shape: checkpoints move between meshes, the loss curve and the trees stay
what one device gives.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers.whole_runs import assert_close, changed, logged

from apr_jax.config import MeshConfig
from apr_jax.model.attention import packed
from apr_jax.model.sharding import make_mesh, shardings
from apr_jax.model.transformer import init_params
from apr_jax.tasks import load_problems, make_task
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import BOS
from apr_jax.threads import make_prompts
from apr_jax.threads.prompts import NOT_FORCED
from apr_jax.train import sft
from apr_jax.train.checkpoint import Checkpoints, Run, load_checkpoint
from apr_jax.train.config import OptimizerConfig, RewardConfig
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.policy import make_policy_rollout
from apr_jax.train.rl import trainer
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.sft import train_sft
from apr_jax.train.state import init_state
from apr_jax.train.step import place_whole


def _factorisations(devices):
    """All (data, fsdp, tensor) whose product is `devices`."""
    numbers = range(1, devices + 1)
    return [(d, f, t) for d in numbers for f in numbers for t in numbers if d * f * t == devices]


EIGHT = _factorisations(8)
ALL = [axes for devices in (1, 2, 4, 8) for axes in _factorisations(devices)]
FAST = ((2, 2, 2),)
THOROUGH = ((8, 1, 1), (1, 1, 8))  # The others are slow.


def _mark(axes):
    if axes in FAST:
        return ()
    return pytest.mark.thorough if axes in THOROUGH else pytest.mark.slow


HEADS, KV_HEADS = 16, 8  # Eight devices can share either.
OPTIMIZER = make_optimizer(OptimizerConfig(name="muon"), 10)


def test_there_are_ten_ways_to_lay_out_eight_devices():
    assert (len(EIGHT), len(ALL)) == (10, 20)


def _blank(config, axes, seed):
    return init_state(
        init_params(_on(config, axes).model, 32, jax.random.key(seed)), OPTIMIZER, make_mesh(*axes)
    )


def _heads(state):
    """How many heads, and key/value heads, a device has of the weights."""
    q, kv = (state.params["layers"][name].addressable_shards[0].data for name in ("q", "kv"))
    return q.shape[2], kv.shape[3]


@pytest.mark.thorough
@pytest.mark.parametrize("home", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_a_checkpoint_restores_on_every_mesh(config, tmp_path, home):
    """Twenty meshes of 1, 2, 4 and 8 devices: the values saved, the layout of the mesh that they
    come to.
    """
    run = Run(config, "apr", "sft", SentencePieceTokenizer.train(["0123456789"]))
    state = _blank(config, home, 1)
    saved = jax.tree.map(np.asarray, state)
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(dataclasses.replace(state, step=state.step + 3), {}, {"position": 5})
        checkpoints.wait()
        spread = 0
        for axes in ALL:
            blank = _blank(config, axes, 2)
            found = checkpoints.restore_latest(blank)
            restored = found.state
            assert found.data == {"position": 5}
            assert int(restored.step) == 3
            jax.tree.map(
                np.testing.assert_array_equal, dataclasses.replace(restored, step=saved.step), saved
            )
            wanted = shardings(restored, make_mesh(*axes))
            for leaf, sharding in zip(
                jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True
            ):
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (axes, leaf.shape)
            assert _heads(restored) == (HEADS // axes[2], KV_HEADS // axes[2])
            spread += not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(restored))
        assert spread == sum(f * t > 1 for _, f, t in ALL), "otherwise nothing was moved"
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path).params, saved.params)


def _on(config, axes, heads=HEADS, kv_heads=KV_HEADS):
    """Eight rows, and heads, keys and values of which each of up to eight devices has its own."""
    model = dataclasses.replace(config.model, heads=heads, kv_heads=kv_heads)
    return changed(config, sft={"batch_rows": 8}, model=model, mesh=MeshConfig(*axes))


@pytest.fixture
def held(monkeypatch):
    """How many (query, key/value) heads a device has in a run: of what it attends over, and of the
    weights of each update.
    """
    found = set()
    attend = packed._attend

    def spy(q, k, *rest):
        found.add((q.shape[2], k.shape[1]))
        return attend(q, k, *rest)

    def watched(make):
        def make_watched(*args):
            step = make(*args)

            def update(*args):
                state, *rest = step(*args)
                found.add(_heads(state))
                return state, *rest

            return update

        return make_watched

    monkeypatch.setattr(packed, "_attend", spy)
    monkeypatch.setattr(sft, "make_sft_step", watched(sft.make_sft_step))
    monkeypatch.setattr(trainer, "make_rl_step", watched(trainer.make_rl_step))
    return found


@pytest.fixture(scope="module")
def alone(config, data_dir, tmp_path_factory):
    """The run on one device."""
    workdir = tmp_path_factory.mktemp("alone")
    train_sft(_on(config, (1, 1, 1)), data_dir, workdir, "apr", progress=False)
    return workdir


@pytest.mark.parametrize(
    "axes",
    [pytest.param(axes, marks=_mark(axes)) for axes in EIGHT],
    ids=str,
)
def test_the_loss_curve_is_that_of_one_device(config, data_dir, alone, tmp_path, held, axes):
    train_sft(_on(config, axes), data_dir, tmp_path, "apr", progress=False)
    assert_close(tmp_path, alone)
    assert held == {(HEADS // axes[2], KV_HEADS // axes[2])}


@pytest.mark.thorough
def test_a_run_moves_from_mesh_to_mesh(config, data_dir, alone, tmp_path, monkeypatch):
    """Stopped after every other step and started on other devices, it follows the curve of one
    device.
    """
    from apr_jax.train import loop

    for stop, axes in ((2, (2, 2, 2)), (4, (1, 1, 1)), (6, (4, 1, 2))):
        with monkeypatch.context() as patch:
            votes = type(
                "StopConsensus",
                (),
                {"cast": lambda self, signals, step, stop=stop: 15 * (int(step) == stop < 6)},
            )
            patch.setattr(loop, "StopConsensus", votes)
            if stop < 6:
                with pytest.raises(SystemExit):
                    train_sft(_on(config, axes), data_dir, tmp_path, "apr", progress=False)
            else:
                train_sft(_on(config, axes), data_dir, tmp_path, "apr", progress=False)
        assert load_checkpoint(tmp_path).step == stop
    assert_close(tmp_path, alone)


def _reinforce(config, axes, data_dir, workdir, init):
    """Eight trees a step, which differ in reward: a model this small never hits a target, but its
    trees have a price.

    Steps are small enough for a KL below 1. Where it is 100, a few tokens of exp(10) are all of it,
    and they multiply the rounding of a log-prob.
    """
    reward = RewardConfig(
        token_price=0.01, sequential_price=0.001, token_budget=40, price_step=0.0007
    )
    rl = {
        "problems": 4,
        "group": 2,
        "micro_batch_rows": 8,
        "temperature": 0.5,
        "reward": reward,
        "optimizer": dataclasses.replace(config.train.rl.optimizer, lr=3e-4),
    }
    train_rl(changed(_on(config, axes), rl=rl), data_dir, workdir, init, progress=False)


@pytest.fixture(scope="module")
def reinforced_alone(config, data_dir, tmp_path_factory):
    """A supervised run that is long enough for a model that spawns now and then, and RL after it,
    on one device.
    """
    start, workdir = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("reinforced")
    train_sft(
        changed(_on(config, (1, 1, 1)), sft={"batch_rows": 8, "steps": 300, "save_every": 300}),
        data_dir,
        start,
        "apr",
        False,
    )
    _reinforce(config, (1, 1, 1), data_dir, workdir, start)
    lines = logged(workdir)[1:]
    assert sum(line["children"] for line in lines) > 0, "trees of one thread would show little"
    tokens_per_tree = lines[0]["total_tokens"]  # By which the objective divides.
    assert all(line["grad_norm"] * tokens_per_tree > 1 for line in lines), "nothing to learn"
    assert all(line["zero_std_groups"] < 4 for line in lines), "nothing to learn"
    assert all(line["kl"] < 1 for line in lines)
    assert all(line["logprob_difference_worst"] < 1e-4 for line in lines), "at a temperature of 0.5"
    return start, workdir


@pytest.mark.slow
@pytest.mark.parametrize("axes", EIGHT, ids=str)
def test_reinforcement_is_that_of_one_device(
    config, data_dir, reinforced_alone, tmp_path, held, axes
):
    """Whole steps: sampling, rescoring of the trees, two updates each, greedy validation; weights
    and trees split up.
    """
    start, alone = reinforced_alone
    _reinforce(config, axes, data_dir, tmp_path, start)
    # Decode slots are counted a shard: on eight shards there are eight times as many, for the same
    # trees. The worst difference of log-probs is rounding and nothing else; it has a bound below.
    assert_close(tmp_path, alone, but=("slot_occupancy", "logprob_difference_worst"))
    assert held == {(HEADS // axes[2], KV_HEADS // axes[2])}
    assert all(line["logprob_difference_worst"] < 1e-4 for line in logged(tmp_path)[1:])


@pytest.mark.slow
def test_rollouts_are_the_same_trees_on_every_mesh(config, data_dir, alone):
    """Sampled, not greedy: every token of every tree, and who spawned whom."""
    restored = load_checkpoint(alone)
    task = make_task(config.task)
    problems = itertools.cycle(load_problems(data_dir / "train.jsonl", task))
    texts = [task.prompt(problem) for problem in itertools.islice(problems, 256)]
    ids = [[BOS, *restored.tokenizer.encode(text)] for text in texts]
    # A barely trained model seldom spawns well of its own accord: half of the roots must, and none
    # may err.
    limits = dataclasses.replace(config.limits, constrain=True)
    prompts = make_prompts(ids, 16, temperature=1.0, children=[2, NOT_FORCED] * 128)

    def trees(axes):
        mesh = make_mesh(*axes)
        rollout = make_policy_rollout(_on(config, axes).model, limits, config.schedule, mesh)
        forest, _ = rollout(place_whole(restored.params, mesh), prompts, jax.random.key(7))
        return jax.device_get(forest)

    expected = trees((1, 1, 1))
    assert expected.total_tokens.sum() > 2_000
    assert expected.children.sum() > 40
    for axes in EIGHT:
        got = trees(axes)
        for field in dataclasses.fields(expected):
            mine, theirs = getattr(got, field.name), getattr(expected, field.name)
            if field.name == "logprob":
                np.testing.assert_allclose(mine, theirs, atol=1e-5)
            else:
                np.testing.assert_array_equal(mine, theirs, err_msg=f"{field.name} on {axes}")
