"""What was written is read again and compared with the model in memory, before it counts.

A config that cannot say what the model is, a tensor that was left out, a rope that is computed from
other sizes: none of these shows in memory, and all of them in the files.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from fastprune.errors import FastpruneError, InputError
from fastprune.models.load import load_model
from fastprune.sharding import is_sharded

WINDOWS, LENGTH = 2, 64
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 2e-2
"""Relative error of the logits, ‖read − in memory‖ / ‖in memory‖, that is allowed.

The weights are the same to the bit; only the order of sums may differ, which in half precision
rounds each activation differently by 2⁻⁹ to 2⁻¹² on the way through the layers.
"""

log = logging.getLogger("fastprune")


class ReadBackError(FastpruneError):
    """A folder that was written does not load, or does not give the model that was in memory."""


@torch.no_grad()
def check_read_back(model: nn.Module, directory: Path, base: str | Path | None = None) -> None:
    """Load the checkpoint in `directory` and compare its logits with those of `model`.

    With `base`, `directory` holds a LoRA adapter, which is put onto the model that `base` names.
    Raises ReadBackError.
    """
    if is_sharded(model):  # its weights are gathered only while all processes call it
        return
    device = _room_for(model)
    try:
        read, _ = load_model(
            directory if base is None else base,
            dtype=model.dtype if base is not None else "auto",
            device=device,
            adapter=None if base is None else directory,
        )
    except InputError as error:
        raise ReadBackError(
            f"the result was written but does not load again ({error}); nothing was kept. This is "
            "a fault of fastprune: please report it with the model's config.json"
        ) from error
    check_same(model, read)


@torch.no_grad()
def check_same(model: nn.Module, read: nn.Module) -> None:
    """Compare the logits of `read`, what was written and loaded again, with those of `model`.

    Tokens are random; two windows of 64. Raises ReadBackError.
    """
    training = model.training
    model.eval()
    difference = logits_difference(model, read)
    model.train(training)
    tolerance = TOLERANCES.get(model.dtype, HALF_TOLERANCE)
    if not difference <= tolerance:
        raise ReadBackError(
            f"the result reads back as another model: logits differ by {difference:.1e} of their "
            f"size, more than rounding explains ({tolerance:g}); nothing was kept. This is a fault "
            "of fastprune: please report it with the model's config.json"
        )


@torch.no_grad()
def logits_difference(model: nn.Module, read: nn.Module) -> float:
    """‖read − model‖ / ‖model‖ of the logits of two models in eval mode, on random tokens."""
    windows = _windows(model)
    difference = _difference(_logits(model, windows), _logits(read, windows))
    log.info("read back: logits differ by %.1e of their size", difference)
    return difference


def _room_for(model: nn.Module) -> torch.device:
    """The device of `model` if a second one fits there, else the CPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return device
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    free, _ = torch.cuda.mem_get_info(device)
    return device if free > 1.2 * size else torch.device("cpu")


def _windows(model: nn.Module) -> Tensor:
    positions = getattr(model.config, "max_position_embeddings", None) or LENGTH
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (WINDOWS, min(LENGTH, positions)), generator=generator)


def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    ids = windows.to(next(model.parameters()).device)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model(**inputs, use_cache=False).logits.float().cpu()


def _difference(own: Tensor, other: Tensor) -> float:
    """‖other − own‖ / ‖own‖ where `own` is finite; infinite where shapes or finiteness differ."""
    if own.shape != other.shape:
        return float("inf")
    finite = own.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return float("inf")
    own, other = own[finite], other[finite]
    return ((other - own).norm() / own.norm().clamp(min=1e-30)).item()
