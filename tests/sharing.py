"""What a run measures on calibration text; `test_distributed.py` runs it alone and under torchrun.

    torchrun --nproc-per-node 2 tests/sharing.py CHECKPOINT TEXT FOLDER

prunes CHECKPOINT into folders of FOLDER, and leaves there what the first process measured.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import precise  # noqa: F401
import torch
from calibrated import by_kind, calibrated
from counting import keeping
from tiny import tiny_model, token_ids

from fastprune import cli
from fastprune.distributed import ALONE, Processes, joined
from fastprune.inspect.perplexity import evaluate
from fastprune.models.families import decoder_layers, geometries
from fastprune.pruning.budget import layer_size
from fastprune.pruning.compensation import compensate
from fastprune.pruning.curves import Search, measure_curves
from fastprune.pruning.importance import score
from fastprune.pruning.plan import Plan
from fastprune.pruning.sensitivity import removal

METHODS = ("taylor-first", "taylor-vector", "activation-maw", "obs")
RUNS = {
    "memory": ["--allocation", "inverse", "--compensate", "least-squares"],
    "stream": ["--allocation", "inverse", "--compensate", "least-squares", "--stream"],
    "search": ["--allocation", "search", "--importance", "activation-maw"],
    "search-stream": ["--allocation", "search", "--importance", "activation-maw", "--stream"],
}
"""Flags of the runs of `prune`, by the folder each leaves."""


def prune(checkpoint: Path, text: Path, folder: Path) -> list[int]:
    """Every run of RUNS into ``folder``; their exit statuses."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # measured levels of the search
    common = ["--ratio", "0.25", "--eval-seq-len", "512", "--eval-windows", "5", "--quiet"]
    common += ["--calib", str(text), "--eval", str(text)]
    common += ["--calib-samples", "36", "--calib-seq-len", "64", "--sensitivity-samples", "5"]
    return [
        cli.main(["prune", str(checkpoint), "--out", str(folder / name), *common, *flags])
        for name, flags in RUNS.items()
    ]


def measure(windows: int, processes: Processes = ALONE) -> dict[str, torch.Tensor]:
    """Everything that is a sum over calibration windows, of so many windows of 512 tokens.

    A batch of the moments is four windows.
    """
    model = tiny_model("qwen2", layers=2)
    ids = token_ids(windows, 512)
    found = {}
    for method in METHODS:
        scores = score(calibrated(model, ids, processes), method)
        found[f"{method} attention"] = torch.cat(by_kind(scores, "attention"))
        found[f"{method} mlp"] = torch.cat(by_kind(scores, "mlp"))
    found["removal"] = torch.tensor(removal(calibrated(model, ids, processes))[0])
    found["perplexity"] = torch.tensor(
        evaluate(model, ids, batch_size=1, processes=processes).perplexity
    )
    if windows > 1:
        scores = score(calibrated(model, ids, processes), "magnitude-l2")
        sizes = [layer_size(layer, ("attention", "mlp")) for layer in decoder_layers(model)]
        curves = measure_curves(Search(calibrated(model, ids, processes), scores), sizes)
        found["curves"] = torch.tensor([v for c in curves for v in c.divergence])
    refits = compensate(calibrated(model, ids, processes), half(model))
    found["errors"] = torch.tensor([r.error_after for r in refits])
    found |= {f"weight {name}": p.detach() for name, p in model.named_parameters()}
    return found


def half(model: torch.nn.Module) -> Plan:
    """Half of every sublayer."""
    sizes = tuple(geometries(model))
    groups, channels = range(0, sizes[0].kv_heads, 2), range(0, sizes[0].channels, 2)
    return Plan(sizes, tuple(keeping(i, (*groups,), (*channels,)) for i in range(len(sizes))))


def main(checkpoint: Path, text: Path, folder: Path) -> int:
    """What torchrun starts."""
    with joined("cpu") as processes:
        assert processes.count == 2
        measured = {n: measure(n, processes) for n in (9, 1)}
        torch.save(measured, folder / f"measured-{processes.rank}.pt")
    return max(prune(checkpoint, text, folder))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
