"""Unfinished trees go on in the next call: they become what they would have become in one.

Trees are suspended wherever their threads stand when others have finished: while thinking, within
spawn blocks and answers, waiting for children.
"""

import collections
import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from helpers.harness import LIMITS, MANNERS, ODD, assert_same, engine, prompts, take
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apr_jax.check import scripted
from apr_jax.model.sharding import make_mesh
from apr_jax.threads import (
    CarryOver,
    Schedule,
    Status,
    carry_over_rollout,
    interpret,
    make_carry_over_rollout,
    make_prompts,
    new_trees,
    place_new_trees,
)
from apr_jax.threads import protocol as p

GROUP = 2
GROUPS = 4  # That a call begins, returns, and leaves to the next one.
TREES = GROUP * GROUPS
CALLS = 6
WIDE = Schedule(slots=64, prefill_batch=16, prefill_chunk=2)  # A decode slot for every thread.


@functools.cache
def carrying(limits, schedule, max_staleness):
    return jax.jit(
        functools.partial(
            carry_over_rollout,
            scripted.decode,
            scripted.init_cache,
            limits=limits,
            schedule=schedule,
            carry_over=CarryOver(GROUP, max_staleness),
        )
    )


def batch_of(seed, call, limits):
    """Prompts and key of the trees that begin in a call; call -1 stands for those before it."""
    number = 100 * seed + call + 1
    return prompts(number, limits, TREES), jax.random.key(number)


def calls_of(rollout, policies, seed, limits, calls=CALLS):
    """What each call returned, left and cost, on the host."""
    carried = new_trees(*batch_of(seed, -1, limits), np.int32(0), limits)
    for call in range(calls):
        batch, key = batch_of(seed, call, limits)
        grown, carried, work = rollout(policies[call], carried, batch, key, np.int32(call))
        yield types.SimpleNamespace(**jax.device_get(vars(grown) | {"left": carried, "work": work}))


def places(left, limits):
    """Where the threads of carried trees stand, in words, and how often."""
    threads = types.SimpleNamespace(**left.threads)
    suspended = (threads.status == Status.READY) & (threads.length > threads.prompt_length)
    newest = np.take_along_axis(threads.tokens, np.maximum(threads.length - 1, 0)[:, None], 1)[:, 0]
    joined = newest == p.END_JOINED
    seen = collections.Counter()
    for phase, name in enumerate(("thinking", "opened", "in a message", "in an answer")):
        seen[name] = int(np.sum(suspended & ~joined & (threads.phase == phase)))
    seen["joined"] = int(np.sum(suspended & joined))
    seen["unread"] = int(np.sum((threads.status == Status.READY) & ~suspended))
    seen["waiting"] = int(np.sum(threads.status == Status.WAITING))
    seen["finished"] = int(np.sum(threads.status[:: limits.max_threads] >= Status.DONE))
    return seen


def compare_with_interpreter(name, seed, manners, schedule=ODD, max_staleness=2):
    limits = LIMITS[name]
    policy = scripted.policy(seed, manners)
    rollout = carrying(limits, schedule, max_staleness)
    seen: collections.Counter = collections.Counter()
    for call, got in enumerate(calls_of(rollout, [policy] * CALLS, seed, limits)):
        for number in range(TREES):
            begun = got.tree[number] // 1000  # `prompts` counts identities from 1000 x its seed.
            batch, key = batch_of(seed, begun - 100 * seed - 1, limits)
            (place,) = np.flatnonzero(batch.tree == got.tree[number])
            expected = interpret(scripted.logits_of(policy), batch, int(place), key, limits)
            assert_same(take(got.forest, number), expected, f"{name} {seed} {manners} call {call}")
        seen += places(got.left, limits)
        seen["several versions"] += int(several_versions(got).sum())
    return seen


def several_versions(got):
    """Trees of which policies of several calls drew tokens."""
    sampled = got.forest.sampled
    lowest = np.where(sampled, got.version, CALLS).min(axis=(1, 2))
    return lowest < got.version.max(axis=(1, 2))


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**14), manners=st.sampled_from(MANNERS))
def test_carried_trees_equal_the_interpreters(seed, manners):
    compare_with_interpreter("nested", seed, manners)


@pytest.mark.thorough
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(LIMITS)),
    seed=st.integers(0, 2**14),
    manners=st.sampled_from(MANNERS),
)
def test_carried_trees_equal_the_interpreters_under_all_limits(name, seed, manners):
    compare_with_interpreter(name, seed, manners)


@pytest.mark.thorough
def test_threads_are_suspended_at_every_place():
    seen: collections.Counter = collections.Counter()
    for seed in range(4):
        seen += compare_with_interpreter("nested", seed, 9.0, WIDE, max_staleness=1)
    wanted = "thinking", "opened", "in a message", "in an answer", "joined", "unread", "waiting"
    wanted += "finished", "several versions"
    assert {name: seen[name] for name in wanted if seen[name] < 3} == {}


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(Schedule(1, 1, 1), id="one decode slot", marks=pytest.mark.thorough),
        pytest.param(WIDE, id="more decode slots than threads"),
        pytest.param(
            Schedule(8, 4, 16, context_buckets=(3, 6, 9, 12), small_batch_sizes=(1, 2, 5)),
            id="many buckets",
            marks=pytest.mark.thorough,
        ),
    ],
)
@pytest.mark.parametrize("max_staleness", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_carried_trees_equal_uninterrupted_ones_on_any_schedule(schedule, max_staleness):
    limits = LIMITS["nested"]
    policy = scripted.policy(1, 9.0)
    whole = {}
    for call in range(-1, CALLS):
        batch, key = batch_of(1, call, limits)
        forest = jax.device_get(engine(limits, ODD)(policy, batch, key)[0])
        whole |= {int(tree): take(forest, place) for place, tree in enumerate(batch.tree)}

    returned = []
    carried = 0
    for got in calls_of(carrying(limits, schedule, max_staleness), [policy] * CALLS, 1, limits):
        for number, tree in enumerate(got.tree.tolist()):
            assert_same(take(got.forest, number), whole[tree], bits=True)
        returned += got.tree.tolist()
        carried += several_versions(got).sum()
    assert len(set(returned)) == len(returned) == CALLS * TREES
    # On one decode slot, trees are decoded one after the other.
    assert carried > 3 or schedule.slots == 1


@functools.cache
def changing():
    """Calls with a policy that changes each time, and the policies."""
    limits = LIMITS["nested"]
    policies = [scripted.policy(call, 9.0) for call in range(CALLS)]
    carried = new_trees(*plain_batch(-1), np.int32(0), limits)
    calls = []
    for call in range(CALLS):
        grown, carried, _ = carrying(limits, ODD, 2)(
            policies[call], carried, *plain_batch(call), np.int32(call)
        )
        calls.append(jax.device_get(grown))
    return calls, policies


def plain_batch(call):
    ids = [[p.BOS, 10 + number % 4] for number in range(TREES)]
    tree = np.arange(TREES) + TREES * (call + 1)
    return make_prompts(ids, 5, tree=tree.tolist(), temperature=1.0), jax.random.key(call + 1)


def test_each_token_has_the_version_that_drew_it():
    """Its log-prob is that of this policy, which sees all that the thread sees, whoever drew it."""
    calls, policies = changing()
    looks = [scripted.logits_of(policy) for policy in policies]
    versions: collections.Counter = collections.Counter()
    for call, grown in enumerate(calls):
        forest = grown.forest
        for place in np.argwhere(forest.sampled).tolist():
            tree, thread, column = place
            block = forest.hidden_block[tree, thread, : column + 1]
            seen = forest.tokens[tree, thread, :column][
                (block[:-1] == 0) | (block[:-1] == block[-1])
            ]
            version = grown.version[tuple(place)]
            logits = looks[version](seen.tolist()).astype(np.float64)
            logprob = logits[forest.tokens[tuple(place)]] - np.logaddexp.reduce(logits)
            assert forest.logprob[tuple(place)] == pytest.approx(logprob, abs=1e-5)
            versions[call - int(version)] += 1
        assert not grown.version[~forest.sampled].any()
    assert versions[0] > 20 < versions[1] and max(versions) <= 2, versions


def test_no_tree_is_older_than_the_bound():
    calls, _ = changing()
    ages = [call - grown.begun for call, grown in enumerate(calls)]
    assert np.max(ages) == 2
    for call, grown in enumerate(calls):
        sampled = grown.forest.sampled
        assert (grown.version <= call).all()
        assert (grown.version >= grown.begun[:, None, None])[sampled].all()


def test_groups_are_returned_whole():
    calls, _ = changing()
    for grown in calls:
        assert (grown.forest.status[:, 0] >= Status.DONE).all()
        first, second = grown.tree[::GROUP], grown.tree[1::GROUP]
        assert (first % GROUP == 0).all() and (second == first + 1).all()


def test_groups_in_any_order_are_returned_by_age():
    """As where the groups of two shards go on in one: those of the second stand behind."""
    limits = LIMITS["nested"]
    rollout = carrying(limits, WIDE, 2)
    policy = scripted.policy(0, 9.0)
    carried = new_trees(*plain_batch(-1), np.int32(0), limits)
    for call in range(2):
        _, carried, _ = rollout(policy, carried, *plain_batch(call), np.int32(call))
    carried = jax.device_get(carried)
    assert len(set(carried.begun)) > 1, "of one age, any order would do"
    expected = jax.device_get(rollout(policy, carried, *plain_batch(2), np.int32(2)))

    def turned(leaf):
        return leaf.reshape(GROUPS, -1, *leaf.shape[1:])[::-1].reshape(leaf.shape)

    other_order = jax.tree.map(turned, carried)
    grown, left, _ = jax.device_get(rollout(policy, other_order, *plain_batch(2), np.int32(2)))
    assert sorted(grown.begun) == sorted(expected[0].begun)
    assert left.begun.tolist() == sorted(left.begun)


@pytest.mark.thorough
@pytest.mark.parametrize("devices", [2])
def test_each_shard_carries_its_own_trees(devices):
    limits = LIMITS["nested"]
    policy = scripted.policy(0, 9.0)
    mesh = make_mesh(devices=jax.devices()[:devices])
    rollout = make_carry_over_rollout(
        scripted.decode, scripted.init_cache, limits, ODD, CarryOver(GROUP, 2), mesh
    )
    carried = place_new_trees(*plain_batch(-1), limits, mesh)
    for call in range(3):
        grown, carried, work = rollout(policy, carried, *plain_batch(call), call)
        assert work.steps.shape == (devices,)
        for number, tree in enumerate(grown.tree.tolist()):
            batch, key = plain_batch(tree // TREES - 1)
            expected = interpret(scripted.logits_of(policy), batch, tree % TREES, key, limits)
            assert_same(take(grown.forest, number), expected)

    # What is left may go on with another number of shards.
    alone = jax.device_get(carried)
    grown, _, _ = carrying(limits, ODD, 2)(policy, alone, *plain_batch(3), np.int32(3))
    for number, tree in enumerate(grown.tree.tolist()):
        batch, key = plain_batch(tree // TREES - 1)
        expected = interpret(scripted.logits_of(policy), batch, tree % TREES, key, limits)
        assert_same(take(grown.forest, number), expected)


@pytest.mark.parametrize(
    ("group", "copies", "words"),
    [
        (3, 1, "8 trees must be a multiple of 3, a group"),
        (GROUP, 2, "8 carried groups must be at most 4"),
    ],
)
def test_groups_that_do_not_fit_are_refused(group, copies, words):
    limits = LIMITS["flat"]
    batch, key = plain_batch(0)
    carried = new_trees(*plain_batch(-1), np.int32(0), limits)
    carried = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[carried] * copies)
    with pytest.raises(ValueError, match=words):
        carry_over_rollout(
            scripted.decode,
            scripted.init_cache,
            scripted.policy(0, 9.0),
            carried,
            batch,
            key,
            np.int32(0),
            limits,
            ODD,
            CarryOver(group, 1),
        )


@pytest.mark.parametrize("field", ["group", "max_staleness"])
def test_settings_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"carry over.{field}=0 must be at least 1"):
        dataclasses.replace(CarryOver(1, 1), **{field: 0})
