"""The device engine against the reference interpreter, on random streams.

The engine decodes trees on all devices of this process; the interpreter runs each tree again, one
thread at a time and without a cache. They must agree in every field (docs/protocol.md).
"""

import dataclasses
import zlib

import jax
import numpy as np

from apr_jax.check import scripted
from apr_jax.check.findings import Finding
from apr_jax.model.sharding import make_mesh
from apr_jax.threads import (
    NOT_FORCED,
    Limits,
    Prompts,
    Schedule,
    Status,
    ThreadForest,
    interpret,
    make_prompts,
    make_rollout,
)
from apr_jax.threads import protocol as p

_LIMITS = Limits(window=26, max_thread_tokens=44, max_threads=16, children=4, max_depth=3)
# Fewer decode slots than a spawn may have children, fewer still prefilled at once, chunks that
# divide nothing, and two cache lengths.
_SCHEDULE = Schedule(slots=3, prefill_batch=2, prefill_chunk=3, context_buckets=(11,))
TREES = 16
# Whether rollouts are constrained -> manners of the policies that are followed.
_MANNERS = {False: (0.0, 5.0, 9.0), True: (0.0,)}
_TOLERANCE = 1e-5  # Of log-probs.


def check_engine() -> Finding:
    """Compares engine and interpreter on trees of every manner."""
    mesh = make_mesh(devices=jax.local_devices())
    trees = -(-TREES // mesh.size) * mesh.size
    threads = 0
    tokens = 0
    checksum = 0
    for constrain, all_manners in _MANNERS.items():
        limits = dataclasses.replace(_LIMITS, constrain=constrain)
        rollout = make_rollout(scripted.decode, scripted.init_cache, limits, _SCHEDULE, mesh)
        for seed, manners in enumerate(all_manners):
            policy = scripted.policy(seed, manners)
            batch = prompts(seed, limits, trees)
            key = jax.random.key(seed)
            forest, _ = jax.device_get(rollout(policy, batch, key))
            look_up = scripted.logits_of(policy)
            for number in range(trees):
                tree = jax.tree.map(lambda field, number=number: field[number], forest)
                expected = interpret(look_up, batch, number, key, limits)
                fields = differing_fields(tree, expected, _TOLERANCE)
                if fields:
                    text = (
                        f"tree {number} of seed {seed}, manners {manners:g}, constrain={constrain}:"
                        f" differs from the reference interpreter's in {', '.join(fields)}"
                    )
                    return Finding("engine", "fault", text)

            threads += int((forest.status != Status.FREE).sum())
            tokens += int(forest.total_tokens.sum())
            # Of the first trees: their number does not depend on the number of devices.
            checksum = zlib.crc32(np.ascontiguousarray(forest.tokens[:TREES]).tobytes(), checksum)

    text = (
        f"equals the reference interpreter in every field: {threads:,} threads, {tokens:,} sampled"
        " tokens"
    )
    figures = {"threads": threads, "tokens": tokens}
    return Finding("engine", "ok", text, figures=figures, facts={"checksum of trees": checksum})


def prompts(seed: int, limits: Limits, trees: int = TREES) -> Prompts:
    """Makes prompts of 1 to 5 tokens for the scripted policy.

    Every way to sample and several forced numbers of children are in one batch.
    """
    rng = np.random.default_rng(seed)
    text = rng.integers(scripted.TEXT.start, scripted.VOCAB, (trees, 4))
    most = limits.max_threads - 1 if limits.max_depth else 0
    return make_prompts(
        [[p.BOS, *words[: rng.integers(0, 5)].tolist()] for words in text],
        width=5,
        tree=(np.arange(trees) + 1000 * seed).tolist(),
        temperature=rng.choice([1.0, 1.0, 1.4, 0.6, 0.0], trees).tolist(),
        top_k=rng.choice([0, 0, 1, 3], trees).tolist(),
        top_p=rng.choice([1.0, 1.0, 0.8, 0.3], trees).tolist(),
        children=np.minimum(
            rng.choice([NOT_FORCED, NOT_FORCED, NOT_FORCED, 0, 1, 2, most], trees), most
        ).tolist(),
    )


def differing_fields(left: ThreadForest, right: ThreadForest, tolerance: float) -> list[str]:
    """Lists the fields in which two forests differ: in type, shape or any value.

    Args:
      left: a forest.
      right: another one.
      tolerance: by how much log-probs may differ.
    """
    names = []
    for field in dataclasses.fields(left):
        a, b = (np.asarray(getattr(forest, field.name)) for forest in (left, right))
        same = a.dtype == b.dtype and a.shape == b.shape
        if same and field.name == "logprob":
            same = np.allclose(a, b, rtol=0, atol=tolerance)
        elif same:
            same = np.array_equal(a, b)
        if not same:
            names.append(field.name)
    return names
