"""Run a causal language model one decoder layer at a time.

Sensitivity, compensation, and search change one layer and want to reuse
everything before it. `Blocks` gives them the three parts of a forward pass
(embed, one layer, final norm) with exactly the arguments the model itself would
hand to its layers: they are recorded from the model's own forward, so masks and
rotary embeddings of every family come out right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.models.families import decoder_layers


class Blocks:
    """The decoder of ``model`` as separate steps; hidden states are (n, s, hidden).

    The model is not modified; run it in eval mode and choose gradients outside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self._arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (n, s) to the first layer's input; prepares ``run`` for this shape."""
        inputs: list[Tensor] = []
        arguments: list[dict[str, Any]] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not inputs:
                inputs.append(hidden)
            arguments.append(kwargs)
            return hidden

        with _replaced_forward(self.layers, record):
            self.model.model(input_ids=ids, use_cache=False)
        self._arguments[tuple(ids.shape)] = arguments
        return inputs[0]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Layer ``index`` on ``hidden`` of a shape that ``embed`` has seen."""
        return self.layers[index](hidden, **self._arguments[tuple(hidden.shape[:2])][index])

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm, whose output the language-model head reads."""
        return self.model.model.norm(hidden)


@contextmanager
def _replaced_forward(modules: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
