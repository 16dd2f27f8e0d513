"""What `--dry-run` says without running: bytes, layout, costs; and dry runs without any weights.

A model whose folder holds only a config.json is built on the meta device: its parameters have
shapes and no values. Sizes follow from the budget then, but no unit can be told from another, so
only allocations that measure nothing apply.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastprune.config import resolve_dtype
from fastprune.errors import InputError
from fastprune.models.adopted import check_known, config_with
from fastprune.models.checkpoint import written_form
from fastprune.models.dequantised import unquantised
from fastprune.models.load import load_config
from fastprune.models.multimodal import enclosing
from fastprune.models.skeleton import skeleton
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.estimate import Estimate
from fastprune.pruning.plan import Plan

log = logging.getLogger("fastprune")

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")


def lacks_weights(config: PruneConfig) -> bool:
    """Whether this is a dry run of a folder that holds a config and no weights at all."""
    folder = Path(config.model).expanduser()
    return (
        config.dry_run
        and (folder / "config.json").is_file()
        and not any(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))
    )


def sizes_only(config: PruneConfig) -> tuple[nn.Module, PruneConfig]:
    """The model on the meta device, and ``config`` with what can be decided without weights.

    A warning says so where the allocation asked for would have to measure. Raises InputError for
    what only a measurement can decide, and when there is a place to write to: a plan without scores
    names no units worth keeping.
    """
    if config.out is not None:
        raise InputError(
            f"{config.model} has no weights, so there are no scores and no plan to write; "
            "leave --out away, and use --json for the figures"
        )
    if config.target_latency is not None or "sublayer" in config.structures:
        wanted = "--structures sublayer" if config.target_latency is None else "--target-latency"
        raise InputError(
            f"{config.model} has no weights, and {wanted} has to run the model; leave it out, or "
            "give a folder with weights"
        )
    model_config = unquantised(load_config(config.model))
    dtype = resolve_dtype(config.dtype) or model_config.dtype or torch.float32
    model = skeleton(model_config, dtype)
    check_known(model, config.family)
    allocation = config.allocation
    by_file = allocation in ("inverse", "proportional") and Path(config.layer_importance).is_file()
    if config.plan is None and allocation not in ("auto", "uniform") and not by_file:
        log.warning(
            "%s has no weights, so --allocation %s cannot measure: sizes are those of uniform "
            "(also possible: --layer-importance FILE, --plan FILE)",
            config.model,
            allocation,
        )
    if not by_file:
        allocation = "uniform"
    return model, replace(config, allocation=allocation, importance="random", iterations=1)


def facts(model: nn.Module, plan: Plan, config: PruneConfig) -> dict[str, Any]:
    """The dtype, the layout of the result, and what the run would cost.

    ``model`` is uncut and may be on the meta device. Keys as in the metrics of a dry run.
    """
    result = skeleton(config_with(model.config, plan.result()), model.dtype)
    form = written_form(result)
    around = enclosing(model)
    written = form.config if around is None else around.model.config
    architectures = written.architectures or [type(around.model if around else model).__name__]
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "layout": {
            "kind": "per-layer" if form.per_layer else "uniform",
            "model_type": written.model_type,
            "architecture": architectures[0],
        },
        "costs": {
            "processes": config.ranks,
            **{
                name: list(map(asdict, Estimate(model, result, config, stream=stream).stages()))
                for name, stream in (("memory", False), ("stream", True))
            },
        },
    }
