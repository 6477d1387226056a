"""Keys of different purposes never coincide, whatever steps, trees and tokens they count."""

import functools

import jax
import numpy as np
import pytest

from apr_jax.threads import keys
from apr_jax.threads.keys import LARGEST_SEED, Domain, run_key

COUNT = 48  # Of steps, trees, rounds and so on: all from 0 on, where paths are most alike.


def data(key):
    return np.asarray(jax.random.key_data(key)).reshape(-1, 2)


def blocks(key):
    """What JAX makes of a key by splitting it, and noise by drawing from it: the same words."""
    return jax.random.key_data(jax.random.split(key, COUNT))


@pytest.fixture(scope="module")
def by_purpose():
    """Purpose -> [N, 2] key data or noise, of two seeds and on two levels of a tree."""
    counted = np.arange(COUNT, dtype=np.int32)
    found: dict[str, list[np.ndarray]] = {}

    def note(purpose, key_data):
        found.setdefault(purpose, []).append(np.asarray(key_data).reshape(-1, 2))

    children = jax.jit(jax.vmap(jax.vmap(keys.child_key, (None, None, 0)), (None, 0, None)))

    def token(thread, place):
        return jax.random.key_data(keys.token_key(thread, place))

    def noise_of(thread, place):
        return blocks(keys.token_key(thread, place))

    tokens = jax.jit(jax.vmap(token, (None, 0)))
    noise = jax.jit(jax.vmap(noise_of, (None, 0)))
    roots = jax.jit(keys.root_key)
    for seed in (0, 1):
        weights = run_key(seed, Domain.WEIGHTS)
        note("weights", data(weights))
        note("a layer's weights", blocks(weights))
        rollouts = {"evaluation": run_key(seed, Domain.EVALUATION)[None]}
        for name, domain in (("RL", Domain.RL_STEP), ("validation", Domain.VALIDATION)):
            rollouts[name] = jax.vmap(functools.partial(run_key, seed, domain))(counted)
        for name, several in rollouts.items():
            note(f"a rollout of {name}", data(several))
            for key in several[:3]:
                trees = np.asarray(roots(key, counted))
                note(f"a root of {name}", trees)
                for parent in (trees[0], np.asarray(children(trees[1], counted, counted))[0, 1]):
                    note("a child", children(parent, counted, counted))
                    note("a token", tokens(parent, counted))
                    note("noise", noise(parent, counted))
    return {purpose: np.concatenate(several) for purpose, several in found.items()}


def test_no_two_keys_of_a_run_are_equal(by_purpose):
    """Not within one purpose, not across two; and no key equals the noise of a token."""
    together = np.concatenate(list(by_purpose.values())).astype(np.uint64)
    assert len(together) > 100_000
    assert np.unique(together[:, 0] << np.uint64(32) | together[:, 1]).size == len(together), {
        purpose: len(found) for purpose, found in by_purpose.items()
    }


def test_a_key_depends_on_every_bit_of_the_seed():
    seeds = [0, 1, 2**16, 2**31 - 1, 2**31, LARGEST_SEED]
    found = {tuple(data(run_key(seed, Domain.WEIGHTS))[0].tolist()) for seed in seeds}
    assert len(found) == len(seeds)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**20])
def test_a_seed_that_does_not_fit_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed} must be from 0 to 4294967295"):
        run_key(seed, Domain.WEIGHTS)
