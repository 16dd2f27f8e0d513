"""Weights of a model in layers that are larger than its own: what is added is exact zeros.

Zeros in q, k and v give a head that attends to every token alike and reads nothing, zero columns of
o_proj that add nothing; a channel of zeros adds nothing either. The logits stay what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    own, like = model.state_dict(), next(model.parameters()).detach()
    names = {new: old for old, new in layers.items()}
    state = {}
    for name, wanted in shapes.items():
        source = name
        if match := LAYER_KEY.fullmatch(name):
            source = f"model.layers.{names[int(match[1])]}.{match[2]}"
        if source in own:
            state[name] = padded(own[source], wanted.shape)
        else:
            fill = like.new_ones if "norm" in name else like.new_zeros
            state[name] = fill(wanted.shape)
    return state


def added_bytes(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """Bytes by which the weights `state` are larger than those of `model`, tied ones counted once.

    Layers of which nothing is left have no weights in either.
    """
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    return sum(t.numel() * t.element_size() for t in state.values()) - before


def padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` with zeros after its last entry of each dimension, up to `shape`; itself if it has
    that shape."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor.contiguous()
    result = tensor.new_zeros(shape)
    result[tuple(slice(n) for n in tensor.shape)] = tensor
    return result
