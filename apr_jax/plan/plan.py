"""The plan of a config for a topology: each stage compiled and counted, the whole recipe in hours.

The life of a plan:
  1. `topology.describe` asks libtpu for the devices, and the config's mesh is laid over them.
  2. `stages` lowers the four programs for abstract arguments; libtpu compiles them on this CPU
     machine.
  3. `hlo` counts what they do, loop by loop; `roofline` divides by what the chip can do (`chips`).
  4. `recipe` adds up hours and says what to change; `report` prints.
"""

import dataclasses
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from apr_jax.config import Experiment
from apr_jax.model.transformer import count_params
from apr_jax.paper.pipeline import METHODS
from apr_jax.plan.chips import CHIPS, Chip
from apr_jax.plan.programs import STAGES, abstract_params, lower
from apr_jax.plan.recipe import Recipe, advice, recipe
from apr_jax.plan.roofline import Stage, analyse
from apr_jax.plan.scaling import Point, weak_scaling
from apr_jax.plan.topology import describe
from apr_jax.train.session import build_mesh

# libtpu's own words for a program without room (0.0.52); it keeps some of the chip's memory for
# itself.
_SHORT = re.compile(r"required for [\w ]+ \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found for a topology.

    Attributes:
      mesh: axis -> devices.
      parameters: without embeddings.
      failed: stage -> why it could not be compiled, in a line.
      change: stage -> what to change so that it fits.
      recipes: method -> hours of its training; none where a program is missing.
      scaling: the supervised step on 8 to 1,024 chips.
    """

    topology: str
    chip: Chip
    chips: int
    devices: int
    kind: str
    mesh: dict[str, int]
    parameters: int
    stages: dict[str, Stage]
    failed: dict[str, str]
    change: dict[str, str]
    recipes: dict[str, Recipe]
    scaling: tuple[Point, ...]


def plan(config: Experiment, topology: str, wanted: Sequence[str] = STAGES) -> Plan:
    """Compiles and counts the stages for a topology.

    Raises:
      UsageError: the topology is unknown, or its devices don't fit the mesh or the batch.
      UserError: libtpu is missing or too old.
    """
    devices, chip = describe(topology), CHIPS[topology.partition(":")[0]]
    mesh = build_mesh(config, devices)
    stages, failed, change, room = {}, {}, {}, float(chip.device_memory)
    # All before the first takes its minutes to compile.
    lowered = {name: lower(name, config, mesh) for name in wanted}
    for name in wanted:
        start = time.monotonic()
        try:
            text, memory = compile_text(lowered.pop(name))
        except jax.errors.JaxRuntimeError as error:
            failed[name] = str(error).strip().splitlines()[0][:200]
            if short := _SHORT.search(str(error)):
                asked, had = (float(size) * 2**30 for size in short.groups())
                change[name] = advice(config, name, asked - had, 0.0, chip, mesh.shape["fsdp"])
            continue
        stages[name] = stage = analyse(
            name, text, memory, config, mesh, chip, time.monotonic() - start
        )
        if stage.total_bytes > room:
            over = stage.total_bytes - room
            change[name] = advice(
                config, name, over, stage.argument_bytes, chip, mesh.shape["fsdp"]
            )
    chips, parameters = mesh.size // chip.devices, count_params(abstract_params(config))[1]
    supervised = stages.get("supervised")
    return Plan(
        topology=topology,
        chip=chip,
        chips=chips,
        devices=mesh.size,
        kind=devices[0].device_kind,
        mesh=dict(mesh.shape),
        parameters=parameters,
        stages=stages,
        failed=failed,
        change=change,
        recipes=_recipes(config, stages, chips),
        scaling=weak_scaling(supervised, chip, dict(mesh.shape), parameters) if supervised else (),
    )


def _recipes(config: Experiment, stages: dict[str, Stage], chips: int) -> dict[str, Recipe]:
    """Hours of each method that `apr reproduce` trains."""
    found = {method: recipe(config, stages, chips, method) for method in METHODS}
    return {method: hours for method, hours in found.items() if hours is not None}


def compile_text(lowered: Any) -> tuple[str, Any]:
    """Compiles for TPU: the program's text, and its memory by kind (`Compiled.memory_analysis`).

    The text is that which libtpu writes. To `as_text` it must pass through jaxlib's own reader,
    which does not know all that libtpu does (jaxlib 0.10.2, libtpu 0.0.52: v5p's sparse cores)."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (written,) = Path(folder).glob("*.after_optimizations.txt")
        return written.read_text(encoding="utf-8"), compiled.memory_analysis()
