"""AdamW's moments in a training script's checkpoint, under the names our model has.

An optimizer's state numbers the parameters in the order they were given to it: all in the order of
the model, or, in the manner of nanoGPT, the matrices that decay before the vectors that do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.models.checks import unwrapped
from fastprune.models.gpt2 import MASK, PROJECTION, bare, is_gpt2, is_linear
from fastprune.models.states import SavedState, read_state

KEYS = ("exp_avg", "exp_avg_sq")
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"

Moments = dict[str, dict[str, Tensor]]
"""By the name of a parameter: step (), exp_avg and exp_avg_sq of the parameter's shape."""


class Unusable(Exception):
    """The state is of another optimizer, or does not say which parameter is which."""


@dataclass(frozen=True)
class Found:
    """What an optimizer left for a model; without `moments` the `reason` says why not."""

    moments: Moments
    reason: str = ""


def moments_for(model: nn.Module, path: Path) -> Found:
    """The moments in the file `path` for the parameters of `model`, which was read from it."""
    saved = read_state(path)
    if not isinstance(saved.optimizer, Mapping):
        return Found({}, "it holds none")
    try:
        found = _by_name(saved)
    except Unusable as problem:
        return Found({}, str(problem))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    gpt2 = is_gpt2(saved.weights)
    turned = gpt2 and is_linear(saved.weights)
    moments: Moments = {}
    for name, state in found.items():
        own = unwrapped(name)
        if gpt2:
            own = bare(name) if bare(name) == HEAD else f"transformer.{bare(name)}"
        if turned and PROJECTION.fullmatch(bare(name)):
            state = state | {key: state[key].t() for key in KEYS}
        if all(state[key].shape == shapes.get(own) for key in KEYS):
            moments[own] = state
    return Found(moments, "" if moments else "its shapes are not those of the model")


def _by_name(saved: SavedState) -> dict[str, dict[str, Tensor]]:
    """The states of the parameters by their names in the file. Raises Unusable."""
    groups, states = saved.optimizer.get("param_groups"), saved.optimizer.get("state")
    if not isinstance(groups, list) or not isinstance(states, Mapping) or not states:
        raise Unusable("it has not stepped yet, or is not a torch optimizer")
    try:
        numbers = [number for group in groups for number in group["params"]]
        if not all(torch.is_tensor(state[key]) for state in states.values() for key in KEYS):
            raise Unusable("it is not an Adam")
        named = [name for group in groups for name in group.get("param_names", ())]
        known = {unwrapped(name): name for name in saved.weights}
        named = [known.get(unwrapped(name), name) for name in named]
    except (KeyError, TypeError, AttributeError) as error:
        raise Unusable("it is not an Adam") from error
    orders = [named] if named else _orders(saved, len(numbers))
    for order in orders:
        pairs = {name: states[n] for n, name in zip(numbers, order) if n in states}
        if len(order) == len(numbers) and all(
            name in saved.weights and state[key].shape == saved.weights[name].shape
            for name, state in pairs.items()
            for key in KEYS
        ):
            return {name: _tensors(state) for name, state in pairs.items()}
    raise Unusable(f"its {len(numbers)} parameters are not those of the weights beside it")


def _orders(saved: SavedState, count: int) -> list[list[str]]:
    """The orders in which the weights may have been given to the optimizer."""
    names = [
        name
        for name, value in saved.weights.items()
        if value.is_floating_point() and not MASK.fullmatch(bare(name))
    ]
    if len(names) == count + 1:  # the head is the embedding
        names = [name for name in names if bare(name) != HEAD]
    matrices = [name for name in names if saved.weights[name].dim() > 1]
    vectors = [name for name in names if saved.weights[name].dim() < 2]
    return [names, matrices + vectors, vectors + matrices]


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    step = torch.as_tensor(state.get("step", 0))
    return {"step": step, **{key: state[key].clone() for key in KEYS}}
