"""The state of training, and the update of it that refuses NaN and Inf."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from apr_jax.model.sharding import shardings
from apr_jax.train.rounding import rounded_as, widened


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes.

    Attributes:
      params: parameters of the model.
      opt_state: state of the optimizer.
      step: int32, steps of the loop so far, skipped ones included.
      skipped: int32, updates that were skipped because of NaN or Inf.
      bad_in_a_row: int32, updates that were skipped since the last good one.
      adapters: what is trained in place of the parameters (`model/lora.py`), which are then those
        of the model with these adapters merged; None if all parameters are trained.
      carried: trees that the next step of RL goes on with (`threads.CarriedTrees`); None if every
        step finishes its trees. No update changes them.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    skipped: jax.Array
    bad_in_a_row: jax.Array
    adapters: Any = None
    carried: Any = None

    @property
    def trained(self) -> Any:
        """What the optimizer changes."""
        return self.params if self.adapters is None else self.adapters


def new_state(
    params: Any, optimizer: optax.GradientTransformation, adapters: Any = None
) -> TrainState:
    """Makes the state of step 0, wherever its arrays are."""
    trained = params if adapters is None else adapters
    step, skipped, bad_in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    opt_state = optimizer.init(widened(trained))  # Moments are float32.
    return TrainState(params, opt_state, step, skipped, bad_in_a_row, adapters)


def init_state(
    params: Any, optimizer: optax.GradientTransformation, mesh: Mesh, adapters: Any = None
) -> TrainState:
    """Makes the state of step 0, laid out on the mesh.

    The parameters and adapters are copied, because the first update donates the state.
    """

    def build(params: Any, adapters: Any) -> TrainState:
        state = new_state(params, optimizer, adapters)
        return dataclasses.replace(
            state,
            params=jax.tree.map(jnp.copy, params),
            adapters=jax.tree.map(jnp.copy, adapters),
        )

    layout = shardings(jax.eval_shape(build, params, adapters), mesh)
    return jax.jit(build, out_shardings=layout)(params, adapters)


def apply_gradients(
    state: TrainState,
    loss: jax.Array,
    grads: Any,
    optimizer: optax.GradientTransformation,
    merged: Callable[[Any], Any] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Applies one update, or nothing of it if the loss or any gradient is not finite.

    It is computed in float32, whatever the types of parameters and gradients. The caller counts the
    `step`.

    Args:
      state: the state before the update.
      loss: the loss.
      grads: its gradient with respect to `state.trained`.
      optimizer: the optimizer.
      merged: returns the parameters of the model with given adapters; None if the state has none.

    Returns:
      the new state; the metrics grad_norm, skipped, bad_in_a_row.
    """
    grads = widened(grads)
    norm = optax.global_norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)

    # The optimizer gets zeros in place of bad gradients: Newton-Schulz steps on NaN would be wasted
    # work.
    safe = jax.tree.map(lambda g: jnp.where(good, g, 0.0), grads)
    before = widened(state.trained)
    updates, opt_state = optimizer.update(safe, state.opt_state, before)
    updated = optax.apply_updates(before, updates)
    trained = rounded_as(updated, state.trained, state.step)

    def choose(new: Any, old: Any) -> Any:
        """Returns the new values after a good update, else the old ones."""
        return jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)

    if merged is None:
        params, adapters = choose(trained, state.params), None
    else:
        params, adapters = choose(merged(trained), state.params), choose(trained, state.adapters)
    state = dataclasses.replace(
        state,
        params=params,
        adapters=adapters,
        opt_state=choose(opt_state, state.opt_state),
        skipped=state.skipped + ~good,
        bad_in_a_row=jnp.where(good, 0, state.bad_in_a_row + 1),
    )
    return state, {"grad_norm": norm, "skipped": state.skipped, "bad_in_a_row": state.bad_in_a_row}
