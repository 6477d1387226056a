"""Nothing but a tree's own prompt, key and limits says what it becomes: no schedule, no batch, no
neighbour, no device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.harness import LIMITS, ODD, TREES, assert_same, engine, prompts, take

from apr_jax.check import scripted
from apr_jax.model.sharding import make_mesh
from apr_jax.threads import Prompts, Schedule, make_prompts, make_rollout, tree_rollout
from apr_jax.threads import protocol as p

NESTED = LIMITS["nested"]
POLICY = scripted.policy(0, 9.0)
KEY = jax.random.key(0)


@functools.cache
def expected():
    """One batch, decoded under the odd schedule; big enough that everything below would show."""
    forest = jax.device_get(engine(NESTED, ODD)(POLICY, prompts(0, NESTED), KEY)[0])
    assert forest.children.sum() > 50 and forest.depth.max() == 3 and forest.round.max() > 0
    return forest


def pick(batch: Prompts, trees) -> Prompts:
    return jax.tree.map(lambda field: field[np.asarray(trees)], batch)


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(Schedule(1, 1, 1), id="one decode slot", marks=pytest.mark.slow),
        pytest.param(
            Schedule(64, 16, 2), id="more decode slots than threads", marks=pytest.mark.thorough
        ),
        pytest.param(
            Schedule(8, 4, 16, context_buckets=(3, 6, 9, 12), small_batch_sizes=(1, 2, 5)),
            id="many buckets",
            marks=pytest.mark.thorough,
        ),
        pytest.param(Schedule(8, 4, 16), id="other slots, without buckets"),
    ],
)
def test_schedule_changes_no_token(schedule):
    assert_same(
        expected(), jax.device_get(engine(NESTED, schedule)(POLICY, prompts(0, NESTED), KEY)[0])
    )


@pytest.mark.thorough
def test_optimized_code_changes_no_token_either():
    """What LLVM makes of two schedules and of two orders of the trees, however `make test` compiles
    the rest.
    """

    def optimized(schedule, batch):
        program = engine(NESTED, schedule).lower(POLICY, batch, KEY)
        return jax.device_get(
            program.compile({"xla_backend_optimization_level": 3})(POLICY, batch, KEY)[0]
        )

    forest = optimized(ODD, prompts(0, NESTED))
    assert_same(forest, optimized(Schedule(8, 4, 16, context_buckets=(6, 12)), prompts(0, NESTED)))
    order = np.arange(TREES)[::-1]
    turned = optimized(ODD, pick(prompts(0, NESTED), order))
    for place, tree in enumerate(order):
        assert_same(take(forest, int(tree)), take(turned, place))


@pytest.mark.parametrize("size", [1, pytest.param(5, marks=pytest.mark.thorough)])
def test_a_tree_is_the_same_in_any_batch(size):
    batch = prompts(0, NESTED)
    for begin in range(0, TREES - size + 1, size):
        forest = jax.device_get(
            engine(NESTED, ODD)(POLICY, pick(batch, range(begin, begin + size)), KEY)[0]
        )
        for number in range(size):
            assert_same(take(expected(), begin + number), take(forest, number))


def test_order_of_the_batch_changes_no_token():
    order = np.random.default_rng(0).permutation(TREES)
    shuffled = jax.device_get(engine(NESTED, ODD)(POLICY, pick(prompts(0, NESTED), order), KEY)[0])
    for place, tree in enumerate(order):
        assert_same(take(expected(), int(tree)), take(shuffled, place))


@pytest.mark.parametrize(
    "devices",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4)),
        2,
        pytest.param(8, marks=pytest.mark.thorough),
    ],
)
def test_devices_change_no_token(devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    rollout = make_rollout(scripted.decode, scripted.init_cache, NESTED, ODD, mesh)
    sharded, work = rollout(POLICY, prompts(0, NESTED), KEY)
    assert work.steps.shape == (devices,)
    assert len(sharded.tokens.sharding.device_set) == devices
    assert_same(expected(), jax.device_get(sharded))


def test_another_prompt_leaves_every_other_tree_bit_for_bit():
    batch = prompts(0, NESTED)
    for tree in (0, 7):
        tokens = batch.tokens.copy()
        tokens[tree, 1] = scripted.TEXT.start + (tokens[tree, 1] + 1) % len(scripted.TEXT)
        length = batch.length.copy()
        length[tree] = 4
        changed = dataclasses.replace(batch, tokens=tokens, length=length)
        forest = jax.device_get(engine(NESTED, ODD)(POLICY, changed, KEY)[0])
        assert not np.array_equal(take(expected(), tree).tokens, take(forest, tree).tokens)
        for other in set(range(TREES)) - {tree}:
            assert_same(take(expected(), other), take(forest, other), bits=True)


@pytest.mark.parametrize(
    "change", [{"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}, {"children": 3}]
)
def test_another_setting_leaves_every_other_tree_bit_for_bit(change):
    """One tree of a plain batch is sampled otherwise: `draw` has branches that only such a batch
    takes.
    """
    ids = [[p.BOS, 10 + number % 4] for number in range(TREES)]
    plain = make_prompts(ids, width=5, temperature=1.0)
    one = {
        name: [value] + [getattr(plain, name)[1].item()] * (TREES - 1)
        for name, value in change.items()
    }
    mixed = make_prompts(ids, width=5, **({"temperature": 1.0} | one))
    before, after = (
        jax.device_get(engine(NESTED, ODD)(POLICY, batch, KEY)[0]) for batch in (plain, mixed)
    )
    assert not np.array_equal(before.logprob[0], after.logprob[0])
    for other in range(1, TREES):
        assert_same(take(before, other), take(after, other), bits=True)


def test_key_follows_tree_identity_and_not_place():
    ids = [[p.BOS, 10]] * TREES
    forest = jax.device_get(
        engine(NESTED, ODD)(
            POLICY, make_prompts(ids, 5, tree=[5] * (TREES - 1) + [6], temperature=1.0), KEY
        )[0]
    )
    for number in range(1, TREES - 1):
        assert_same(take(forest, 0), take(forest, number), bits=True)
    assert not np.array_equal(forest.tokens[0], forest.tokens[-1])


def test_compiled_once_without_host_traffic():
    """One program for any mixture of trees, without a transfer or a call to the host while it
    runs.
    """
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return tree_rollout(
            scripted.decode, scripted.init_cache, *args, limits=NESTED, schedule=ODD
        )

    run = jax.jit(counted)
    batches = [
        jax.device_put(
            (
                jnp.asarray(scripted.policy(seed, 3.0 * seed)),
                prompts(seed, NESTED),
                jax.random.key(seed),
            )
        )
        for seed in range(4)
    ]
    program = run.lower(*batches[0]).compile().as_text()
    for word in ("callback", "infeed", "outfeed", "send(", "recv("):
        assert word not in program
    with jax.transfer_guard("disallow"):
        forests = [run(*batch)[0] for batch in batches]
    assert traces == 1
    assert len({int(forest.total_tokens.sum()) for forest in forests}) == 4


@pytest.mark.thorough
@pytest.mark.parametrize("devices", [8])
def test_shards_say_nothing_to_each_other(devices):
    mesh = make_mesh(devices=jax.devices()[:devices])
    rollout = make_rollout(scripted.decode, scripted.init_cache, NESTED, ODD, mesh)
    program = rollout.lower(POLICY, prompts(0, NESTED), KEY).compile().as_text()
    for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert word not in program


@pytest.mark.thorough
def test_slots_stay_full():
    """Few decode slots for many trees of very different size: a decode slot that its thread leaves
    is taken by the next one at once.
    """
    schedule = Schedule(slots=6, prefill_batch=1, prefill_chunk=4)
    batch = prompts(7, NESTED, trees=96)
    forest, work = jax.device_get(engine(NESTED, schedule)(scripted.policy(7, 9.0), batch, KEY))
    assert forest.children.max() > 10 and forest.children.min() == 0
    assert work.live == forest.total_tokens.sum()
    assert work.live / (work.steps * schedule.slots) >= 0.85
