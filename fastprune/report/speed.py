"""How fast models read and write, as a table: one row a workload, one column a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastprune.report import format


def speed_rows(speed: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The workload, then a cell for each model of `speed`, as `measure_speeds` gives them as JSON.

    A cell has the median tokens a second and, in brackets, the slowest and the fastest turn; those
    after the first also how many times as fast as the first model that is.
    """
    models = list(speed.values())
    table = []
    for kind, label in (("prompt", _prompt), ("decoding", _decoding)):
        for same in zip(*(model[kind] for model in models), strict=True):
            rates = [measured["tokens_per_second"] for measured in same]
            table.append((label(same[0]), *_cells(rates)))
    memory = [model["peak_memory_bytes"] for model in models]
    table.append(("peak memory, reading and decoding", *map(format.size, memory)))
    return table


def _prompt(measured: Mapping[str, Any]) -> str:
    return f"prompt of {measured['tokens']:,}, tokens/s"


def _decoding(measured: Mapping[str, Any]) -> str:
    return f"decoding, batch {measured['batch']}, tokens/s"


def _cells(rates: Sequence[Mapping[str, float]]) -> list[str]:
    cells = [f"{_rate(r['median'])} ({_rate(r['low'])}–{_rate(r['high'])})" for r in rates]
    first = rates[0]["median"]
    faster = [f" {format.factor(first, rate['median'])}" for rate in rates[1:]]
    return [cells[0], *(cell + times for cell, times in zip(cells[1:], faster, strict=True))]


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.1f}"
