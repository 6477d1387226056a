"""Networks built like Qwen3-0.6B and Llama 3.2 1B, with their whole vocabularies, on eight devices.

They are two layers deep and narrow; heads, key/value heads, norms, rotary embedding and the tied
embedding are as in the originals. On every mesh a rollout, a supervised step and an update give
what one device gives.
"""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.whole_runs import changed

from apr_jax.check.engine import differing_fields
from apr_jax.config import MeshConfig
from apr_jax.data.packing import pack_forest
from apr_jax.model.config import ModelConfig, RopeScaling
from apr_jax.model.sharding import make_mesh
from apr_jax.model.transformer import init_params
from apr_jax.text.tokenizer import BOS, CONTROL_PIECES
from apr_jax.threads import make_prompts
from apr_jax.threads.keys import KEYS
from apr_jax.train.config import OptimizerConfig
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.policy import make_policy_rollout
from apr_jax.train.rl.objective import token_weights
from apr_jax.train.state import init_state
from apr_jax.train.step import (
    make_rl_step,
    make_sft_step,
    most_chunks,
    place_everywhere,
    place_forest,
    place_rows,
    place_whole,
)

# Name -> (ids of the tokenizer, network).
NETWORKS = {
    "Qwen3-0.6B": (
        151_936,
        ModelConfig(
            layers=2,
            width=64,
            heads=16,
            kv_heads=8,
            head_size=16,
            mlp=192,
            qk_norm=True,
            rope_base=1e6,
        ),
    ),
    "Llama-3.2-1B": (
        128_256,
        ModelConfig(
            layers=2,
            width=64,
            heads=32,
            kv_heads=8,
            head_size=8,
            mlp=256,
            norm_epsilon=1e-5,
            rope_base=5e5,
            rope_scaling=RopeScaling(factor=32.0),
        ),
    ),
}
MESHES = [(d, f, 8 // (d * f)) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if d * f <= 8]
TREES = 8
OPTIMIZER = make_optimizer(OptimizerConfig(lr=1e-3, warmup=0), 10)


@dataclasses.dataclass(frozen=True)
class Found:
    """What one round of rollout, supervised step and update gives, on the host."""

    forest: object
    losses: np.ndarray
    norms: np.ndarray
    embedding: np.ndarray


def one_round(config, name, axes):
    """Runs the three programs on a mesh; both steps begin from the same random parameters."""
    ids, network = NETWORKS[name]
    vocab = len(CONTROL_PIECES) + ids
    mesh = make_mesh(*axes)
    config = changed(
        config, model=network, mesh=MeshConfig(*axes), rl={"micro_batch_rows": 8, "group": 4}
    )
    params = init_params(network, vocab, jax.random.key(0))
    # Ten rows of 150,000 would never be drawn: these stand out, so that threads spawn and join. If
    # they stood out more, rounding of their logits would show in log-probs: they are sums that
    # devices add up in another order.
    params["embed"] = params["embed"].at[: len(CONTROL_PIECES)].multiply(12.0)

    limits = dataclasses.replace(config.limits, constrain=True)
    texts = np.random.default_rng(0).integers(len(CONTROL_PIECES), vocab, (TREES, 5)).tolist()
    starts = [[BOS, *text] for text in texts]
    prompts = make_prompts(starts, 8, temperature=1.0, children=[2] * TREES)
    rollout = make_policy_rollout(network, limits, config.schedule, mesh)
    forest, _ = rollout(place_whole(params, mesh), prompts, jax.random.key(7, impl=KEYS))
    forest = jax.device_get(forest)

    rows = pack_forest(forest, 8, config.limits.max_thread_tokens)
    sft_step = make_sft_step(network, OPTIMIZER, mesh)
    _, supervised = sft_step(
        init_state(params, OPTIMIZER, mesh), place_rows(rows, len(rows.tokens), mesh)
    )

    rl_step = make_rl_step(config, OPTIMIZER, mesh)
    weights = token_weights(rows, np.ones(TREES, bool), "tree", tokens_per_tree=50.0)
    batch = place_forest(rows, weights, 8, mesh, most_chunks(config, mesh))
    advantages = place_everywhere(np.linspace(-1, 1, TREES, dtype=np.float32), mesh)
    state, update, _ = rl_step(init_state(params, OPTIMIZER, mesh), batch, advantages)
    return Found(
        forest=forest,
        losses=np.array([supervised["loss"], update["loss"]]),
        norms=np.array([supervised["grad_norm"], update["grad_norm"]]),
        embedding=np.asarray(state.params["embed"])[: len(CONTROL_PIECES)],
    )


@pytest.fixture(scope="module", params=list(NETWORKS))
def alone(request, config):
    """A network, and what it gives on one device."""
    found = one_round(config, request.param, (1, 1, 1))
    assert found.forest.total_tokens.sum() > 100
    assert found.forest.children.sum() >= TREES
    assert found.norms.min() > 0
    return request.param, found


@pytest.mark.slow
def test_every_mesh_gives_what_one_device_gives(alone, config):
    name, expected = alone
    assert len(MESHES) == 10
    for axes in MESHES:
        found = one_round(config, name, axes)
        assert not differing_fields(found.forest, expected.forest, tolerance=2e-5), axes
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-4)
        np.testing.assert_allclose(found.embedding, expected.embedding, atol=2e-5)
