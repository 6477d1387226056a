"""The optimizer of an `OptimizerConfig`: clipping, AdamW or Muon, warm-up and a cosine.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, which
Newton-Schulz steps find. It must see the matrices by which the forward pass multiplies. So the
stacked parameters of the layers are taken apart along N, and where one array holds two matrices
(keys and values, gate and up), along that axis too. Heads are not taken apart: q is D x (H K).
Muon's updates are scaled to the size of Adam's (0.2 sqrt(longer side), Liu et al. 2025), so that
one learning rate serves both.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from apr_jax.train.config import OptimizerConfig
from apr_jax.train.metrics.step_times import LazyMetric

# Parameter -> the axes of its stacked array that are the rows of its matrices, over which a product
# sums, and the axes that are the columns.
MATRIX_AXES: dict[str, MuonDimensionNumbers] = {
    "q": MuonDimensionNumbers((1,), (2, 3)),  # [N, D, H, K]
    "kv": MuonDimensionNumbers((1,), (3, 4)),  # [N, D, 2, G, K]
    "out": MuonDimensionNumbers((1, 2), (3,)),  # [N, H, K, D]
    "gate_up": MuonDimensionNumbers((1,), (3,)),  # [N, D, 2, F]
    "down": MuonDimensionNumbers((1,), (2,)),  # [N, F, D]
    # Adapters (`model/lora.py`).
    **dict.fromkeys(  # [N, D, r] and [N, F, r]
        ("q_a", "k_a", "v_a", "gate_a", "up_a", "down_a"), MuonDimensionNumbers((1,), (2,))
    ),
    "o_a": MuonDimensionNumbers((1, 2), (3,)),  # [N, H, K, r]
    **dict.fromkeys(  # [N, r, H, K] and [N, r, G, K]
        ("q_b", "k_b", "v_b"), MuonDimensionNumbers((1,), (2, 3))
    ),
    **dict.fromkeys(  # [N, r, D] and [N, r, F]
        ("o_b", "gate_b", "up_b", "down_b"), MuonDimensionNumbers((1,), (2,))
    ),
}
_ADAM_SIZE = 0.2  # Root mean square of a typical Adam update.
_NEWTON_SCHULZ_STEPS = 5


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate by update: a linear warm-up, then a cosine.

    The warm-up starts above zero. The cosine reaches decay x lr at the last of `steps` updates.
    """
    warmup = min(config.warmup, steps - 1)
    return optax.warmup_cosine_decay_schedule(
        init_value=config.lr / (warmup + 1),
        peak_value=config.lr,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=config.lr * config.decay,
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer: clipping by the global norm, then AdamW or Muon.

    Scales of norms and biases are never decayed. Under Muon only the matrices are decayed.

    Args:
      config: its settings.
      steps: updates of the whole run, for the learning rates.
    """
    schedule = make_schedule(config, steps)
    if config.name == "muon":
        update = muon(
            schedule,
            ns_steps=_NEWTON_SCHULZ_STEPS,
            weight_decay=config.weight_decay,
            adam_b2=config.b2,
            muon_weight_dimension_numbers=_matrix_axes,
            consistent_rms=_ADAM_SIZE,
        )
    else:
        update = optax.adamw(
            schedule, b2=config.b2, weight_decay=config.weight_decay, mask=_is_decayed
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def clipped_updates(norms: Sequence[jax.Array], clip: float) -> LazyMetric:
    """Returns the share of updates whose gradient was longer than `clip` and so was cut.

    The share is computed when it is read, because the norms may still be under way on the device.

    Args:
      norms: norm of each update's gradient before clipping.
      clip: `OptimizerConfig.clip`.
    """

    def share() -> float:
        clipped = [float(norm) > clip for norm in norms]
        return sum(clipped) / len(clipped)

    return LazyMetric(share)


def _matrix_axes(params: Any) -> Any:
    """Returns the axes of each parameter's matrices, or None if Muon leaves it to AdamW."""
    return jax.tree_util.tree_map_with_path(lambda path, _: MATRIX_AXES.get(_name(path)), params)


def _is_decayed(params: Any) -> Any:
    """Returns for each parameter whether AdamW decays it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not _name(path).endswith(("norm", "bias")), params
    )


def _name(path: tuple[Any, ...]) -> str:
    """Returns the last part of a parameter's path."""
    return str(getattr(path[-1], "key", ""))
