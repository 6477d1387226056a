"""The plan of a config for a topology: each program compiled and counted, each training in hours.

The life of a plan:

1. `topology.describe` asks libtpu for the devices, and the config's mesh is laid over them.
2. `programs.lower` lowers the four programs for abstract arguments; libtpu compiles them on this
   CPU machine.
3. `count` counts what they do, loop by loop; `roofline` divides that by what the chip can do
   (`chips`).
4. `recipe` adds up the hours and says what to change; `show` prints.
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

# libtpu's message (0.0.52) for a program that needs too much memory. The available memory is less
# than the chip's, because libtpu keeps some for itself.
_SHORT = re.compile(r"required for [\w ]+ \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a config for a topology.

    Attributes:
      topology: its name, for example "v5e:4x4".
      chip: properties of its chips.
      chips, devices: their numbers.
      kind: kind of the devices, as JAX names it.
      mesh: axis -> number of devices.
      parameters: parameters of the model, without embeddings.
      vocabulary: size of the tokenizer.
      stages: stage -> its counted program.
      failed: stage -> why it could not be compiled, in a line.
      change: stage -> what to change so that it fits into memory.
      recipes: method -> hours of its training; a method is left out if a program is missing.
      scaling: the supervised step on 8 to 1,024 chips.
    """

    topology: str
    chip: Chip
    chips: int
    devices: int
    kind: str
    mesh: dict[str, int]
    parameters: int
    vocabulary: int
    stages: dict[str, Stage]
    failed: dict[str, str]
    change: dict[str, str]
    recipes: dict[str, Recipe]
    scaling: tuple[Point, ...]


def plan(config: Experiment, topology: str, vocab: int, wanted: Sequence[str] = STAGES) -> Plan:
    """Compiles and counts the wanted stages for a topology.

    Args:
      config: the experiment.
      topology: generation and chips, for example "v5e:4x4".
      vocab: size of the tokenizer.
      wanted: the stages.

    Raises:
      UsageError: the topology is unknown, or its devices do not fit the mesh or the batch.
      UserError: libtpu is missing or too old.
    """
    devices = describe(topology)
    chip = CHIPS[topology.partition(":")[0]]
    mesh = build_mesh(config, devices)
    fsdp = mesh.shape["fsdp"]
    stages: dict[str, Stage] = {}
    failed: dict[str, str] = {}
    change: dict[str, str] = {}

    # A wrong config fails while a stage is lowered, so all are lowered before the first one takes
    # its minutes to compile.
    params = abstract_params(config, vocab)
    lowered = {name: lower(name, config, params, mesh) for name in wanted}
    for name in wanted:
        start = time.monotonic()
        try:
            text, memory = compile_text(lowered.pop(name))
        except jax.errors.JaxRuntimeError as error:
            failed[name] = str(error).strip().splitlines()[0][:200]
            if short := _SHORT.search(str(error)):
                needed, available = (float(size) * 2**30 for size in short.groups())
                change[name] = advice(config, name, needed - available, 0.0, chip, fsdp)
            continue
        seconds = time.monotonic() - start
        stage = analyse(name, text, memory, config, mesh, chip, seconds)
        stages[name] = stage
        over = float(stage.total_bytes - chip.device_memory)
        if over > 0:
            change[name] = advice(config, name, over, stage.argument_bytes, chip, fsdp)

    chips = mesh.size // chip.devices
    parameters = count_params(params)[1]
    scaling: tuple[Point, ...] = ()
    if "supervised" in stages:
        scaling = weak_scaling(stages["supervised"], chip, dict(mesh.shape), parameters)
    return Plan(
        topology=topology,
        chip=chip,
        chips=chips,
        devices=mesh.size,
        kind=devices[0].device_kind,
        mesh=dict(mesh.shape),
        parameters=parameters,
        vocabulary=vocab,
        stages=stages,
        failed=failed,
        change=change,
        recipes=_recipes(config, stages, chips),
        scaling=scaling,
    )


def _recipes(config: Experiment, stages: dict[str, Stage], chips: int) -> dict[str, Recipe]:
    """Hours of each method that `apr reproduce` trains, if all its programs compiled."""
    recipes = {method: recipe(config, stages, chips, method) for method in METHODS}
    return {method: hours for method, hours in recipes.items() if hours is not None}


def compile_text(lowered: Any) -> tuple[str, Any]:
    """Compiles a lowered program for TPU.

    Returns:
      the program's text, and its memory by kind (`Compiled.memory_analysis`).
    """
    # libtpu writes the text into a file. `Compiled.as_text` would read it with jaxlib, which does
    # not know everything that libtpu writes (jaxlib 0.10.2, libtpu 0.0.52: v5p's sparse cores).
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (written,) = Path(folder).glob("*.after_optimizations.txt")
        return written.read_text(encoding="utf-8"), compiled.memory_analysis()
