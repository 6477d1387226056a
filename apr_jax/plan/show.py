"""A plan as a table for people, and as JSON for programs."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from apr_jax.config import Experiment
from apr_jax.io.runtime import start
from apr_jax.io.storage import write_text
from apr_jax.io.terminal import Terminal, print_whole
from apr_jax.plan.measure_cpu import measure, show_measured
from apr_jax.plan.plan import Plan, plan
from apr_jax.plan.programs import STAGES, VOCAB
from apr_jax.plan.roofline import Stage


def show_topology(
    config: Experiment, topology: str, wanted: Sequence[str] = STAGES, path: Path | None = None
) -> bool:
    """Plans for a topology, or checks the counting on this machine ("cpu"); prints, and writes JSON
    if a path is given.

    Returns:
      whether all that was wanted compiles and fits.
    """
    if topology == "cpu":
        start()
        show_measured(measure(config), path)
        return True
    found = plan(config, topology, wanted)
    show_plan(found, path)
    return not found.failed and not found.change


def to_json(found: Plan) -> dict[str, Any]:
    """All of the plan, with what follows from it: seconds, bound, tokens/s, share of peak."""
    values = dataclasses.asdict(found)
    for name, stage in found.stages.items():
        values["stages"][name] |= {
            "total_bytes": stage.total_bytes,
            "fits": stage.total_bytes <= found.chip.device_memory,
            "seconds": stage.seconds,
            "bound": stage.bound,
            "tokens_per_second": stage.tokens / stage.seconds,
            "share_of_peak": share_of_peak(found, stage),
        }
    return values


def share_of_peak(found: Plan, stage: Stage) -> float:
    """Useful FLOPs a second at the roofline, against the chip's peak."""
    return stage.useful_flops / stage.seconds / found.chip.device_peak


def show_plan(found: Plan, path: Path | None = None) -> None:
    """Prints the plan, and writes it as JSON if a path is given."""
    if path:
        write_text(path, json.dumps(to_json(found), indent=2) + "\n")
    console, room = Terminal(highlight=False), found.chip.device_memory
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    title = f"{found.topology}: {found.devices} x {found.kind}, {_size(room)} each; mesh {mesh}"
    table = Table(title=title, title_justify="left")
    table.add_column("one device, one run")
    lines: dict[str, list[str]] = collections.defaultdict(list)
    for name, stage in found.stages.items():
        table.add_column(name, justify="right")
        fits = "fits" if stage.total_bytes <= room else "[red]does not fit[/red]"
        collective_costs = [
            f"{cost.count:.0f} {cost.kind} of {cost.devices}, {_size(cost.bytes)}"
            for cost in stage.collective_costs
        ]
        lines["arguments"].append(_size(stage.argument_bytes))
        lines["working space"].append(_size(stage.temp_bytes))
        lines["in all"].append(f"{_size(stage.total_bytes)}, {fits}")
        lines["FLOPs"].append(f"{stage.flops:.3g}")
        lines["HBM bytes"].append(f"{stage.bytes:.3g}")
        lines["collectives"].append("\n".join(collective_costs) or "none")
        lines["compute"].append(_seconds(stage.compute))
        lines["HBM"].append(_seconds(stage.memory))
        lines["interconnect"].append(_seconds(stage.interconnect))
        lines["at least"].append(f"{_seconds(stage.seconds)} ({stage.bound})")
        lines["tokens/s, all devices"].append(f"{stage.tokens / stage.seconds:,.0f}")
        lines["of peak FLOP/s"].append(f"{share_of_peak(found, stage):.0%}")
        lines["compiled in"].append(f"{stage.compiled:.0f} s")
    for name, values in lines.items():
        table.add_row(name, *values)
    if found.stages:
        print_whole(table, console)
    for name, reason in found.failed.items():
        console.print(f"{name}: [red]does not compile[/red]: {escape(reason)}")
    for name, what in found.change.items():
        console.print(f"{name}: does not fit; {what}")
    for stage in found.stages.values():
        for length, (moved, must) in stage.decode.items():
            console.print(
                f"decode step, contexts of {length}: {_size(moved)}, {moved / must:.2f} x (weights"
                " + cache up to there)"
            )
    if found.scaling:
        steps = ", ".join(f"{point.chips}: {_seconds(point.seconds)}" for point in found.scaling)
        console.print(f"supervised step, as many rows a chip, on so many chips: {steps}")
    for method, hours in found.recipes.items():
        console.print(
            f"{method}, at least: supervised {hours.supervised:.2g} h ({hours.steps:,} steps),"
            f" reinforcement {hours.reinforced:.2g} h, {hours.chip_hours:,.0f} chip hours"
        )
    if found.recipes:
        console.print("`apr reproduce` trains both methods, and more with evaluate.ablations=true")
    console.print(
        f"{found.parameters / 1e6:.1f}M parameters without embeddings; a vocabulary of {VOCAB}."
        " docs/scale.md: how to read this"
    )


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 10 else f"{1000 * value:.1f} ms"
