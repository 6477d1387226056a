"""The four programs of a run, lowered for abstract arguments: shapes with shardings, no data.

The vocabulary is trained on the demonstrations, and forests are grown by the policy; a plan, made
before either, takes VOCAB for the one and `Forests` for the other."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import Experiment
from apr_jax.data.packing import Rows
from apr_jax.model.sharding import BATCH_AXES, batch_sharding, shardings
from apr_jax.model.transformer import init_params
from apr_jax.plan import Program
from apr_jax.threads import Prompts
from apr_jax.train.grader import rollout_batch
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.policy import make_policy_rollout
from apr_jax.train.state import TrainState
from apr_jax.train.step import ForestBatch, check_divides, make_rescore, make_rl_step, make_sft_step

VOCAB = 64  # Single characters and the control pieces are fewer.
# Of a training that is counted in epochs: a number within the program, which costs the same with
# any.
ANY_STEPS = 10_000
PROMPT = 32  # P, tokens of a prompt.
STAGES = tuple(program.value for program in Program)


@dataclasses.dataclass(frozen=True)
class Forests:
    """What the trees of a trained policy are like: those of the published one after RL, in shares
    of the window.

    16,720 tokens and 8.2 children a tree, 1,796 tokens a thread, window 4,096 (arXiv 2504.15466,
    figure 5). The longest chain
    of a batch is taken to be a whole window: of hundreds of trees some run out of it.

    Attributes:
      tokens: sampled tokens a tree.
      threads: threads a tree.
      chain: sequential tokens of the batch's slowest tree.
    """

    tokens: float
    threads: float
    chain: float

    @classmethod
    def of(cls, config: Experiment) -> "Forests":
        window = config.limits.window
        return cls(16_720 / 4_096 * window, min(9.2, config.limits.max_threads), window)


def abstract_params(config: Experiment) -> Any:
    return jax.eval_shape(lambda: init_params(config.model, VOCAB, jax.random.key(0)))


def lower(stage: str, config: Experiment, mesh: Mesh) -> Any:
    """One of STAGES for a mesh, to be compiled.

    Raises:
      UsageError: rows don't divide into the mesh.
    """
    return _LOWER[stage](config, abstract_params(config), mesh)


def forest_chunks(config: Experiment) -> int:
    """Chunks of rows that a forest is rescored in."""
    trees, forests = config.train.rl.problems * config.train.rl.group, Forests.of(config)
    return math.ceil(
        trees
        * forests.tokens
        / 0.95
        / config.limits.max_thread_tokens
        / config.train.rl.micro_batch_rows
    )


def _lower_sft(config: Experiment, params: Any, mesh: Mesh) -> Any:
    sft = config.train.sft
    check_divides("train.sft.batch_rows", sft.batch_rows, mesh)
    optimizer = make_optimizer(sft.optimizer, sft.steps or ANY_STEPS)
    step: Any = make_sft_step(config.model, optimizer, mesh)
    return step.lower(
        _state(params, optimizer, mesh),
        _rows((sft.batch_rows, config.limits.max_thread_tokens), batch_sharding(mesh)),
    )


def lower_rollout(config: Experiment, params: Any, mesh: Mesh) -> Any:
    """The rollout of one step of reinforcement learning."""
    trees = rollout_batch(config, mesh)

    def tree(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((trees, *shape), dtype, sharding=batch_sharding(mesh))

    width = min(PROMPT, config.limits.window - 1)
    prompts = Prompts(
        tree(jnp.int32, width),
        tree(jnp.int32),
        tree(jnp.int32),
        tree(jnp.float32),
        tree(jnp.int32),
        tree(jnp.float32),
        tree(jnp.int32),
    )
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), _whole(mesh))
    rollout: Any = make_policy_rollout(config.model, config.limits, config.schedule, mesh)
    return rollout.lower(_laid_out(params, mesh), prompts, key)


def _lower_rescoring(config: Experiment, params: Any, mesh: Mesh) -> Any:
    rescore: Any = make_rescore(config, mesh)
    return rescore.lower(_laid_out(params, mesh), _forest(config, mesh))


def _lower_update(config: Experiment, params: Any, mesh: Mesh) -> Any:
    rl = config.train.rl
    optimizer = make_optimizer(rl.optimizer, rl.steps * rl.ppo_epochs)
    advantages = jax.ShapeDtypeStruct((rl.problems * rl.group,), jnp.float32, sharding=_whole(mesh))
    step: Any = make_rl_step(config, optimizer, mesh)
    forest = _forest(config, mesh)
    known = forest.weights  # Log-probs are of the same shape, type and layout.
    forest = dataclasses.replace(
        forest,
        reference=known if rl.objective.kl_in_loss else None,
        behaviour=known if rl.objective.importance_cap else None,
    )
    return step.lower(_state(params, optimizer, mesh), forest, advantages)


_LOWER = dict(
    zip(STAGES, (_lower_sft, lower_rollout, _lower_rescoring, _lower_update), strict=True)
)


def _forest(config: Experiment, mesh: Mesh) -> ForestBatch:
    check_divides("train.rl.micro_batch_rows", config.train.rl.micro_batch_rows, mesh)
    chunks = 1 << (forest_chunks(config) - 1).bit_length()  # Rows come in buckets of powers of two.
    shape = (chunks, config.train.rl.micro_batch_rows, config.limits.max_thread_tokens)
    split = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    used = jax.ShapeDtypeStruct((), jnp.int32, sharding=_whole(mesh))
    return ForestBatch(_rows(shape, split), weights, used)


def _rows(shape: tuple[int, ...], sharding: NamedSharding) -> Rows:
    kinds = {"sampled": jnp.bool_, "logprob": jnp.float32, "allowed": jnp.uint8}
    fields = {
        field.name: jax.ShapeDtypeStruct(shape, kinds.get(field.name, jnp.int32), sharding=sharding)
        for field in dataclasses.fields(Rows)
    }
    return Rows(**fields)


def _state(params: Any, optimizer: Any, mesh: Mesh) -> TrainState:
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return _laid_out(TrainState(params, jax.eval_shape(optimizer.init, params), *[count] * 3), mesh)


def _laid_out(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(_placed, tree, shardings(tree, mesh))


def _placed(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
