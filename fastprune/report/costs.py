"""What a dry run prints of its costs: the layout, a line for every stage."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from fastprune.printing import Console
from fastprune.report import format

WAYS = {"memory": "in memory", "stream": "--stream"}


def show_costs(out: Console, result: dict[str, Any]) -> None:
    """Print the layout of a dry run's result, and what the run would take, by estimate."""
    layout = result["layout"]
    readers = {
        "uniform": "any engine loads it",
        "per-layer": "loads with fastprune, or with trust_remote_code=True",
    }
    written = f"{layout['kind']}: {layout['architecture']} in {result['dtype']}"
    line = f"layout   {written}, {readers[layout['kind']]}"
    out.print(Text(line), soft_wrap=True)
    processes = result["costs"]["processes"]
    who = "one process" if processes == 1 else f"each of {processes} processes"
    for key, name in WAYS.items():
        out.print()
        out.print(Text(f"estimated, not measured: {name}, {who}"), soft_wrap=True)
        out.print(stage_table(result["costs"][key]))


def stage_table(stages: list[dict[str, Any]]) -> Table:
    """One row per stage; those that the settings do not ask for are dim."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")  # fits 80 columns
    table.add_column("stage", no_wrap=True)
    for heading in ("TFLOP", "in fp32", "files", "device", "host"):
        table.add_column(heading, justify="right")
    for stage in stages:
        sizes = ("read", "device_bytes", "host_bytes")
        table.add_row(
            stage["name"],
            *(teraflop(stage[key]) for key in ("flops", "single")),
            *(format.size(stage[key]) if stage[key] else "—" for key in sizes),
            style=None if stage["runs"] else "dim",
        )
    return table


def teraflop(flops: int) -> str:
    """Operations in units of 10¹², to three digits or to the unit."""
    return f"{flops / 1e12:,.0f}" if flops >= 1e14 else f"{flops / 1e12:.3g}"
