"""Rescored log-probs against recorded ones, and the gradient against a second computation.

A small random transformer rolls out trees on the devices of this process. Their packed rows are
split over all devices of the run, which compute log-probs and gradient as in training. Then one
device computes the gradient again, with the naive twin of attention. All products are of the
highest precision: with fewer bits, rounding would hide an error.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.check.findings import Finding
from apr_jax.data.packing import Rows, pack_forest
from apr_jax.model.attention.plain import attend_plainly
from apr_jax.model.config import ModelConfig
from apr_jax.model.sharding import batch_sharding, make_mesh
from apr_jax.model.transformer import forward, init_params
from apr_jax.threads import Limits, Schedule, ThreadForest, make_prompts
from apr_jax.threads import protocol as p
from apr_jax.train.config import ObjectiveConfig
from apr_jax.train.distributed import place_on_mesh
from apr_jax.train.policy import make_policy_rollout
from apr_jax.train.rl.objective import policy_loss, token_weights
from apr_jax.train.rl.rescoring import sampled_logprobs, token_logprobs
from apr_jax.train.step import place_everywhere

_MODEL = ModelConfig(layers=2, width=128, heads=4, kv_heads=1, head_size=32, mlp=352)
_VOCAB = 16  # So few that a random model often spawns and joins.
_LIMITS = Limits(
    window=40, max_thread_tokens=72, max_threads=14, children=3, max_depth=2, constrain=True
)
_SCHEDULE = Schedule(slots=8, prefill_batch=4, prefill_chunk=5, context_buckets=(20,))
_TREES = 32
_OBJECTIVE = ObjectiveConfig(kl=0.0)

# The most that log-probs may differ; on CPU it was 3e-6.
_LOGPROB_BOUND = 1e-4
# The most that a gradient may differ, as a share of the largest entry of its array; on CPU 1e-6.
_GRADIENT_BOUND = 1e-3


def check_gradients() -> Iterator[Finding]:
    """Yields the findings about rescoring and about the gradient."""
    with jax.default_matmul_precision("highest"):
        params = jax.device_get(init_params(_MODEL, _VOCAB, jax.random.key(0)))
        forest = _record(params)
        mesh = make_mesh()
        rows = pack_forest(forest, rows=mesh.size, length=_LIMITS.max_thread_tokens)
        logprobs, gradient = _as_in_training(params, rows, mesh)

        # Rescored log-probs.
        count = int(rows.sampled.sum())
        worst = float(np.abs(np.where(rows.sampled, logprobs - rows.logprob, 0.0)).max())
        text = (
            f"{count:,} sampled tokens; rescored and recorded log-probs differ by"
            f" {worst:.1e} at most"
        )
        yield _bounded("rescoring", text, worst, _LOGPROB_BOUND, {"tokens": count})

        # The gradient.
        finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        if not finite:
            yield Finding("gradient", "fault", "has NaN or Inf")
            return
        worst = _worst_difference(gradient, _again(params, rows))
        text = (
            "finite; differs from a second computation, by one device and with plain attention, by"
            f" {worst:.1e} of its largest entry at most"
        )
        yield _bounded("gradient", text, worst, _GRADIENT_BOUND, {})


def _bounded(
    subject: str, text: str, worst: float, bound: float, figures: dict[str, Any]
) -> Finding:
    """Makes the finding of a difference that must be within a bound; NaN is not."""
    figures = figures | {"worst": worst, "bound": bound}
    if worst <= bound:
        return Finding(subject, "ok", text, figures=figures)
    return Finding(subject, "fault", f"{text}; the bound is {bound:.0e}", figures=figures)


def _record(params: Any) -> ThreadForest:
    """Rolls out trees on the devices of this process; they are the same in every process."""
    mesh = make_mesh(devices=jax.local_devices())
    trees = -(-_TREES // mesh.size) * mesh.size
    rollout = make_policy_rollout(_MODEL, _LIMITS, _SCHEDULE, mesh)
    text = np.random.default_rng(0).integers(len(p.CONTROL_PIECES), _VOCAB, (trees, 3))
    prompts = make_prompts(
        [[p.BOS, *words[: 1 + number % 3].tolist()] for number, words in enumerate(text)],
        width=4,
        temperature=1.0,
    )
    forest = jax.device_get(rollout(params, prompts, jax.random.key(0))[0])
    # Whatever the number of devices here, all processes go on with the same trees.
    return jax.tree.map(lambda field: field[:_TREES], forest)


def _weights(rows: Rows) -> np.ndarray:
    """Computes what each token weighs in the loss, float32 [R, L]."""
    counted = np.ones(_TREES, bool)
    tokens_per_tree = float(_LIMITS.max_thread_tokens)
    weights = token_weights(rows, counted, _OBJECTIVE.loss_aggregation, tokens_per_tree)
    return weights.astype(np.float32)


def _advantages() -> np.ndarray:
    """Draws an advantage for each tree, float32 [B]; some are negative."""
    return np.random.default_rng(1).normal(size=_TREES).astype(np.float32)


def _as_in_training(params: Any, rows: Rows, mesh: Mesh) -> tuple[np.ndarray, Any]:
    """Computes log-probs [R, L] and gradient with the rows split over all devices."""

    def loss_of(params: Any, rows: Rows, weights: Any, advantages: Any) -> tuple[Any, Any]:
        logprobs, entropy = token_logprobs(params, _MODEL, rows, mesh=mesh)
        given = (logprobs, entropy, logprobs, rows, weights, advantages)
        return policy_loss(*given, _OBJECTIVE)[0], logprobs

    # Rows and weights are split over the devices; each device has all of the rest.
    split = batch_sharding(mesh)
    batch = jax.tree.map(lambda field: place_on_mesh(field, split), (rows, _weights(rows)))
    params, advantages = jax.tree.map(
        lambda leaf: place_everywhere(leaf, mesh), (params, _advantages())
    )
    whole = NamedSharding(mesh, PartitionSpec())
    gradient_of = jax.jit(jax.grad(loss_of, has_aux=True), out_shardings=whole)
    gradient, logprobs = gradient_of(params, *batch, advantages)
    return np.asarray(logprobs), jax.tree.map(np.asarray, gradient)


def _again(params: Any, rows: Rows) -> Any:
    """Computes the gradient on one device, with the naive twin of attention."""

    def loss_of(params: Any, rows: Rows, weights: Any, advantages: Any) -> jax.Array:
        read = (rows.tokens, rows.position, rows.segment, rows.hidden_block)
        logits = forward(params, _MODEL, *read, attend=attend_plainly)
        logprobs, entropy = sampled_logprobs(logits, rows)
        given = (logprobs, entropy, logprobs, rows, weights, advantages)
        return policy_loss(*given, _OBJECTIVE)[0]

    inputs = (params, rows, _weights(rows), _advantages())
    placed = jax.device_put(inputs, jax.local_devices()[0])
    return jax.device_get(jax.jit(jax.grad(loss_of))(*placed))


def _worst_difference(left: Any, right: Any) -> float:
    """Returns the largest difference in any array, as a share of its largest entry in `right`."""
    shares = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), left, right)
    return float(max(jax.tree.leaves(shares)))
