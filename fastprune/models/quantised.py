"""Weights in 8 or 4 bits, in memory, to run a model where it does not fit otherwise.

torchao stores the weights of the layers' projections as integers with a scale for each row (8 bits)
or group (4 bits) and multiplies with what they stand for. Embeddings and head stay as they are, and
nothing of it is saved.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastprune.errors import InputError
from fastprune.models.checks import DECODER_LAYER, reason
from fastprune.models.quiet import quiet_libraries

ADAPTER = ".lora_"

log = logging.getLogger("fastprune")


def quantise(model: nn.Module, bits: int) -> None:
    """Store the projections in the layers of `model`, in place, in `bits` bits, 8 or 4.

    Raises InputError where torchao is missing, has nothing to quantise in this model, or cannot
    multiply such weights on the model's device.
    """
    if importlib.util.find_spec("torchao") is None:
        raise InputError("--quantize needs the package torchao: pip install 'fastprune[quantize]'")
    projections = [name for name, module in model.named_modules() if _is_projection(module, name)]
    if not projections:
        raise InputError(
            f"--quantize: {type(model).__name__} has no linear layers that could be quantised"
        )
    try:
        with quiet_libraries(), _no_warnings_logged():
            from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

            scheme = Int8WeightOnlyConfig(version=2) if bits == 8 else Int4WeightOnlyConfig()
            quantize_(model, scheme, filter_fn=_is_projection)
            first = model.get_submodule(projections[0])
            with torch.no_grad():
                first(torch.zeros(1, first.in_features, dtype=model.dtype, device=model.device))
    except Exception as error:  # it lacks a kernel, or the library that has it
        raise InputError(
            f"--quantize {bits}: does not run on this device ({reason(error)})"
            + ("; use --quantize 8" if bits == 4 else "")
        ) from error
    log.info("%d projections hold their weights in %d bits", len(projections), bits)


@contextmanager
def _no_warnings_logged() -> Iterator[None]:
    """torchao logs which of its compiled parts this machine cannot use, once it is imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _is_projection(module: nn.Module, name: str) -> bool:
    inside = DECODER_LAYER.search(name) and ADAPTER not in name
    return isinstance(module, nn.Linear) and bool(inside)
