"""Weights of a model in layers that are larger than its own: what is added is exact zeros.

Zeros in q, k and v give a head that attends to every token alike and reads nothing, zero columns of
o_proj that add nothing; a channel of zeros adds nothing either. The logits stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastprune.models.checkpoint import LAYER_KEY


def padded_state(
    model: nn.Module, shapes: Mapping[str, Tensor], layers: Mapping[int, int]
) -> dict[str, Tensor]:
    """The weights of `model` in tensors of `shapes`, which may be on the meta device.

    `layers` maps the number of a layer in `model` to its number in the names of `shapes`. A tensor
    is put at the beginning of each dimension, so that KV groups and channels keep their numbers and
    added ones follow. A sublayer that `model` does not have becomes zeros, its norms ones. Tensors
    that keep their shape are those of `model`, not copies.
    """
    own = model.state_dict()
    names = {new: old for old, new in layers.items()}
    state = {}
    for name, wanted in shapes.items():
        source = name
        if match := LAYER_KEY.fullmatch(name):
            source = f"model.layers.{names[int(match[1])]}.{match[2]}"
        state[name] = _padded(own.get(source), wanted.shape, model, norm="norm" in name)
    return state


def added_bytes(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Bytes by which the weights `state` are larger than those of `model`, tied ones counted once.

    Layers of which nothing is left have no weights in either.
    """
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    return sum(t.numel() * t.element_size() for t in state.values()) - before


def _padded(tensor: Tensor | None, shape: torch.Size, model: nn.Module, *, norm: bool) -> Tensor:
    if tensor is not None and tensor.shape == shape:
        return tensor.contiguous()
    like = next(model.parameters())
    result = like.new_ones(shape) if norm else like.new_zeros(shape)
    if tensor is not None:
        result[tuple(slice(n) for n in tensor.shape)] = tensor
    return result.detach()
