"""Any number of trees through one shape: nothing compiled twice, nothing lost at the end, the device always one batch ahead."""

import dataclasses

import jax
import numpy as np
import scripted

from apr_jax.evaluate.stream import stream
from apr_jax.threads import Limits, Schedule, make_prompts, tree_rollout
from apr_jax.threads import protocol as p

LIMITS = Limits(window=24, stream=40, slots=5, children=3)
TREES = 11


def run(batch, done=0, progress=False):
    """The forests of all trees from `done` on, how often the rollout was traced, and what happened in which order."""
    traced, events = [], []
    policy = scripted.policy(0, 5.0)

    @jax.jit
    def compiled(params, prompts, key):
        traced.append(prompts)
        return tree_rollout(scripted.decode, scripted.init_cache, params, prompts, key, LIMITS, Schedule(4, 2, 4))

    def rollout(params, prompts, key):
        events.append("send")
        return compiled(params, prompts, key)

    ids = [[p.BOS, *scripted.TEXT[: 1 + tree % 3]] for tree in range(TREES)]
    prompts = make_prompts(ids, 4, temperature=1.0)
    forests = []
    for begin, forest in stream(
        rollout, policy, prompts, jax.random.key(0), batch=batch, lanes=4, done=done, progress=progress
    ):
        assert begin == done + sum(len(one.length) for one in forests)
        events.append("got")
        forests.append(forest)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *forests), len(traced), events


def test_all_trees_come_once_whatever_the_batch():
    whole, _, _ = run(TREES)
    parts, traced, events = run(4)
    assert len(parts.length) == TREES and traced == 1
    assert events == ["send", "send", "got", "send", "got", "got"]
    for field in dataclasses.fields(whole):
        left, right = (getattr(forest, field.name) for forest in (whole, parts))
        np.testing.assert_allclose(left, right, atol=1e-5, err_msg=field.name)


def test_a_stream_goes_on_where_it_was_stopped():
    whole, _, _ = run(4)
    rest, _, _ = run(4, done=7)
    np.testing.assert_array_equal(whole.tokens[7:], rest.tokens)
    assert run(4, done=10)[2] == ["send", "got"]


def test_progress_has_its_rates(capfd):
    run(4, progress=True)
    said = capfd.readouterr().err
    assert f"{TREES}/{TREES}" in said and "trees/s" in said and "tokens/s" in said and "full" in said
