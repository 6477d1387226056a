"""The four programs of a run, lowered for abstract arguments: shapes with shardings, no data.

The vocabulary follows from the task, or from the pretrained model whose network is planned for.
Forests come from the policy, which does not exist when a plan is made, so it assumes `Forests`.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apr_jax.config import Experiment
from apr_jax.data.packing import Rows
from apr_jax.data.tree_files import characters
from apr_jax.model.hf import CONFIG, read_config
from apr_jax.model.lora import frozen
from apr_jax.model.sharding import BATCH_AXES, batch_sharding, shardings
from apr_jax.model.transformer import init_params
from apr_jax.plan import Program
from apr_jax.tasks import make_task
from apr_jax.text.sentence_piece import SentencePieceTokenizer
from apr_jax.text.tokenizer import CONTROL_PIECES
from apr_jax.threads import CarriedTrees, CarryOver, Prompts, new_trees
from apr_jax.train.config import LoraConfig
from apr_jax.train.grader import rollout_batch
from apr_jax.train.lora import make_adapters
from apr_jax.train.optimizer import make_optimizer
from apr_jax.train.policy import make_policy_carry_over, make_policy_rollout
from apr_jax.train.session import adopt_network
from apr_jax.train.state import TrainState, new_state
from apr_jax.train.step import (
    ForestBatch,
    check_divides,
    make_rescore,
    make_rl_step,
    make_sft_step,
    most_chunks,
)

# Steps of a training that is counted in epochs. The number stands in the program's schedule, and
# the program costs the same with any.
ANY_STEPS = 10_000
PROMPT = 32  # P, tokens of a prompt.
STAGES = tuple(program.value for program in Program)


@dataclasses.dataclass(frozen=True)
class Forests:
    """Sizes that are assumed of the trees of a trained policy.

    They are those of the published policy after RL, scaled to the window: 16,720 tokens and 8.2
    children a tree, 1,796 tokens a thread, window 4,096 (arXiv 2504.15466, figure 5). The longest
    chain of a batch is assumed to fill a window, because some of hundreds of trees run out of it.

    Attributes:
      tokens: sampled tokens of a tree.
      threads: threads of a tree.
      chain: sequential tokens of the slowest tree of a batch.
    """

    tokens: float
    threads: float
    chain: float

    @classmethod
    def of(cls, config: Experiment) -> "Forests":
        """Scales the published sizes to a config's limits."""
        window = config.limits.window
        tokens = 16_720 / 4_096 * window
        threads = min(9.2, config.limits.max_threads)  # 8.2 children and the root.
        return cls(tokens, threads, chain=window)


def vocabulary(config: Experiment) -> int:
    """Returns V, the size of the tokenizer that a data build trains for a config.

    It is known before any demonstration is made: a tokenizer has a piece for each character that
    the task can write, whether or not a demonstration holds it, and one for each phrase.
    """
    task = make_task(config.task, config.limits)
    alphabet = characters(task)
    return SentencePieceTokenizer.train([alphabet], task.phrases, alphabet).vocab_size


def adopt_pretrained(config: Experiment, folder: Path) -> tuple[Experiment, int]:
    """Gives an experiment the network of a Hugging Face folder, of which config.json is read.

    Returns:
      the experiment, and V: every id of the folder and the control pieces.

    Raises:
      UsageError: the folder describes no network that can be imported, or the experiment says
        something else about the network.
    """
    network, embeddings = read_config(folder / CONFIG)
    adopted = adopt_network(config, network, str(folder / CONFIG))
    return adopted, len(CONTROL_PIECES) + embeddings


def abstract_params(config: Experiment, vocab: int) -> Any:
    """Shapes and types of the parameters of a model with a vocabulary of `vocab`."""
    return jax.eval_shape(lambda: init_params(config.model, vocab, jax.random.key(0)))


def lower(stage: str, config: Experiment, params: Any, mesh: Mesh) -> Any:
    """Lowers one of STAGES for a mesh, ready to be compiled.

    Args:
      stage: its name.
      config: the experiment.
      params: see `abstract_params`.
      mesh: the devices.

    Raises:
      UsageError: the rows do not divide into the mesh.
    """
    return _LOWER[stage](config, params, mesh)


def forest_chunks(config: Experiment) -> int:
    """Returns the number of micro-batches in which a forest is rescored and learned from."""
    rl = config.train.rl
    tokens = rl.problems * rl.group * Forests.of(config).tokens
    # Packing fills 95% of the rows.
    return math.ceil(tokens / 0.95 / config.limits.max_thread_tokens / rl.micro_batch_rows)


def _lower_sft(config: Experiment, params: Any, mesh: Mesh) -> Any:
    """Lowers the supervised step."""
    sft = config.train.sft
    check_divides("train.sft.batch_rows", sft.batch_rows, mesh)
    optimizer = make_optimizer(sft.optimizer, sft.steps or ANY_STEPS)
    state, base = _state(params, optimizer, sft.lora, mesh)
    rows = _rows((sft.batch_rows, config.limits.max_thread_tokens), batch_sharding(mesh))
    step: Any = make_sft_step(config.model, optimizer, mesh, sft.lora)
    return step.lower(state, rows, base)


def lower_rollout(config: Experiment, params: Any, mesh: Mesh) -> Any:
    """Lowers the rollout of one step of reinforcement learning.

    With `train.rl.max_staleness` it is the one that goes on with the trees of earlier steps.
    """
    rl = config.train.rl
    placed = _laid_out(params, mesh)
    prompts = _prompts(config, mesh)
    key = _placed(_key(), _whole(mesh))
    if not rl.max_staleness:
        rollout: Any = make_policy_rollout(config.model, config.limits, config.schedule, mesh)
        return rollout.lower(placed, prompts, key)

    check_divides("train.rl.problems", rl.problems, mesh)
    carry_over: Any = make_policy_carry_over(
        config.model, config.limits, config.schedule, CarryOver(rl.group, rl.max_staleness), mesh
    )
    version = jax.ShapeDtypeStruct((), jnp.int32, sharding=_whole(mesh))
    return carry_over.lower(placed, _carried_trees(config, mesh), prompts, key, version)


def carried_bytes(config: Experiment, mesh: Mesh) -> int:
    """Returns the size, on one device, of the trees that a step of RL leaves to the next one.

    It is 0 without carry-over.
    """
    if not config.train.rl.max_staleness:
        return 0
    leaves = jax.tree.leaves(_carried_trees(config, mesh))
    sizes = [
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    ]
    return sum(sizes)


def _carried_trees(config: Experiment, mesh: Mesh) -> Any:
    """Shapes of the trees that a step of RL carries over: as many as it begins."""

    def make(prompts: Prompts, key: jax.Array) -> CarriedTrees:
        return new_trees(prompts, key, 0, config.limits)

    carried = jax.eval_shape(make, _prompts(config, mesh), _key())
    return jax.tree.map(lambda leaf: _placed(leaf, batch_sharding(mesh)), carried)


def _prompts(config: Experiment, mesh: Mesh) -> Prompts:
    """Shapes of the prompts of a rollout."""
    trees = rollout_batch(config, mesh)

    def per_tree(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((trees, *shape), dtype, sharding=batch_sharding(mesh))

    # The fields of `Prompts` in their order: tokens are [B, P], all others [B].
    return Prompts(
        per_tree(jnp.int32, min(PROMPT, config.limits.window - 1)),
        per_tree(jnp.int32),
        per_tree(jnp.int32),
        per_tree(jnp.float32),
        per_tree(jnp.int32),
        per_tree(jnp.float32),
        per_tree(jnp.int32),
    )


def _key() -> Any:
    """Shape of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def _lower_rescoring(config: Experiment, params: Any, mesh: Mesh) -> Any:
    """Lowers the rescoring of a forest by the reference policy."""
    rescore: Any = make_rescore(config, mesh)
    return rescore.lower(_laid_out(params, mesh), _forest(config, mesh))


def _lower_update(config: Experiment, params: Any, mesh: Mesh) -> Any:
    """Lowers the update on a forest."""
    rl = config.train.rl
    optimizer = make_optimizer(rl.optimizer, rl.steps * rl.ppo_epochs)
    advantages = jax.ShapeDtypeStruct((rl.problems * rl.group,), jnp.float32, sharding=_whole(mesh))
    forest = _forest(config, mesh)
    logprobs = forest.weights  # Log-probs have the shape, type and layout of the weights.
    forest = dataclasses.replace(
        forest,
        reference=logprobs if rl.objective.kl_in_loss else None,
        behaviour=logprobs if rl.objective.importance_cap else None,
    )
    step: Any = make_rl_step(config, optimizer, mesh)
    state, base = _state(params, optimizer, rl.lora, mesh)
    return step.lower(state, forest, advantages, base)


_LOWER = dict(
    zip(STAGES, (_lower_sft, lower_rollout, _lower_rescoring, _lower_update), strict=True)
)


def _forest(config: Experiment, mesh: Mesh) -> ForestBatch:
    """Shapes of a forest in packed rows, [chunks, R, L]."""
    check_divides("train.rl.micro_batch_rows", config.train.rl.micro_batch_rows, mesh)
    shape = (
        most_chunks(config, mesh),
        config.train.rl.micro_batch_rows,
        config.limits.max_thread_tokens,
    )
    split = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    used = jax.ShapeDtypeStruct((), jnp.int32, sharding=_whole(mesh))
    older = None
    if config.train.rl.max_staleness:
        older = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=split)
    return ForestBatch(_rows(shape, split), weights, used, older=older)


def _rows(shape: tuple[int, ...], sharding: NamedSharding) -> Rows:
    """Shapes of packed rows; each field has the given shape."""
    kinds = {"sampled": jnp.bool_, "logprob": jnp.float32, "allowed": jnp.uint8}
    fields = {
        field.name: jax.ShapeDtypeStruct(shape, kinds.get(field.name, jnp.int32), sharding=sharding)
        for field in dataclasses.fields(Rows)
    }
    return Rows(**fields)


def _state(params: Any, optimizer: Any, lora: LoraConfig, mesh: Mesh) -> tuple[TrainState, Any]:
    """Shapes of a training's state, with their layout, and of what its adapters are added to."""
    adapters = jax.eval_shape(lambda params: make_adapters(params, lora, seed=0), params)
    base = None if adapters is None else frozen(params, lora.targets)
    state = jax.eval_shape(
        lambda params, adapters: new_state(params, optimizer, adapters), params, adapters
    )
    return _laid_out(state, mesh), _laid_out(base, mesh)


def _laid_out(tree: Any, mesh: Mesh) -> Any:
    """Shapes of parameters or state, with their layout on the mesh."""
    return jax.tree.map(_placed, tree, shardings(tree, mesh))


def _placed(leaf: Any, sharding: Any) -> Any:
    """Returns the shape and type of an array with a layout."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _whole(mesh: Mesh) -> NamedSharding:
    """Returns the layout of an array that each device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
