"""`apr plan`: what fits a TPU, found out without one. libtpu compiles for any topology on a CPU machine.

The life of a plan:
  1. `describe` asks libtpu for the topology's devices and lays the config's mesh over them.
  2. The supervised step and the rollout are lowered for abstract arguments: shapes with shardings, no data.
  3. Both are compiled, and the compiled programs asked for bytes a device, FLOPs, and the collectives in their HLO.

The vocabulary is trained on the demonstrations; a plan, made before any data, takes VOCAB for it.
"""

import collections
import dataclasses
import importlib.metadata
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apr_jax.config import ConfigError, Experiment
from apr_jax.errors import UsageError, UserError

VOCAB = 64  # Single characters and the control pieces are fewer.
PROMPT = 32  # P, tokens of a prompt.
_LIBTPU = (0, 0, 52)  # Older compilers abort on the rollout's loop.
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# "all-reduce(", or "all-reduce-start(" when it runs beside other work; its "-done(" is no second one.
_COLLECTIVE = re.compile(rf"\s({'|'.join(_COLLECTIVES)})(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Generation:
    """A TPU generation.

    Attributes:
      memory: GiB of HBM a JAX device.
      example: topologies that it has.
      cores: how libtpu joins a chip's cores into one device; None is its default.
    """

    memory: int
    example: str
    cores: str | None = None


GENERATIONS = {
    "v2": Generation(8, "v2:4x4"),
    "v3": Generation(16, "v3:4x4, v3:8x8 (= v3-128)"),
    "v4": Generation(32, "v4:2x2x1, v4:2x2x4", "megacore"),
    "v5e": Generation(16, "v5e:2x2, v5e:4x4, v5e:8x8, v5e:16x16"),
    "v5p": Generation(95, "v5p:2x2x1, v5p:4x4x4"),
    "v6e": Generation(32, "v6e:2x2, v6e:4x4, v6e:16x16"),
    "tpu7x": Generation(96, "tpu7x:2x2x1, tpu7x:2x2x2"),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program; bytes and FLOPs are those of one device.

    Attributes:
      argument_bytes: parameters, optimizer state, batch.
      output_bytes: results; those in the arguments' place count in `alias_bytes` too.
      temp_bytes: activations and other working space.
      alias_bytes: arguments whose memory the results take over (donation).
      flops: as XLA's cost analysis counts them. A loop's body counts once, so the rollout's are those of one pass.
      collectives: kind -> how many stand in the program.
      seconds: of compiling.
    """

    name: str
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    flops: float
    collectives: dict[str, int]
    seconds: float

    @property
    def total_bytes(self) -> int:
        """Most memory that the program needs on a device."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found for a topology.

    Attributes:
      memory_bytes: HBM of one device.
      failed: program -> why it could not be compiled, in a line.
    """

    topology: str
    devices: int
    kind: str
    memory_bytes: int
    parameters: int
    programs: tuple[Program, ...]
    failed: dict[str, str]


def plan(config: Experiment, topology: str) -> Plan:
    """Compiles the supervised step and the rollout for a topology.

    Raises:
      UsageError: the topology is unknown, or its devices don't fit the mesh or the batch.
      UserError: libtpu is missing or too old.
    """
    devices = describe(topology)
    import jax

    from apr_jax.model.sharding import make_mesh
    from apr_jax.model.transformer import count_params, init_params

    try:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    except ValueError as error:
        raise ConfigError(f"config {error}") from None
    params = jax.eval_shape(lambda: init_params(config.model, VOCAB, jax.random.key(0)))
    programs, failed = [], {}
    for name, lower in (("supervised step", _lower_sft), ("rollout", lower_rollout)):
        start = time.monotonic()
        try:
            compiled = lower(config, params, mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            failed[name] = _reason(str(error))
            continue
        programs.append(_measure(name, compiled, time.monotonic() - start))
    generation = GENERATIONS[topology.partition(":")[0]]
    return Plan(
        topology=topology,
        devices=len(devices),
        kind=devices[0].device_kind,
        memory_bytes=generation.memory * 2**30,
        parameters=count_params(params)[0],
        programs=tuple(programs),
        failed=failed,
    )


def describe(topology: str) -> list[Any]:
    """The devices of a topology, as libtpu describes them.

    Raises:
      UsageError: unknown topology; the message lists good ones.
      UserError: libtpu is missing or too old.
    """
    examples = ", ".join(generation.example for generation in GENERATIONS.values())
    name, _, shape = topology.partition(":")
    if name not in GENERATIONS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise UsageError(f"--topology {topology!r}: write it as generation:chips, one of {examples}")
    _require_libtpu()
    # libtpu asks the cloud's metadata server and a lock file who it is, unless told that it is a compiler only.
    for variable, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "4",
    }.items():
        os.environ.setdefault(variable, value)
    import jax
    from jax.experimental import topologies

    cores = GENERATIONS[name].cores
    options = {"chip_config_name": cores} if cores else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("; ")[0]
        raise UsageError(f"--topology {topology!r}: {reason}; good ones are {examples}") from None
    return list(found.devices)


def _require_libtpu() -> None:
    remedy = "pip install 'apr_jax[tpu]' (in the clone: .venv/bin/pip install -e '.[tpu]')"
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"apr plan: libtpu is not installed, and it is what compiles for TPUs: {remedy}") from None
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _LIBTPU:
        wanted = ".".join(map(str, _LIBTPU))
        raise UserError(f"apr plan: libtpu {version} is too old, its compiler aborts; {wanted} or newer: {remedy}")


def _lower_sft(config: Experiment, params: Any, mesh: Any) -> Any:
    """The supervised step for one batch of packed rows."""
    import jax
    import jax.numpy as jnp

    from apr_jax.data.packing import Rows
    from apr_jax.learn.optimizer import make_optimizer
    from apr_jax.learn.state import TrainState
    from apr_jax.learn.steps import check_divides, make_sft_step
    from apr_jax.model.sharding import batch_sharding, shardings

    sft = config.learn.sft
    check_divides("learn.sft.rows", sft.rows, mesh)
    optimizer = make_optimizer(sft.optimizer, sft.steps)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state: Any = TrainState(params, jax.eval_shape(optimizer.init, params), *[count] * 3)
    state = jax.tree.map(_placed, state, shardings(state, mesh))

    def row(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((sft.rows, config.limits.stream), dtype, sharding=batch_sharding(mesh))

    kinds = {"sampled": jnp.bool_, "logprob": jnp.float32, "allowed": jnp.uint8}
    rows = Rows(**{field.name: row(kinds.get(field.name, jnp.int32)) for field in dataclasses.fields(Rows)})
    step: Any = make_sft_step(config.model, optimizer, mesh)
    return step.lower(state, rows)


def lower_rollout(config: Experiment, params: Any, mesh: Any) -> Any:
    """The rollout of one step of reinforcement learning."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from apr_jax.learn.policy import make_policy_rollout
    from apr_jax.learn.steps import check_divides
    from apr_jax.model.sharding import batch_sharding, shardings
    from apr_jax.threads import Prompts

    trees = config.learn.rl.problems * config.learn.rl.group
    check_divides("learn.rl.problems x group", trees, mesh)

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
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec()))
    rollout: Any = make_policy_rollout(config.model, config.limits, config.schedule, mesh)
    return rollout.lower(jax.tree.map(_placed, params, shardings(params, mesh)), prompts, key)


def _placed(leaf: Any, sharding: Any) -> Any:
    import jax

    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _measure(name: str, compiled: Any, seconds: float) -> Program:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Program(
        name=name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        collectives=count_collectives(compiled.as_text()),
        seconds=seconds,
    )


def count_collectives(hlo: str) -> dict[str, int]:
    """Collectives by kind in a program's HLO text; an asynchronous pair counts once."""
    return dict(collections.Counter(match.group(1) for match in _COLLECTIVE.finditer(hlo)))


def _reason(error: str) -> str:
    """The sentence of libtpu's error that says how much memory was wanted, else its first line."""
    used = re.search(r"Used [\d.]+\w of [\d.]+\w hbm", error)
    return f"out of memory: {used.group(0)}" if used else error.strip().splitlines()[0][:200]


def show_plan(found: Plan, path: Path | None = None) -> None:
    """Prints the plan, and writes it as JSON if a path is given."""
    if path:
        path.write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n", encoding="utf-8")
    room = found.memory_bytes
    table = Table(title=f"{found.topology}: {found.devices} x {found.kind}, {_size(room)} each", title_justify="left")
    table.add_column("one device")
    lines: dict[str, list[str]] = collections.defaultdict(list)
    for program in found.programs:
        table.add_column(program.name, justify="right")
        fits = "fits" if program.total_bytes <= room else "[red]does not fit[/red]"
        counted = [f"{count} {kind}" for kind, count in sorted(program.collectives.items())]
        lines["arguments"].append(_size(program.argument_bytes))
        lines["working space"].append(_size(program.temp_bytes))
        lines["in all"].append(f"{_size(program.total_bytes)}, {fits}")
        lines["FLOPs"].append(f"{program.flops:.3g}")
        lines["collectives"].append("\n".join(counted) or "none")
        lines["compiled in"].append(f"{program.seconds:.0f} s")
    for name, values in lines.items():
        table.add_row(name, *values)
    console = Console(highlight=False)
    if found.programs:
        console.print(table)
    for name, reason in found.failed.items():
        console.print(f"{name}: [red]does not compile[/red]: {reason}")
    console.print(
        f"{found.parameters / 1e6:.1f}M parameters with a vocabulary of {VOCAB}. "
        "A loop's body counts once in FLOPs and collectives."
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
