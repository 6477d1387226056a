"""The device engine against the reference interpreter, in every field, on good and bad threads."""

import collections

import jax
import numpy as np
import pytest
from helpers.harness import (
    CONSTRAINED,
    LIMITS,
    MANNERS,
    ODD,
    PECULIAR,
    assert_kept_the_protocol,
    compare,
    engine,
    prompts,
)
from helpers.outcomes import CASES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apr_jax.check import scripted
from apr_jax.threads import Schedule, Status


def any_policy(limits):
    """Random policies under these limits; each of them takes seconds to compile."""
    return given(
        name=st.sampled_from(sorted(limits)),
        seed=st.integers(0, 2**20),
        manners=st.sampled_from(MANNERS),
    )


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@any_policy(["nested", "few tokens, constrained"])
def test_engine_equals_reference_on_random_policies(name, seed, manners):
    compare(name, seed, manners)


@pytest.mark.thorough
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@any_policy(LIMITS)
def test_engine_equals_reference_under_all_limits(name, seed, manners):
    compare(name, seed, manners)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@any_policy(LIMITS)
def test_engine_equals_reference_on_many_random_policies(name, seed, manners):
    compare(name, seed, manners)


@pytest.mark.thorough
def test_one_slot_does_all():
    """The least schedule: one decode slot, a prefill batch of one thread, chunks of one token."""
    least = Schedule(slots=1, prefill_batch=1, prefill_chunk=1)
    assert compare("nested", 0, 9.0, least)["threads"] > 100


@pytest.mark.thorough
@pytest.mark.parametrize("name", CONSTRAINED)
def test_constrained_rollouts_keep_the_protocol(name):
    """No thread is malformed, no message is refused, and forced children are made exactly.

    The policies write control pieces anywhere.
    """
    threads = 0
    exact = 0
    for seed in range(60):
        batch = prompts(seed, LIMITS[name])
        forest, _ = jax.device_get(
            engine(LIMITS[name], ODD)(scripted.policy(seed, 0.0), batch, jax.random.key(seed))
        )
        assert_kept_the_protocol(forest)
        ends = (batch.children >= 0) & (forest.status[:, 0] == Status.DONE)
        made = np.sum(forest.parent == 0, axis=1)
        np.testing.assert_array_equal(made[ends], batch.children[ends])
        threads += int((forest.status != Status.FREE).sum())
        exact += int((ends & (made > 0)).sum())
    assert threads > 1_500 and exact > 10, (threads, exact)


def all_outcomes(tokens: int, first_seed: int) -> collections.Counter:
    """Compares batches under all limits and manners until so many tokens were sampled."""
    seen: collections.Counter = collections.Counter()
    seed = first_seed
    while seen["tokens"] < tokens:
        for name in LIMITS:
            seen += compare(name, seed, MANNERS[seed % len(MANNERS)])
        seed += 1
    print(
        f"\n{seen['threads']:,} threads, {seen['tokens']:,} sampled tokens, all fields of all trees"
        " agree"
    )
    for case in (*CASES, *PECULIAR):
        print(f"{seen[case]:>9,}  {case}")
    return seen


@pytest.mark.thorough
def test_every_outcome_comes_up_and_agrees():
    seen = all_outcomes(40_000, first_seed=0)
    assert seen["threads"] > 4_000
    assert {case: seen[case] for case in (*CASES, *PECULIAR) if seen[case] < 3} == {}


@pytest.mark.slow
def test_a_million_tokens_agree():
    seen = all_outcomes(1_000_000, first_seed=10_000)
    assert {case: seen[case] for case in (*CASES, *PECULIAR) if seen[case] < 100} == {}


def test_protocol_page_is_read_whole():
    """Cases come from the tables of docs/protocol.md; a lost row would silently test less."""
    token_outcomes = 9 * 4
    limits_reached = 4 * 6 - 1  # One cell says "never".
    two_at_once = 3
    causes_of_refusal = 5
    forced_children_not_made = 1
    expected = (
        token_outcomes + limits_reached + two_at_once + causes_of_refusal + forced_children_not_made
    )
    assert len(set(CASES)) == len(CASES) == expected
