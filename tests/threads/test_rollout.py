"""The device engine against the reference interpreter, in every field, on good and bad streams."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apr_jax.model.sharding import make_mesh
from apr_jax.threads import Limits, Prompts, Schedule, Status, interpret, make_rollout, tree_rollout
from apr_jax.threads import protocol as p

TREES = 12
LIMITS = {
    "flat": Limits(window=24, stream=40, slots=5, children=3, max_depth=1),
    "nested": Limits(window=26, stream=44, slots=16, children=4, max_depth=3),
    "tight": Limits(window=16, stream=20, slots=9, children=2, max_depth=2, max_tokens=60, max_sequential=40),
    "childless": Limits(window=20, stream=24, slots=1, children=1, max_depth=0),
}


def prompts(seed: int, trees: int = TREES) -> Prompts:
    rng = np.random.default_rng(seed)
    text = rng.integers(scripted.TEXT.start, scripted.VOCAB, (trees, 4))
    return Prompts(
        tokens=jnp.asarray(np.concatenate([np.full((trees, 1), p.BOS), text], axis=1), jnp.int32),
        length=jnp.asarray(rng.integers(1, 6, trees), jnp.int32),
        tree=jnp.asarray(np.arange(trees) + 1000 * seed, jnp.int32),
        temperature=jnp.asarray(np.resize([1.0, 1.4, 0.0], trees), jnp.float32),
    )


@functools.cache
def engine(limits: Limits, schedule: Schedule):
    return jax.jit(
        functools.partial(tree_rollout, scripted.decode, scripted.init_cache, limits=limits, schedule=schedule)
    )


def take(forest, tree: int):
    return jax.tree.map(lambda field: np.asarray(field[tree]), forest)


def assert_same(left, right, what: str = "") -> None:
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name == "logprob":
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=f"{what} logprob")
        else:
            np.testing.assert_array_equal(a, b, err_msg=f"{what} {field.name}")


def compare(name: str, schedule: Schedule, seed: int, manners: float) -> collections.Counter:
    """Both implementations on one batch; returns how often each outcome came up."""
    limits, batch, key = LIMITS[name], prompts(seed), jax.random.key(seed)
    policy = scripted.policy(seed, manners)
    forest, work = jax.device_get(engine(limits, schedule)(policy, batch, key))
    seen: collections.Counter = collections.Counter()
    for tree in range(TREES):
        prompt = [int(token) for token in batch.tokens[tree, : int(batch.length[tree])]]
        expected = interpret(
            scripted.logits_of(policy), prompt, int(batch.tree[tree]), float(batch.temperature[tree]), key, limits
        )
        assert_same(take(forest, tree), expected, f"{name} seed {seed} tree {tree}")
        seen.update(Status(int(status)).name for status in expected.status)
        seen.update(refusals=int(expected.refusals), tokens=int(expected.total_tokens), children=int(expected.children))
        seen.update(rounds=int(expected.round.max()), depth=int(expected.depth.max()))
    assert work.live == forest.total_tokens.sum()
    return seen


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(LIMITS)),
    lanes=st.sampled_from([Schedule(5, 2, 3), Schedule(1, 1, 1)]),
    seed=st.integers(0, 2**20),
    manners=st.sampled_from([0.0, 2.0, 5.0, 9.0]),
)
def test_engine_equals_reference_on_random_policies(name, lanes, seed, manners):
    compare(name, lanes, seed, manners)


def test_every_outcome_comes_up_and_agrees():
    seen: collections.Counter = collections.Counter()
    for seed in range(16):
        for name in ("nested", "tight"):
            seen += compare(name, Schedule(7, 3, 4), seed, manners=[0.0, 1.5, 4.0, 9.0][seed % 4])
    for outcome in (
        "DONE",
        "NO_ANSWER",
        "MALFORMED",
        "OUT_OF_WINDOW",
        "OUT_OF_BUDGET",
        "refusals",
        "children",
        "rounds",
        "depth",
    ):
        assert seen[outcome] >= 10, (outcome, seen)


@pytest.mark.slow
def test_a_million_tokens_agree():
    seen: collections.Counter = collections.Counter()
    seed = 10_000
    while seen["tokens"] < 1_000_000:
        for name in LIMITS:
            seen += compare(name, Schedule(7, 3, 4), seed, manners=[0.0, 2.0, 5.0, 9.0][seed % 4])
        seed += 1


@pytest.mark.parametrize("schedule", [Schedule(1, 1, 1), Schedule(3, 1, 5), Schedule(64, 16, 2)])
def test_schedule_changes_no_token(schedule):
    limits, batch, key = LIMITS["nested"], prompts(3), jax.random.key(3)
    policy = scripted.policy(3, 5.0)
    forest, _ = engine(limits, Schedule(8, 4, 16))(policy, batch, key)
    other, _ = engine(limits, schedule)(policy, batch, key)
    assert int(forest.children.sum()) > 10
    assert_same(jax.device_get(forest), jax.device_get(other))


def test_a_tree_is_the_same_in_any_batch_and_its_neighbours_do_not_feel_it():
    limits, batch, key = LIMITS["nested"], prompts(4), jax.random.key(4)
    policy = scripted.policy(4, 5.0)
    run = engine(limits, Schedule(8, 2, 4))
    forest = jax.device_get(run(policy, batch, key)[0])
    order = np.random.default_rng(0).permutation(TREES)
    shuffled = jax.device_get(run(policy, jax.tree.map(lambda x: x[order], batch), key)[0])
    changed = dataclasses.replace(batch, tokens=batch.tokens.at[0, 0].set(scripted.TEXT.start))
    neighbour = jax.device_get(run(policy, changed, key)[0])
    assert not np.array_equal(take(forest, 0).tokens, take(neighbour, 0).tokens)
    for tree in range(TREES):
        assert_same(take(forest, int(order[tree])), take(shuffled, tree))
        if tree:
            for a, b in zip(jax.tree.leaves(take(forest, tree)), jax.tree.leaves(take(neighbour, tree)), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_change_no_token(devices):
    limits, batch, key = LIMITS["flat"], prompts(5), jax.random.key(5)
    policy = scripted.policy(5, 5.0)
    forest, _ = engine(limits, Schedule(8, 2, 4))(policy, batch, key)
    mesh = make_mesh(devices=jax.devices()[:devices])
    rollout = make_rollout(scripted.decode, scripted.init_cache, limits, Schedule(2, 1, 3), mesh)
    sharded, work = rollout(policy, batch, key)
    assert work.steps.shape == (devices,)
    assert_same(jax.device_get(forest), jax.device_get(sharded))


def test_batch_that_does_not_divide_is_refused():
    rollout = make_rollout(
        scripted.decode, scripted.init_cache, LIMITS["flat"], Schedule(2, 1, 3), make_mesh(devices=jax.devices()[:8])
    )
    with pytest.raises(ValueError, match="a batch of 12 trees must be a multiple of the mesh's 8 data shards"):
        rollout(scripted.policy(0, 1.0), prompts(0), jax.random.key(0))


def test_compiled_once_without_host_traffic():
    limits, policy = LIMITS["nested"], scripted.policy(6, 5.0)
    traces = 0

    def counted(*args, **kwargs):
        nonlocal traces
        traces += 1
        return tree_rollout(
            scripted.decode, scripted.init_cache, *args, limits=limits, schedule=Schedule(6, 2, 4), **kwargs
        )

    run = jax.jit(counted)
    batches = [jax.device_put((jnp.asarray(policy), prompts(seed), jax.random.key(seed))) for seed in range(4)]
    compiled = run.lower(*batches[0]).compile().as_text()
    assert "callback" not in compiled and "infeed" not in compiled and "outfeed" not in compiled
    traces = 0
    with jax.transfer_guard("disallow"):
        lengths = [run(*batch)[0].length for batch in batches]
    assert traces <= 1
    assert len({int(length.sum()) for length in lengths}) > 1


def test_prompt_must_leave_room():
    with pytest.raises(ValueError, match="prompts of up to 5 tokens must be at most limits.window - 1 = 4"):
        engine(Limits(5, 9, 2, 1), Schedule(1, 1, 1))(scripted.policy(0, 1.0), prompts(0), jax.random.key(0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 1}, "limits.window=1 must be at least 2"),
        ({"stream": 9}, "limits.stream=9 must be at least 10: at least window=10"),
        ({"children": 3}, "limits.children=3 must be at most limits.slots - 1 = 2"),
        ({"max_tokens": 0}, "limits.max_tokens=0 must be at least 1"),
    ],
)
def test_limits_that_cannot_work_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Limits(**({"window": 10, "stream": 12, "slots": 3, "children": 2} | values))
