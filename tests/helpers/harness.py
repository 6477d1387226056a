"""Batches for the engine and for the interpreter, and the comparison of what they record."""

import collections
import dataclasses
import functools

import jax
import numpy as np

from apr_jax.check import scripted
from apr_jax.check.engine import differing_fields, prompts
from apr_jax.threads import Limits, Schedule, Status, ThreadForest, interpret, tree_rollout
from apr_jax.threads import protocol as p
from helpers import outcomes

TREES = 16
FREE = {
    "flat": Limits(window=24, max_thread_tokens=40, max_threads=5, children=3, max_depth=1),
    "nested": Limits(window=26, max_thread_tokens=44, max_threads=16, children=4, max_depth=3),
    "few tokens": Limits(
        window=18, max_thread_tokens=36, max_threads=9, children=2, max_depth=2, max_tokens=24
    ),
    "short chain": Limits(
        window=9, max_thread_tokens=13, max_threads=9, children=3, max_depth=2, max_sequential=8
    ),
    "short stream": Limits(window=16, max_thread_tokens=18, max_threads=9, children=2, max_depth=2),
    "childless": Limits(window=12, max_thread_tokens=14, max_threads=1, children=1, max_depth=0),
}
CONSTRAINED = {
    f"{name}, constrained": dataclasses.replace(FREE[name], constrain=True)
    for name in ("nested", "few tokens")
}
LIMITS = FREE | CONSTRAINED
# Fewer decode slots than a spawn may have children, a still smaller prefill batch, chunks that
# divide nothing, buckets of length and of decode slots.
ODD = Schedule(
    slots=3, prefill_batch=2, prefill_chunk=3, context_buckets=(5, 11), small_batch_sizes=(2,)
)
MANNERS = (0.0, 2.0, 5.0, 9.0)


@functools.cache
def engine(limits: Limits, schedule: Schedule):
    return jax.jit(
        functools.partial(
            tree_rollout, scripted.decode, scripted.init_cache, limits=limits, schedule=schedule
        )
    )


def take(forest: ThreadForest, tree: int) -> ThreadForest:
    return jax.tree.map(lambda field: np.asarray(field[tree]), forest)


def assert_same(
    left: ThreadForest, right: ThreadForest, what: str = "", bits: bool = False
) -> None:
    """Every field is the same; log-probs to 1e-5, or to the bit."""
    fields = differing_fields(left, right, 0.0 if bits else 1e-5)
    assert not fields, (
        what,
        *((name, getattr(left, name), getattr(right, name)) for name in fields),
    )


def compare(name: str, seed: int, manners: float, schedule: Schedule = ODD) -> collections.Counter:
    """Both implementations on one batch; returns how often each outcome and each peculiarity came
    up.
    """
    limits = LIMITS[name]
    batch = prompts(seed, limits, TREES)
    key = jax.random.key(seed)
    policy = scripted.policy(seed, manners)
    forest, work = jax.device_get(engine(limits, schedule)(policy, batch, key))
    assert work.live == forest.total_tokens.sum()
    assert work.steps <= work.live <= work.steps * schedule.slots
    seen: collections.Counter = collections.Counter()
    for number in range(TREES):
        tree = take(forest, number)
        expected = interpret(scripted.logits_of(policy), batch, number, key, limits)
        assert_same(tree, expected, f"{name} seed {seed} manners {manners} tree {number}")
        seen += outcomes.outcomes(tree, limits, int(batch.children[number]))
        seen += peculiarities(tree, schedule)
        if limits.constrain:
            assert_kept_the_protocol(tree)
    sizes = forest.total_tokens
    seen["batches with trees of very different size"] += int(sizes.max() >= 10 * sizes.min())
    return seen


PECULIAR = (
    "threads",
    "tokens",
    "several spawns of a thread",
    "threads at depth 3",
    "more children than decode slots",
    "children that end in their first token",
    "roots that never spawn",
    "empty messages",
    "batches with trees of very different size",
)


def peculiarities(tree: ThreadForest, schedule: Schedule) -> collections.Counter:
    used = tree.status != Status.FREE
    child = used & (tree.depth > 0)
    return collections.Counter(
        {
            "threads": int(used.sum()),
            "tokens": int(tree.total_tokens),
            "several spawns of a thread": len(
                {int(parent) for parent in tree.parent[child & (tree.round > 0)]}
            ),
            "threads at depth 3": int((tree.depth == 3).sum()),
            "more children than decode slots": int((tree.child >= schedule.slots).sum()),
            "children that end in their first token": int(
                (child & (tree.end == tree.start + 1)).sum()
            ),
            "roots that never spawn": int(p.SPAWN not in tree.tokens[0]),
            "empty messages": int((child & (tree.sampled.argmax(axis=1) == 1)).sum()),
        }
    )


def assert_kept_the_protocol(tree: ThreadForest) -> None:
    """What `Limits.constrain` promises."""
    assert not np.isin(tree.status, (Status.MALFORMED, Status.NO_ANSWER)).any(), tree.status
    assert not tree.refusals.any(), tree.refusals
