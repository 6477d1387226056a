"""Hours of a method's training, and advice for a stage that does not fit into memory.

The hours are computed from the seconds of the method's stages.
"""

import dataclasses
import math

from apr_jax.bench.demos import make_recipe
from apr_jax.config import Experiment
from apr_jax.data.demonstrate import Workers, demonstrations, unflatten
from apr_jax.data.packing import pack_trees
from apr_jax.errors import UsageError
from apr_jax.plan.chips import Chip
from apr_jax.plan.kernels import position_bytes
from apr_jax.plan.roofline import Stage
from apr_jax.train.config import RlConfig, SftConfig

# Demonstrations that are made to see how many rows they fill. At scale paper their mean is known to
# 5% then.
_SAMPLE = 512


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hours of one method's training if every program ran at its roofline.

    Evaluations run on one host, so they are not included (see `--only training`).

    Attributes:
      steps: steps of the supervised training.
      supervised, reinforced: hours of the two trainings, validations included.
      chip_hours: chip hours of both trainings together.
    """

    steps: int
    supervised: float
    reinforced: float
    chip_hours: float


def supervised_steps(config: Experiment, method: str) -> int:
    """Returns the number of steps of a method's supervised training.

    If the config counts epochs, some demonstrations are made and packed, to see how many rows they
    fill.
    """
    sft = config.train.sft
    if sft.steps:
        return sft.steps
    count = config.data.demonstrations
    if isinstance(count, str):
        raise UsageError(
            f"data.demonstrations={count!r}: `apr plan` cannot tell how many steps an epoch of a"
            " file has; set train.sft.steps"
        )
    made, problems = make_recipe(config, _SAMPLE, method)
    chunks = demonstrations(made, problems, _SAMPLE, Workers(1))
    trees = [unflatten(example) for chunk, _ in chunks for example in chunk]
    rows = len(pack_trees(trees, config.limits.max_thread_tokens).tokens)
    return math.ceil(sft.epochs * count * rows / _SAMPLE / sft.batch_rows)


def recipe(config: Experiment, stages: dict[str, Stage], chips: int, method: str) -> Recipe | None:
    """Hours of a method's training; None if one of its stages did not compile."""
    sft = config.train.sft
    rl = config.train.rl
    has_reference = rl.objective.kl > 0  # The reference policy rescores each forest once.
    needed = {"supervised", "rollout", "update"}
    if has_reference:
        needed.add("rescoring")
    if not needed <= stages.keys():
        return None

    # Seconds of the supervised training: steps, and the rollouts of its validations.
    rollout = stages["rollout"].seconds
    steps = supervised_steps(config, method)
    validations = _validations(steps, sft.validate_every)
    rollouts = _validation_rollouts(config, sft) * validations
    supervised = steps * stages["supervised"].seconds + rollouts * rollout

    # Seconds of the reinforcement learning, which also validates before the first step.
    step = rollout + rl.ppo_epochs * stages["update"].seconds
    if has_reference:
        step += stages["rescoring"].seconds
    validations = _validations(rl.steps, rl.validate_every)
    if validations:
        validations += 1
    rollouts = _validation_rollouts(config, rl) * validations
    reinforced = rl.steps * step + rollouts * rollout

    chip_hours = (supervised + reinforced) / 3600 * chips
    return Recipe(steps, supervised / 3600, reinforced / 3600, chip_hours)


def _validations(steps: int, every: int) -> int:
    """Counts the validations: every `every` steps and after the last; 0 if `every` is 0."""
    return math.ceil(steps / every) if every else 0


def _validation_rollouts(config: Experiment, stage: SftConfig | RlConfig) -> int:
    """Returns the number of rollouts in one validation."""
    return math.ceil(stage.validation / (config.train.rl.problems * config.train.rl.group))


def advice(
    config: Experiment, name: str, over: float, arguments: float, chip: Chip, fsdp: int
) -> str:
    """Says what to change for a stage that does not fit into memory.

    Args:
      config: the experiment.
      name: the stage.
      over: bytes that a device lacks.
      arguments: bytes of parameters, optimizer state and batch on a device.
      chip: the kind of chip.
      fsdp: devices on the fsdp axis of the mesh.
    """
    model = config.model
    if name == "rollout":
        slot = model.layers * position_bytes(model) * config.limits.window
        fewer = config.schedule.slots - math.ceil(over / slot)
        if fewer >= 1:
            return f"--set schedule.slots={fewer}: a decode slot is {slot / 2**20:.0f} MiB of cache"
        return "--set limits.window to less: the cache of one decode slot does not fit"
    if arguments > chip.device_memory / 2:
        return f"--set mesh.fsdp={2 * fsdp}: weights and optimizer over twice as many devices"
    if model.remat != "layer":
        remat = "dots" if model.remat == "none" else "layer"
        return f"--set model.remat={remat}: keep less for the backward pass"
    field = "train.sft.batch_rows" if name == "supervised" else "train.rl.micro_batch_rows"
    return f"fewer rows a device: more devices, or half of {field}"
