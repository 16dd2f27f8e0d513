"""The tables of docs/guides/devices.md: what each stage of `prune` costs for Llama-3 8B and 70B.

    python bench/scale.py

Nothing is run and nothing is measured: operations and bytes come from
fastprune/pruning/estimate.py, seconds from dividing them by the rates below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastprune.pruning.config import PruneConfig
from fastprune.pruning.pipeline import run_prune
from fastprune.report.costs import teraflop
from fastprune.report.format import duration

MODELS = Path(__file__).parent.parent / "docs/models"
SETTINGS: dict[str, Any] = {
    "structures": ("attention", "mlp"),
    "align": 1,
    "calib_samples": 128,
    "calib_seq_len": 128,
    "ratio": 0.2,
    "layout": "uniform",
    "compensate": "least-squares",
    "exchange_rounds": 1,  # as --effort thorough has it
    "importance": "taylor-first",  # which costs more than the default
}

MEMORY = 141e9  # bytes of one H200
MATRIX, SINGLE = 790e12, 67e12  # FLOP/s: bf16 matrix products as measured; fp32 by data sheet
DISK = 7e9  # bytes/s of files


def seconds(stage: dict[str, Any], ranks: int) -> float:
    """The least time that ``stage`` can take: its products at full rate, then its files."""
    arithmetic = (stage["flops"] - stage["single"]) / MATRIX + stage["single"] / SINGLE
    return arithmetic + stage["read"] * ranks / DISK


def table(model: str, ranks: int, way: str) -> str:
    """One Markdown table: `way` is memory or stream."""
    config = PruneConfig(model=str(MODELS / model), dry_run=True, ranks=ranks, **SETTINGS)
    heads = ["stage", "TFLOP", "in fp32", "files", "device", "host", "least time"]
    rows = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for s in run_prune(config).metrics["costs"][way]:
        fits = "" if s["device_bytes"] <= MEMORY else " (too large)"
        sizes = [size(s["read"]), size(s["device_bytes"]) + fits, size(s["host_bytes"])]
        time = duration(seconds(s, ranks)) if not fits else "—"
        flops = [teraflop(s[key]) for key in ("flops", "single")]
        rows.append("| " + " | ".join([s["name"], *flops, *sizes, time]) + " |")
    return "\n".join(rows)


def size(n: int) -> str:
    """Bytes in decimal units, as memory is sold."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit:
            return f"{n / limit:.3g} {unit}"
    return f"{n} B" if n else "—"


def main() -> None:
    for model in ("llama-3-8b", "llama-3-70b"):
        for ranks in (1, 8):
            for way, name in (("memory", "in memory"), ("stream", "`--stream`")):
                # On 8: as data parallelism would be used, in memory where the model fits.
                if ranks == 1 or (way == "memory") == (model == "llama-3-8b"):
                    who = "one H200" if ranks == 1 else f"each of {ranks} H200"
                    print(f"### {model}, {name}, {who}\n\n{table(model, ranks, way)}\n")


if __name__ == "__main__":
    main()
