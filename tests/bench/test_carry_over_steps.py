"""Counted decode steps are those that the engine takes."""

import functools

import jax
import numpy as np
from helpers.harness import LIMITS, engine, prompts

from apr_jax.bench.carry_over import (
    RecordedThread,
    StepCost,
    decode_steps,
    recorded_trees,
)
from apr_jax.check import scripted
from apr_jax.threads import CarryOver, Schedule, carry_over_rollout, new_trees

NESTED = LIMITS["nested"]
SCHEDULE = Schedule(slots=5, prefill_batch=1, prefill_chunk=4)
POLICY = scripted.policy(3, 9.0)
GROUP = 2
TREES = 8
CALLS = 5


def batch(call):
    return prompts(call + 1, NESTED, TREES), jax.random.key(call + 1)


@functools.cache
def whole(call):
    return jax.device_get(engine(NESTED, SCHEDULE)(POLICY, *batch(call)))


def groups():
    """Those of call -1, which are carried into the first call, then those of each call."""
    for call in range(-1, CALLS):
        trees = recorded_trees(whole(call)[0])
        yield from (trees[first : first + GROUP] for first in range(0, TREES, GROUP))


def test_steps_that_finish_their_trees_are_counted():
    counted = list(decode_steps(groups(), TREES // GROUP, 0, SCHEDULE.slots, 1))
    taken = [whole(call) for call in range(-1, CALLS)]
    assert [cost.decode_steps for cost in counted] == [work.steps for _, work in taken]
    assert [cost.tokens for cost in counted] == [work.live for _, work in taken]
    assert {(cost.suspended, cost.staleness) for cost in counted} == {(0, 0)}


def test_steps_that_carry_trees_over_are_counted():
    rollout = jax.jit(
        functools.partial(
            carry_over_rollout,
            scripted.decode,
            scripted.init_cache,
            limits=NESTED,
            schedule=SCHEDULE,
            carry_over=CarryOver(GROUP, 2),
        )
    )
    carried = new_trees(*batch(-1), np.int32(0), NESTED)
    count = TREES // GROUP
    for call, cost in enumerate(decode_steps(groups(), count, count, SCHEDULE.slots, 2)):
        grown, carried, work = rollout(POLICY, carried, *batch(call), np.int32(call))
        assert (cost.decode_steps, cost.tokens) == (work.steps, work.live)
        assert cost.staleness == call - grown.begun.min()
    assert call == CALLS - 1


def test_steps_are_counted_by_hand():
    """One tree a group, one thread a tree: of 10, 2, 3 and 4 tokens, the first one carried in."""
    alone = [[{0: RecordedThread((tokens,), ())}] for tokens in (10, 2, 3, 4)]
    assert list(decode_steps(alone, returned=1, carried=1, slots=10, max_staleness=1)) == [
        StepCost(decode_steps=2, tokens=4, suspended=1, staleness=0),
        # The carried tree is due; the one of 3 tokens ends meanwhile.
        StepCost(decode_steps=8, tokens=8 + 3, suspended=0, staleness=1),
        # It is there at once.
        StepCost(decode_steps=0, tokens=0, suspended=0, staleness=1),
    ]
    (first, *_) = decode_steps(alone, returned=1, carried=1, slots=1, max_staleness=1)
    assert first.decode_steps == 10, "the older tree has the only decode slot"
    waiting = decode_steps(alone, returned=2, carried=0, slots=10, max_staleness=1)
    assert [cost.decode_steps for cost in waiting] == [10, 4]
