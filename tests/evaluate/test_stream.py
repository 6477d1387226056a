"""Any number of trees through one shape: nothing compiled twice, nothing lost at the end, the
device always one batch ahead.
"""

import dataclasses
import types

import jax
import numpy as np
import pytest

from apr_jax.check import scripted
from apr_jax.evaluate.decoding import Decoding, prompts_of
from apr_jax.evaluate.runner import Runner
from apr_jax.evaluate.stream import stream
from apr_jax.tasks.countdown.puzzle import make_problem
from apr_jax.threads import Limits, Schedule, ThreadForest, Work, make_prompts, tree_rollout
from apr_jax.threads import protocol as p
from apr_jax.threads.keys import Domain, root_key, run_key

LIMITS = Limits(window=24, max_thread_tokens=40, max_threads=5, children=3)
TREES = 11


def run(batch, done=0, progress=False):
    """The forests of all trees from `done` on, how often the rollout was traced, and what happened
    in which order.
    """
    traced = []
    events = []
    policy = scripted.policy(0, 5.0)

    @jax.jit
    def compiled(params, prompts, key):
        traced.append(prompts)
        return tree_rollout(
            scripted.decode, scripted.init_cache, params, prompts, key, LIMITS, Schedule(4, 2, 4)
        )

    def rollout(params, prompts, key):
        events.append("send")
        return compiled(params, prompts, key)

    ids = [[p.BOS, *scripted.TEXT[: 1 + tree % 3]] for tree in range(TREES)]
    prompts = make_prompts(ids, 4, temperature=1.0)
    forests = []
    for begin, forest in stream(
        rollout,
        policy,
        prompts,
        jax.random.key(0),
        batch=batch,
        slots=4,
        done=done,
        progress=progress,
    ):
        assert begin == done + sum(len(one.length) for one in forests)
        events.append("got")
        forests.append(forest)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *forests), len(traced), events


@pytest.mark.thorough
def test_all_trees_come_once_whatever_the_batch():
    whole, _, _ = run(TREES)
    parts, traced, events = run(4)
    assert len(parts.length) == TREES and traced == 1
    assert events == ["send", "send", "got", "send", "got", "got"]
    for field in dataclasses.fields(whole):
        left, right = (getattr(forest, field.name) for forest in (whole, parts))
        np.testing.assert_allclose(left, right, atol=1e-5, err_msg=field.name)


@pytest.mark.thorough
def test_a_stream_goes_on_where_it_was_stopped():
    whole, _, _ = run(4)
    rest, _, _ = run(4, done=7)
    np.testing.assert_array_equal(whole.tokens[7:], rest.tokens)
    assert run(4, done=10)[2] == ["send", "got"]


@pytest.mark.thorough
def test_progress_has_its_rates(capfd):
    run(4, progress=True)
    said = capfd.readouterr().err
    assert (
        f"{TREES}/{TREES}" in said and "trees/s" in said and "tokens/s" in said and "full" in said
    )


@pytest.mark.parametrize("done", [0, 2])
def test_every_sample_has_a_key_of_its_own(config, done):
    """Were it that of another tree, samples would be copies: pass@n would be pass@1, and nothing
    else would show it.
    """
    asked = []

    def rollout(params, prompts, key):
        asked.append((prompts.tree, root_key(key, prompts.tree)))
        fields = {
            field.name: np.zeros(len(prompts.tree), np.int32)
            for field in dataclasses.fields(ThreadForest)
        }
        return ThreadForest(**fields), Work(steps=np.ones(1), live=np.ones(1))

    tokenizer = types.SimpleNamespace(encode=lambda text: [len(p.CONTROL_PIECES)])
    restored = types.SimpleNamespace(
        config=config, tokenizer=tokenizer, method="apr", file_method=None, path="run"
    )
    problems = [make_problem(str(number), (1, 2, 3), 10 + number) for number in range(3)]
    prompts = prompts_of(restored, problems, config.limits, Decoding(samples=4, temperature=1.0))
    got = list(Runner(rollout, None, batch=5, slots=8).stream(prompts, seed=9, done=done))
    assert [begin for begin, _ in got] == list(range(done, 12, 5))

    # What fills the last batch up are copies that are thrown away.
    count = 12 - done
    trees = np.concatenate([trees for trees, _ in asked])[:count]
    assert trees.tolist() == list(range(done, 12))
    keys = np.concatenate([keys for _, keys in asked])[:count]
    assert len({tuple(key) for key in keys.tolist()}) == count
    np.testing.assert_array_equal(keys, root_key(run_key(9, Domain.EVALUATION), trees))
