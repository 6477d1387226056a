"""Hours of a method's training from the times of its stages, and what to change where a stage does
not fit.
"""

import dataclasses
import math

from apr_jax.bench.demos import make_recipe
from apr_jax.config import Experiment
from apr_jax.data.demonstrate import Workers, demonstrations, unflatten
from apr_jax.data.packing import pack_streams
from apr_jax.plan.chips import Chip
from apr_jax.plan.kernels import position_bytes
from apr_jax.plan.roofline import Stage
from apr_jax.train.config import RlConfig, SftConfig

# Demonstrations that are made to see how many rows they fill: at scale paper a mean that is known
# to 5%.
_SAMPLE = 512


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hours of one method, at the roofline. Evaluations are of one host, so they are not in it
    (`--only training`).

    Attributes:
      steps: of the supervised training.
      supervised, reinforced: of the two trainings, validations included.
      chip_hours: of both, on all chips.
    """

    steps: int
    supervised: float
    reinforced: float
    chip_hours: float


def supervised_steps(config: Experiment, method: str) -> int:
    """Steps of a method's supervised training.

    Epochs become steps by demonstrations that are made on the spot and packed.
    """
    sft = config.train.sft
    if sft.steps:
        return sft.steps
    made, problems = make_recipe(config, _SAMPLE, method)
    chunks = demonstrations(made, problems, _SAMPLE, Workers(1))
    trees = [unflatten(example) for chunk, _ in chunks for example in chunk]
    rows = len(pack_streams(trees, config.limits.max_thread_tokens).tokens)
    return math.ceil(sft.epochs * config.data.demonstrations * rows / _SAMPLE / sft.batch_rows)


def recipe(config: Experiment, stages: dict[str, Stage], chips: int, method: str) -> Recipe | None:
    """Hours of a method's training; None if a stage is missing: it did not compile."""
    rl = config.train.rl
    anchored = rl.objective.kl > 0  # The reference scores each forest once.
    needed = {"supervised", "rollout", "update"}
    if not (needed | ({"rescoring"} if anchored else set())) <= stages.keys():
        return None
    sft, rollout = config.train.sft, stages["rollout"].seconds
    steps = supervised_steps(config, method)
    validations = _validations(steps, sft.validate_every)
    supervised = steps * stages["supervised"].seconds + _asked(config, sft) * validations * rollout
    step = rollout + rl.ppo_epochs * stages["update"].seconds
    step += stages["rescoring"].seconds if anchored else 0.0
    validations = 1 + _validations(rl.steps, rl.validate_every)  # One before the first step.
    reinforced = rl.steps * step + _asked(config, rl) * validations * rollout
    return Recipe(
        steps, supervised / 3600, reinforced / 3600, (supervised + reinforced) / 3600 * chips
    )


def _validations(steps: int, every: int) -> int:
    """Every so many steps and after the last; none if there are to be none."""
    return math.ceil(steps / every) if every else 0


def _asked(config: Experiment, stage: SftConfig | RlConfig) -> int:
    """Rollouts of one validation."""
    return math.ceil(stage.validation / (config.train.rl.problems * config.train.rl.group))


def advice(
    config: Experiment, name: str, over: float, arguments: float, chip: Chip, fsdp: int
) -> str:
    """What to change for a stage that does not fit.

    Args:
      over: bytes that a device has too few.
      arguments: bytes of parameters, optimizer state and batch on a device.
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
        return (
            f"--set model.remat={'dots' if model.remat == 'none' else 'layer'}: keep less for the"
            " backward pass"
        )
    field = "train.sft.batch_rows" if name == "supervised" else "train.rl.micro_batch_rows"
    return f"fewer rows a device: more devices, or half of {field}"
