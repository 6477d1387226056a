"""Prints a plan as a table, and writes it as JSON for programs."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from apr_jax.config import Experiment
from apr_jax.io.json_files import write_json
from apr_jax.io.runtime import start
from apr_jax.io.terminal import Terminal, print_whole
from apr_jax.plan.measure_cpu import measure, show_measured
from apr_jax.plan.plan import Plan, plan
from apr_jax.plan.programs import STAGES
from apr_jax.plan.roofline import Stage


def show_topology(
    config: Experiment,
    topology: str,
    vocab: int,
    wanted: Sequence[str] = STAGES,
    path: Path | None = None,
) -> bool:
    """Plans for a topology, or checks the counting on this machine if it is "cpu".

    Prints the plan, and writes it as JSON if a path is given. `vocab` is the size of the tokenizer.

    Returns:
      whether all wanted stages compile and fit into memory.
    """
    if topology == "cpu":
        start()
        show_measured(measure(config, vocab), path)
        return True
    made = plan(config, topology, vocab, wanted)
    show_plan(made, path)
    return not made.failed and not made.change


def to_json(plan: Plan) -> dict[str, Any]:
    """Returns the whole plan, with the values that follow from it for each stage."""
    values = dataclasses.asdict(plan)
    for name, stage in plan.stages.items():
        values["stages"][name] |= {
            "total_bytes": stage.total_bytes,
            "fits": stage.total_bytes <= plan.chip.device_memory,
            "seconds": stage.seconds,
            "bound": stage.bound,
            "tokens_per_second": stage.tokens / stage.seconds,
            "share_of_peak": share_of_peak(plan, stage),
        }
    return values


def share_of_peak(plan: Plan, stage: Stage) -> float:
    """Returns the useful FLOP/s of a stage at its roofline, as a share of the chip's peak."""
    return stage.useful_flops / stage.seconds / plan.chip.device_peak


def show_plan(plan: Plan, path: Path | None = None) -> None:
    """Prints the plan, and writes it as JSON if a path is given."""
    if path:
        write_json(path, to_json(plan))
    console = Terminal(highlight=False)
    if plan.stages:
        print_whole(_table(plan), console)

    for name, reason in plan.failed.items():
        console.print(f"{name}: [red]does not compile[/red]: {escape(reason)}")
    for name, remedy in plan.change.items():
        console.print(f"{name}: does not fit; {remedy}")
    for stage in plan.stages.values():
        for length, (moved, least) in stage.decode.items():
            console.print(
                f"decode step, contexts of {length}: {_size(moved)}, {moved / least:.2f} x (weights"
                " + cache up to there)"
            )
    if plan.scaling:
        steps = ", ".join(f"{point.chips}: {_seconds(point.seconds)}" for point in plan.scaling)
        console.print(f"supervised step by chips, with the same rows on each chip: {steps}")
    for method, hours in plan.recipes.items():
        console.print(
            f"{method}, at least: supervised {hours.supervised:.2g} h ({hours.steps:,} steps),"
            f" reinforcement {hours.reinforced:.2g} h, {hours.chip_hours:,.0f} chip hours"
        )
    if plan.recipes:
        console.print("`apr reproduce` trains both methods, and more with evaluate.ablations=true")
    console.print(
        f"{plan.parameters / 1e6:.1f}M parameters without embeddings; a vocabulary of"
        f" {plan.vocabulary}. docs/scale.md: how to read this"
    )


def _table(plan: Plan) -> Table:
    """Returns the stages as a table: a column for each stage."""
    memory = plan.chip.device_memory
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    title = f"{plan.topology}: {plan.devices} x {plan.kind}, {_size(memory)} each; mesh {mesh}"
    table = Table(title=title, title_justify="left")
    table.add_column("one device, one run")
    rows: dict[str, list[str]] = collections.defaultdict(list)
    for name, stage in plan.stages.items():
        table.add_column(name, justify="right")
        fits = "fits" if stage.total_bytes <= memory else "[red]does not fit[/red]"
        collectives = [
            f"{cost.count:.0f} {cost.kind} of {cost.devices}, {_size(cost.bytes)}"
            for cost in stage.collective_costs
        ]
        rows["arguments"].append(_size(stage.argument_bytes))
        rows["working space"].append(_size(stage.temp_bytes))
        if any(each.carried_bytes for each in plan.stages.values()):
            rows["carried trees beside it"].append(_size(stage.carried_bytes))
        rows["in all"].append(f"{_size(stage.total_bytes)}, {fits}")
        rows["FLOPs"].append(f"{stage.flops:.3g}")
        rows["HBM bytes"].append(f"{stage.bytes:.3g}")
        rows["collectives"].append("\n".join(collectives) or "none")
        rows["compute"].append(_seconds(stage.compute))
        rows["HBM"].append(_seconds(stage.memory))
        rows["interconnect"].append(_seconds(stage.interconnect))
        rows["at least"].append(f"{_seconds(stage.seconds)} ({stage.bound})")
        rows["tokens/s, all devices"].append(f"{stage.tokens / stage.seconds:,.0f}")
        rows["of peak FLOP/s"].append(f"{share_of_peak(plan, stage):.0%}")
        rows["compiled in"].append(f"{stage.compiled:.0f} s")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def _seconds(value: float) -> str:
    """Seconds in words."""
    return f"{value:.1f} s" if value >= 10 else f"{1000 * value:.1f} ms"
