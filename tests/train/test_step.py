"""The RL step: the chunks of a packed forest add up to one pass over it, and one program serves
forests of all sizes.
"""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.recorded import LIMITS, MODEL, TEMPERATURE, TREES, params, record
from helpers.whole_runs import changed, compilations

from apr_jax.data.packing import pack_forest, padding_share
from apr_jax.model.sharding import make_mesh
from apr_jax.plan.count import Counter
from apr_jax.plan.hlo import parse
from apr_jax.plan.measure_cpu import sft_program
from apr_jax.train.config import ObjectiveConfig
from apr_jax.train.rl.objective import policy_loss, token_weights, zero_advantage_trees
from apr_jax.train.rl.rescoring import token_logprobs
from apr_jax.train.state import init_state
from apr_jax.train.step import (
    make_rescore,
    make_rl_step,
    place_everywhere,
    place_forest,
    place_whole,
    rescored_rows,
)

LENGTH = 12
OBJECTIVE = ObjectiveConfig(kl=0.1, kl_estimator="k2", entropy=0.05)
KEEPS = optax.trace(decay=0.0)  # An optimizer whose state is the gradient.
ROWS = 3


def _forest(threads, size):
    """One tree of so many threads of `size` tokens."""
    shape = 1, threads, LENGTH
    names = ("tokens", "position", "hidden_block", "sampled", "logprob", "allowed")
    recorded = {name: np.ones(shape, np.int32) for name in names}
    return SimpleNamespace(length=np.full((1, threads), size, np.int32), **recorded)


@pytest.mark.parametrize(
    ("threads", "rows", "chunks"), [(1, 2, 1), (4, 2, 1), (5, 4, 2), (9, 6, 3), (0, 0, 0)]
)
def test_chunks_without_tokens_are_neither_rescored_nor_counted(threads, rows, chunks):
    packed = pack_forest(_forest(threads, LENGTH // 2), 2, LENGTH)  # Two threads a row.
    rescored = rescored_rows(packed, 2)
    assert len(rescored.tokens) == rows
    assert (rescored.segment > 0).sum() == threads * LENGTH // 2
    if rows:
        assert padding_share(rescored) == pytest.approx(1 - threads / 2 / rows)
    batch = place_forest(packed, np.ones(packed.tokens.shape), 2, make_mesh(2), chunks=5)
    assert int(batch.used) == chunks
    whole = jax.tree.map(lambda x: np.asarray(x).reshape(-1, LENGTH), batch.chunks)
    assert len(whole.tokens) == 10
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:rows], y), whole, rescored)
    assert not whole.segment[rows:].any() and (whole.tree[rows:] == -1).all()
    assert np.asarray(batch.weights).sum() == rows * LENGTH


@pytest.fixture(scope="module")
def update(config, mesh):
    return _make_update(config, mesh, OBJECTIVE)


def _make_update(config, mesh, objective):
    """(rows, weights, rows a chunk, advantages) -> gradient, metrics; and the jitted step."""
    settings = changed(config, model=MODEL, rl={"temperature": TEMPERATURE, "objective": objective})
    step = make_rl_step(settings, KEEPS, mesh)
    rescore = make_rescore(settings, mesh)
    reference = place_whole(_reference(), mesh)

    def call(rows, weights, size, advantages):
        batch = place_forest(rows, weights, size, mesh, _most_chunks(size))
        if objective.kl:
            batch = dataclasses.replace(batch, reference=rescore(reference, batch))
        state, metrics, _ = step(
            init_state(params(), KEEPS, mesh), batch, place_everywhere(np.float32(advantages), mesh)
        )
        assert jax.tree.all(jax.tree.map(lambda x: x.sharding.is_fully_replicated, state.params))
        return jax.device_get((state.opt_state.trace, metrics))

    return call, step


def _most_chunks(size):
    """Chunks of so many rows that hold a forest whose every thread fills a row."""
    return math.ceil(TREES * LIMITS.max_threads / size)


def _reference():
    return jax.tree.map(lambda x: 0.9 * x, params())


def _assert_same(got, expected):
    """Float32 to a few roundings: sums over 300 tokens in another order, of terms that cancel out
    to the gradient.
    """

    def compare(mine, theirs):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())

    jax.tree.map(compare, got, expected)


@pytest.mark.thorough
def test_chunks_equal_one_pass_over_the_whole_forest(update):
    forest = record()
    rows = pack_forest(forest, ROWS, LIMITS.max_thread_tokens)
    assert len(rescored_rows(rows, ROWS).tokens) == 3 * ROWS
    assert (
        forest.depth.max() == 2
        and (forest.hidden_block > 0).sum() > 50
        and (rows.segment > 3).any()
    )
    weights = token_weights(rows, np.ones(TREES, bool), "tree")
    advantages = np.array([1.0, -0.5, 2.0, -1.5, 0.7, -1.2])

    def loss_of(params):
        logprobs, entropy = token_logprobs(params, MODEL, rows, TEMPERATURE)
        anchor, _ = token_logprobs(_reference(), MODEL, rows, TEMPERATURE)
        loss, parts = policy_loss(
            logprobs,
            entropy,
            anchor,
            rows,
            jnp.float32(weights),
            jnp.float32(advantages),
            OBJECTIVE,
        )
        return loss, parts.metrics(TREES)

    (loss, means), gradient = jax.device_get(
        jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params())
    )
    call, _ = update
    for size in (ROWS, len(rows.tokens)):
        got, metrics = call(rows, weights, size, advantages)
        _assert_same(got, gradient)
        expected = {"loss": loss, "grad_norm": optax.global_norm(gradient)} | means
        for name in ("loss", "grad_norm", "kl", "entropy"):
            assert metrics[name] == pytest.approx(float(expected[name]), rel=1e-5), name
            assert abs(metrics[name]) > 1e-3, name
        # The interpreter's log-probs at this temperature are those of rescoring; without it they
        # differ a thousand times more.
        assert metrics["logprob_difference_worst"] < 1e-4


@pytest.mark.thorough
def test_one_program_serves_forests_of_all_sizes(update):
    """Of one tree to six, in three, six and twelve rows, of which one to three chunks hold tokens;
    and a forest without a token.
    """
    call, step = update
    forest = record()
    before = step._cache_size()
    rows_of = set()
    used = set()
    for trees in range(TREES + 1):
        rows = pack_forest(_only(forest, np.arange(TREES) < trees), ROWS, LIMITS.max_thread_tokens)
        call(rows, token_weights(rows, np.ones(TREES, bool), "tree"), ROWS, np.ones(TREES))
        rows_of.add(len(rows.tokens))
        used.add(len(rescored_rows(rows, ROWS).tokens) // ROWS)
    assert rows_of == {ROWS, 2 * ROWS, 4 * ROWS} and used == {0, 1, 2, 3}
    assert step._cache_size() - before <= 1, "none if a test above compiled it"


def _only(forest, wanted):
    """The forest with the threads of some trees alone."""
    return dataclasses.replace(forest, length=np.where(wanted[:, None], forest.length, 0))


def test_trees_that_are_left_out_change_no_gradient(config, mesh):
    """Tree 5 is masked, trees of a zero-std group have advantage 0; the divisor stays."""
    objective = ObjectiveConfig(kl=0.0)
    forest = record()
    advantages = np.array([1.0, 0.0, 0.0, -1.5, 0.0, 2.0])
    counted = np.arange(TREES) != 5
    without_advantage = zero_advantage_trees(advantages, counted, objective)
    assert without_advantage.tolist() == [False, True, True, False, True, True]
    call, _ = _make_update(config, mesh, objective)
    results = []
    for left in (forest, _only(forest, ~without_advantage)):
        rows = pack_forest(left, 4 * ROWS, LIMITS.max_thread_tokens)
        results.append(call(rows, token_weights(rows, counted, "tree"), ROWS, advantages))
        results[-1][1]["rows"] = len(rescored_rows(rows, ROWS).tokens)
    (whole, before), (gradient, after) = results
    _assert_same(gradient, whole)
    assert after["rows"] < before["rows"] and after["loss"] == pytest.approx(
        before["loss"], rel=1e-5
    )
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole)) > 0.1
    assert "kl" not in before, "nobody has asked the reference"
    # With these options every tree counts, so none is left out.
    for options in (
        {"kl": 0.1},
        {"entropy": 0.1},
        {"loss_aggregation": "token"},
        {"loss_aggregation": "sequence"},
    ):
        assert not zero_advantage_trees(
            advantages, counted, ObjectiveConfig(**{"kl": 0.0} | options)
        ).any()


def test_recomputed_log_probs_are_of_first_ppo_epoch(config, mesh):
    """Half of the recorded log-probs are 0.3 nats too low: ratios still begin at exactly 1.

    Such a token weighs e^0.3. A second epoch takes the first one's log-probs, whatever the
    parameters have become.
    """
    objective = ObjectiveConfig(kl=0.0, clip=0.2, importance_cap=2.0)
    settings = changed(config, model=MODEL, rl={"temperature": TEMPERATURE, "objective": objective})
    step = make_rl_step(settings, KEEPS, mesh)
    rows = pack_forest(record(), ROWS, LIMITS.max_thread_tokens)
    wrong = rows.sampled & (np.arange(rows.tokens.shape[1]) % 2 == 0)
    rows = dataclasses.replace(rows, logprob=rows.logprob - np.float32(0.3) * wrong)
    weights = token_weights(rows, np.ones(TREES, bool), "tree")
    advantages = np.float32([1.0, -0.5, 2.0, -1.5, 0.7, -1.2])
    batch = place_forest(rows, weights, ROWS, mesh, _most_chunks(ROWS), recompute=True)
    placed = place_everywhere(advantages, mesh)
    with compilations() as compiled:
        state, metrics, behaviour = step(init_state(params(), KEEPS, mesh), batch, placed)
    assert compiled.count("jit(step)") == 1
    assert metrics["clip_share"] == 0, "as against the recorded ones it would not be"
    assert metrics["outside_clip_share"] == pytest.approx(wrong.sum() / rows.sampled.sum())
    assert metrics["logprob_difference_worst"] == pytest.approx(0.3, abs=1e-3)
    logprobs, _ = jax.jit(lambda params: token_logprobs(params, MODEL, rows, TEMPERATURE))(params())
    used = int(batch.used) * ROWS
    own = np.asarray(behaviour).reshape(-1, rows.tokens.shape[1])[:used]
    np.testing.assert_allclose(
        own[rows.sampled[:used]], np.asarray(logprobs)[rows.sampled], atol=1e-5
    )
    expected = weights * np.where(wrong, np.exp(0.3), 1.0) * advantages[np.maximum(rows.tree, 0)]
    assert metrics["loss"] == pytest.approx(-expected.sum(), rel=1e-3)

    moved = jax.tree.map(lambda x: 1.3 * x, state.params)
    known = dataclasses.replace(batch, behaviour=behaviour)
    with compilations() as compiled:
        _, metrics, again = step(dataclasses.replace(state, params=moved), known, placed)
    assert compiled.count("jit(step)") == 0, "one program serves all PPO epochs"
    np.testing.assert_array_equal(again, behaviour)
    assert metrics["clip_share"] > 0.05


def test_no_rows_are_no_gradient(update):
    rows = pack_forest(_only(record(), np.zeros(TREES, bool)), ROWS, LIMITS.max_thread_tokens)
    gradient, metrics = update[0](
        rows, token_weights(rows, np.ones(TREES, bool), "tree"), ROWS, np.ones(TREES)
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0


@pytest.mark.parametrize("axes", [(1, 8, 1), (2, 4, 1), (1, 4, 2)])
def test_devices_gather_weights_and_move_no_rows(config, axes):
    """Where `fsdp` alone splits rows and weights, XLA likes to split rows by width on the way."""
    model = dataclasses.replace(config.model, width=64, heads=4, kv_heads=4, head_size=16, mlp=128)
    config = changed(config, sft={"batch_rows": 8})
    config = dataclasses.replace(config, model=model)
    lowered, _, _ = sft_program(config, make_mesh(*axes), vocab=64)
    computations, entry = parse(lowered.compile().as_text())
    kinds = {collective.kind for collective in Counter(computations).of(entry).collectives}
    assert "all-gather" in kinds
    assert "all-to-all" not in kinds
