"""Training of adapters: the optimizer sees them alone, everything else the merged weights."""

import dataclasses
import functools
import signal

import jax
import numpy as np
import optax
import pytest
from helpers.recorded import LIMITS, MODEL, TEMPERATURE, TREES, params, record
from helpers.whole_runs import Interrupt, changed, logged, repeatable, write_config

from apr_jax.cli import main
from apr_jax.config import ConfigError, override
from apr_jax.data.packing import pack_forest
from apr_jax.model.lora import frozen, merge
from apr_jax.model.sharding import make_mesh, shardings
from apr_jax.train import sft
from apr_jax.train.checkpoint import load_adapters, load_checkpoint
from apr_jax.train.checkpoint.step_files import without_params
from apr_jax.train.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from apr_jax.train.lora import make_adapters, place_frozen
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.rl.objective import token_weights
from apr_jax.train.rl.trainer import train_rl
from apr_jax.train.sft import train_sft
from apr_jax.train.state import init_state
from apr_jax.train.step import (
    make_rl_step,
    make_sft_step,
    place_everywhere,
    place_forest,
    place_rows,
)

LORA = LoraConfig(rank=2, alpha=3.0)
KEEPS = optax.trace(decay=0.0)  # An optimizer whose state is the gradient, and so is its update.
ROWS = 4


def moved_adapters():
    """Adapters on their way: both factors are far from zero."""
    fresh = make_adapters(params(), LORA, seed=3)
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(leaf + rng.normal(0, 0.1, leaf.shape), np.float32)
        for name, leaf in fresh.items()
    }


@jax.jit
def on(start, adapters):
    """The model `start` with adapters."""
    return merge(adapters, start, frozen(start, LORA.targets), LORA.scale)


def merged(adapters):
    return on(params(), adapters)


def packed():
    return pack_forest(record(), ROWS, LIMITS.max_thread_tokens)


def assert_close(got, expected):
    def compare(mine, theirs):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

    jax.tree.map(compare, got, expected)


def supervised(mesh, start, adapters):
    """One supervised step: its state and metrics."""
    step = make_sft_step(MODEL, KEEPS, mesh, LORA)
    base = None if adapters is None else place_frozen(params(), LORA, mesh)
    state = init_state(start, KEEPS, mesh, adapters)
    rows = packed()
    return step(state, place_rows(rows, len(rows.tokens), mesh), base)


def reinforced(config, mesh, start, adapters):
    """One update on a forest of several chunks: its state and metrics."""
    objective = ObjectiveConfig(kl=0.0, entropy=0.05)
    rl = {"temperature": TEMPERATURE, "objective": objective, "lora": LORA}
    step = make_rl_step(changed(config, model=MODEL, rl=rl), KEEPS, mesh)
    rows = packed()
    weights = token_weights(rows, np.ones(TREES, bool), "tree")
    batch = place_forest(rows, weights, ROWS, mesh, chunks=TREES * LIMITS.max_threads // ROWS)
    assert int(batch.used) > 1
    advantages = place_everywhere(np.float32([1.0, -0.5, 2.0, -1.5, 0.7, -1.2]), mesh)
    base = None if adapters is None else place_frozen(params(), LORA, mesh)
    state, metrics, _ = step(init_state(start, KEEPS, mesh, adapters), batch, advantages, base)
    return state, metrics


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_of_the_optimizer_has_the_shapes_of_adapters_alone(mesh, name):
    optimizer = make_optimizer(OptimizerConfig(name=name), 10)
    adapters = make_adapters(params(), LORA, seed=0)
    state = init_state(params(), optimizer, mesh, adapters)
    # Besides counts and Muon's coefficients.
    moments = {leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1}
    assert moments == {leaf.shape for leaf in adapters.values()}

    @jax.jit
    def update(gradient):
        return optimizer.update(gradient, state.opt_state, adapters)[0]

    updates = update(adapters)
    for leaf in ("q_a", "control_embed"):  # One that Muon takes for matrices, one for AdamW.
        assert np.isfinite(updates[leaf]).all() and np.abs(updates[leaf]).max() > 0


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_step_follows_the_full_gradient_by_the_chain_rule(config, mesh, stage):
    """The parameters after it are those of the frozen model with the new adapters."""
    take = {"sft": supervised, "rl": functools.partial(reinforced, config)}[stage]
    adapters = moved_adapters()
    start = merged(adapters)
    whole, expected = take(mesh, start, None)
    state, metrics = take(mesh, start, adapters)
    assert metrics["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)

    _, pull_back = jax.vjp(merged, adapters)
    (gradient,) = pull_back(jax.device_get(whole.opt_state.trace))
    assert_close(state.opt_state.trace, gradient)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(gradient)), rel=1e-4)

    new = {name: adapters[name] + gradient[name] for name in adapters}
    assert_close(state.adapters, new)
    assert_close(state.params, merged(new))
    for name in ("attn_norm", "mlp_norm"):
        np.testing.assert_array_equal(state.params["layers"][name], params()["layers"][name])
    np.testing.assert_array_equal(state.params["embed"][10:], params()["embed"][10:])


@pytest.mark.thorough
@pytest.mark.parametrize("axes", [(2, 2, 1), (1, 2, 2)])
def test_a_mesh_trains_the_same_adapters(mesh, axes):
    adapters = moved_adapters()
    start = merged(adapters)
    expected, _ = supervised(mesh, start, adapters)
    several = make_mesh(*axes, jax.devices()[:4])
    got, _ = supervised(several, start, adapters)
    assert not got.adapters["o_b"].is_fully_replicated, "split over the width by fsdp"
    assert got.adapters["q_b"].is_fully_replicated == (axes[2] == 1)
    layout = shardings(got, several)
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), got, layout)
    assert jax.tree.all(same), "the new state keeps the layout of the old one"
    assert_close(jax.device_get(got.adapters), jax.device_get(expected.adapters))
    assert_close(jax.device_get(got.params), jax.device_get(expected.params))


@pytest.mark.thorough
def test_a_bad_update_changes_neither_adapters_nor_weights(mesh):
    adapters = moved_adapters()
    broken = jax.tree.map(np.array, jax.device_get(merged(adapters)))
    broken["final_norm"][0] = np.nan
    state, metrics = supervised(mesh, broken, adapters)
    assert int(metrics["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, broken)
    jax.tree.map(np.testing.assert_array_equal, state.adapters, adapters)


def with_lora(config, **more):
    """The experiment with adapters in both stages."""
    sft_settings = {"lora": LORA, "steps": 4, "validate_every": 0}
    return changed(config, sft=sft_settings, rl={"lora": LORA} | more)


@pytest.fixture(scope="module")
def adapted(config, checkpoint, data_dir, tmp_path_factory):
    """A supervised run of adapters on the model of the tests' shared run."""
    workdir = tmp_path_factory.mktemp("adapted")
    settings = with_lora(config)
    state = train_sft(settings, data_dir, workdir, "apr", progress=False, init=checkpoint)
    return workdir, state


def test_checkpoint_holds_merged_weights_and_the_adapters_apart(adapted, checkpoint):
    workdir, state = adapted
    restored = load_checkpoint(workdir)
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    found = load_adapters(workdir)
    jax.tree.map(np.testing.assert_array_equal, found.adapters, state.adapters)
    assert found.lora == LORA

    # Every array is the frozen one with its adapters, or the frozen one to the bit.
    start = load_checkpoint(checkpoint).params
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        restored.params,
        on(start, found.adapters),
    )
    np.testing.assert_array_equal(restored.params["embed"][10:], start["embed"][10:])
    np.testing.assert_array_equal(restored.params["final_norm"], start["final_norm"])
    assert np.abs(restored.params["layers"]["q"] - start["layers"]["q"]).max() > 1e-4
    assert "adapters" not in without_params(dataclasses.replace(state, adapters=None))


@pytest.mark.thorough
def test_stopped_and_resumed_is_the_unbroken_run(
    adapted, config, checkpoint, data_dir, tmp_path, monkeypatch
):
    settings = with_lora(config)

    class Bound(Interrupt):
        """The step gets the frozen weights by name."""

        def __call__(self, *args):
            step = self._make(*args)
            inner = Interrupt(lambda: functools.partial(step), self._left, self._number)()
            return lambda *given, base: inner(*given, base)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "make_sft_step", Bound(sft.make_sft_step, 3, signal.SIGTERM))
        with pytest.raises(SystemExit):
            train_sft(settings, data_dir, tmp_path, "apr", progress=False, init=checkpoint)
    assert load_checkpoint(tmp_path).step == 3
    state = train_sft(settings, data_dir, tmp_path, "apr", progress=False, init=checkpoint)
    jax.tree.map(np.testing.assert_array_equal, state, adapted[1])
    assert repeatable(tmp_path) == repeatable(adapted[0])


@pytest.mark.thorough
def test_rollout_and_update_of_rl_read_the_same_weights(adapted, config, data_dir, tmp_path):
    """Two PPO epochs a step, on adapters that began on a run of adapters."""
    settings = with_lora(config, objective=ObjectiveConfig(kl=0.05, kl_estimator="k2"))
    state = train_rl(settings, data_dir, tmp_path, adapted[0], progress=False)
    lines = logged(tmp_path)[1:]
    assert lines[-1]["step"] == 3
    for line in lines:
        assert line["logprob_difference_worst"] < 1e-4
    assert max(line["kl"] for line in lines) > 0, "the reference is the model without adapters"
    assert any(np.abs(state.adapters["q_b"]).ravel() > 0)
    start = load_checkpoint(adapted[0]).params
    expected = on(start, jax.device_get(state.adapters))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), state.params, expected)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rank=-1", "train.sft.lora.rank=-1 must be at least 0"),
        ("alpha=0", "train.sft.lora.alpha=0.0 must be positive"),
        ("targets=control", "train.sft.lora.targets='control' must name each target once"),
        ("targets=q,q", "train.sft.lora.targets='q,q' must name each target once"),
        ("targets=q,query", "train.sft.lora.targets.1='query': Input should be 'q', 'k', 'v'"),
    ],
)
def test_bad_settings_are_named(config, setting, message):
    with pytest.raises(ConfigError) as caught:
        override(config, [f"train.sft.lora.{setting}"])
    assert message in str(caught.value)


def test_targets_are_set_by_their_names(config):
    changed_config = override(config, ["train.rl.lora.rank=4", "train.rl.lora.targets=q, v"])
    assert changed_config.train.rl.lora == LoraConfig(rank=4, targets=("q", "v"))
    assert changed_config.train.sft.lora == LoraConfig()


def test_adapters_of_random_weights_are_refused_in_one_line(config, data_dir, tmp_path, capfd):
    file = write_config(config, tmp_path / "tiny.py")
    command = ["train", "sft", "--config", str(file), "--workdir", str(tmp_path / "run")]
    assert main.run([*command, "--data", str(data_dir), "--set", "train.sft.lora.rank=4"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "config train.sft.lora.rank=4: adapters are added to a trained model; give it" in said
    assert not (tmp_path / "run").exists()
