"""Limits, schedules and prompts that cannot work are refused before anything runs, with field,
value and rule.
"""

import re

import jax
import pytest
from helpers.harness import LIMITS, ODD, engine, prompts

from apr_jax.check import scripted
from apr_jax.model.sharding import make_mesh
from apr_jax.threads import Limits, Schedule, check_prompts, make_prompts, make_rollout
from apr_jax.threads import protocol as p

GOOD = {"window": 10, "max_thread_tokens": 12, "max_threads": 3, "children": 2}
A = 10


def refuses(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 1}, "limits.window=1 must be at least 2: a prompt and one token must fit"),
        (
            {"max_thread_tokens": 9},
            "limits.max_thread_tokens=9 must be at least 10: at least window=10",
        ),
        (
            {"max_threads": 0},
            "limits.max_threads=0 must be at least 1: the root is a thread",
        ),
        ({"children": 0}, "limits.children=0 must be at least 1: a spawn makes at least one child"),
        (
            {"children": 3},
            (
                "limits.children=3 must be at most limits.max_threads - 1 = 2: every child of a"
                " spawn is a thread, and so is the root"
            ),
        ),
        (
            {"max_depth": -1},
            "limits.max_depth=-1 must be at least 0: 0 means that no thread may spawn",
        ),
        ({"max_tokens": 0}, "limits.max_tokens=0 must be at least 1: a tree needs a token"),
        ({"max_sequential": 0}, "limits.max_sequential=0 must be at least 1: a tree needs a token"),
    ],
)
def test_limits_that_cannot_work(values, message):
    Limits(**GOOD)
    with refuses(message):
        Limits(**(GOOD | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slots": 0, "prefill_batch": 0}, "schedule.slots=0 must be at least 1"),
        ({"prefill_batch": 0}, "schedule.prefill_batch=0 must be at least 1"),
        ({"prefill_chunk": 0}, "schedule.prefill_chunk=0 must be at least 1"),
        (
            {"slots": 2, "prefill_batch": 3},
            "schedule.prefill_batch=3 must be at most schedule.slots=2",
        ),
        (
            {"context_buckets": (8, 8)},
            "schedule.context_buckets=(8, 8) must be positive and increasing",
        ),
        (
            {"context_buckets": (0, 8)},
            "schedule.context_buckets=(0, 8) must be positive and increasing",
        ),
        (
            {"small_batch_sizes": (4, 2)},
            "schedule.small_batch_sizes=(4, 2) must be positive and increasing",
        ),
        (
            {"small_batch_sizes": (64,)},
            (
                "schedule.small_batch_sizes=(64,) must be below schedule.slots=64: they are some of"
                " the decode slots"
            ),
        ),
    ],
)
def test_schedules_that_cannot_work(values, message):
    with refuses(message):
        Schedule(**values)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[p.BOS], []], "prompt 1: starts with [], but must start with <bos>"),
        ([[A]], "prompt 0: starts with [10], but must start with <bos>"),
        ([[p.BOS, A, A, A]], "prompt 0: has 4 tokens, more than width=3"),
        (
            [[p.BOS], [p.BOS, A, p.UNK]],
            "prompt 1: has <unk> at place 2; only text may follow <bos>",
        ),
        ([[p.BOS, p.SPAWN]], "prompt 0: has <spawn> at place 1; only text may follow <bos>"),
        ([[p.BOS, p.BOS]], "prompt 0: has <bos> at place 1; only text may follow <bos>"),
        ([[p.BOS, -3]], "prompt 0: has -3 at place 1; only text may follow <bos>"),
    ],
)
def test_prompts_that_are_none(ids, message):
    with refuses(message):
        make_prompts(ids, width=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"temperature": [1.0, -0.5]},
            "prompt 1: temperature=-0.5 must be 0 (greedy) or at least 1e-06",
        ),
        (
            {"temperature": 1e-40},
            "prompt 0: temperature=1e-40 must be 0 (greedy) or at least 1e-06",
        ),
        (
            {"temperature": float("nan")},
            "prompt 0: temperature=nan must be 0 (greedy) or at least 1e-06",
        ),
        ({"top_k": -1}, "prompt 0: top_k=-1 must be from 0 (all tokens) to 2147483647"),
        (
            {"top_k": 10**11},
            "prompt 0: top_k=100000000000 must be from 0 (all tokens) to 2147483647",
        ),
        ({"top_k": 1.5}, "prompt 0: top_k=1.5 must be a whole number"),
        ({"top_p": 0.0}, "prompt 0: top_p=0.0 must be at least 1e-06 and at most 1"),
        ({"top_p": [1.0, 1.5]}, "prompt 1: top_p=1.5 must be at least 1e-06 and at most 1"),
        (
            {"children": [0, -2]},
            "prompt 1: children=-2 must be from 0 to 2147483647, or NOT_FORCED",
        ),
        (
            {"tree": [0, 2**40]},
            "prompt 1: tree=1099511627776 must be from -2147483647 to 2147483647",
        ),
        (
            {"tree": [0, 1, 2]},
            "tree: has shape (3,) for 2 prompts; give one value, or one a prompt",
        ),
        (
            {"children": [1]},
            "children: has shape (1,) for 2 prompts; give one value, or one a prompt",
        ),
    ],
)
def test_settings_that_cannot_be_used(values, message):
    with refuses(message):
        make_prompts([[p.BOS], [p.BOS, A]], width=3, **values)


def test_prompts_that_the_limits_cannot_hold():
    limits, flat = Limits(**GOOD), Limits(**(GOOD | {"max_depth": 0}))
    long = make_prompts([[p.BOS], [p.BOS] + [A] * 9], width=10)
    check_prompts(make_prompts([[p.BOS] + [A] * 8], width=10, children=2), limits)
    with refuses("prompt 1: has 10 tokens; limits.window=10 must leave room for one more"):
        check_prompts(long, limits)
    with refuses(
        "prompt 1: children=3 must be at most 2: limits.max_threads=3, limits.max_depth=1"
    ):
        check_prompts(make_prompts([[p.BOS]] * 2, width=3, children=[2, 3]), limits)
    with refuses(
        "prompt 0: children=1 must be at most 0: limits.max_threads=3, limits.max_depth=0"
    ):
        check_prompts(make_prompts([[p.BOS]], width=3, children=1), flat)
    with refuses("prompts: there are none; a rollout needs at least one tree"):
        check_prompts(make_prompts([], width=3), limits)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            jax.random.key(0, impl="rbg"),
            "key: is rbg; make it with jax.random.key(seed, impl='threefry2x32')",
        ),
        (
            jax.random.PRNGKey(0),
            "key: is of type uint32; make it with jax.random.key(seed, impl='threefry2x32')",
        ),
    ],
)
def test_keys_of_another_kind_are_refused(key, message):
    limits = LIMITS["flat"]
    with refuses(message):
        engine(limits, ODD)(scripted.policy(0, 1.0), prompts(0, limits), key)


@pytest.mark.parametrize("value", [2.5, 2**31])
def test_limits_are_whole_numbers_of_32_bits(value):
    with pytest.raises(ValueError, match=f"limits.max_tokens={value} must be at"):
        Limits(**(GOOD | {"max_tokens": value}))


def test_engine_refuses_what_it_sees_from_shapes():
    with refuses("prompts of up to 5 tokens must be at most limits.window - 1 = 4 tokens"):
        engine(Limits(5, 9, 2, 1), Schedule(1, 1, 1))(
            scripted.policy(0, 1.0), prompts(0, LIMITS["flat"]), jax.random.key(0)
        )
    rollout = make_rollout(
        scripted.decode,
        scripted.init_cache,
        LIMITS["flat"],
        ODD,
        make_mesh(devices=jax.devices()[:8]),
    )
    with refuses("a batch of 12 trees must be a multiple of the mesh's 8 data shards"):
        rollout(scripted.policy(0, 1.0), prompts(0, LIMITS["flat"], trees=12), jax.random.key(0))


@pytest.mark.thorough
def test_forced_children_beyond_the_slots_still_end():
    """Who skips `check_prompts` gets no crash and no endless loop: the root runs into its
    window.
    """
    limits = LIMITS["childless"]
    batch = make_prompts([[p.BOS, A]] * 16, width=5, temperature=1.0, children=3)
    forest = engine(limits, ODD)(scripted.policy(1, 9.0), batch, jax.random.key(0))[0]
    assert int(forest.children.sum()) == 0
