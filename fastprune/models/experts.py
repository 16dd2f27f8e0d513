"""Mixtures of experts: what a router does with tokens, and experts that are absent on trial.

Where the MLP of a layer is a mixture, a router chooses a few experts for each token, and the layer
adds their outputs, each times its gate. transformers keeps the experts of a layer in two
parameters: the gate and up rows of all channels (experts, 2·channels, hidden), and the down columns
(experts, hidden, channels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUTS, OUTPUT = "gate_up_proj", "down_proj"
"""The parameters of the module that holds the experts."""
PUBLISHED = {"mixtral": ("w1", "w3", "w2"), "others": ("gate_proj", "up_proj", "down_proj")}
"""What published checkpoints call the gate, up and down matrices of one expert, by family."""


@dataclass(frozen=True)
class Mixture:
    """Where the router and the experts of a decoder layer lie, by the paths of modules.

    ``always`` is the output module of the expert that every token takes, where there is one. The
    layer adds what ``block`` returns.
    """

    block: str = "mlp"
    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    always: str | None = None

    def router_of(self, layer: nn.Module) -> nn.Module | None:
        """The router of ``layer``; None where its MLP is no mixture, or is removed."""
        try:
            return layer.get_submodule(self.router)
        except AttributeError:
            return None


@dataclass(frozen=True)
class Visit:
    """The tokens that one expert is given: their inputs (t, hidden), their gates (t, 1), and the
    activations (t, channels) that its down columns read."""

    expert: int
    states: Tensor
    gates: Tensor
    inner: Tensor


def visits(experts: nn.Module, states: Tensor, chosen: Tensor, gates: Tensor) -> Iterator[Visit]:
    """What each expert is given that ``states`` (t, hidden) are routed to.

    ``chosen`` (t, k) are the experts of each token and ``gates`` (t, k) their weights.
    """
    for expert in chosen.unique().tolist():
        token, place = torch.where(chosen == expert)
        own = states[token]
        gate, up = F.linear(own, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        yield Visit(expert, own, gates[token, place, None], experts.act_fn(gate) * up)


@contextmanager
def observed(experts: nn.Module, see: Callable[[Visit], None]) -> Iterator[None]:
    """Inside the block ``see`` is called with every `Visit` to the module ``experts``."""

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for visit in visits(module, *inputs):
            see(visit)

    handle = experts.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def routing(router: nn.Module | None) -> AbstractContextManager[Any]:
    """Inside the block ``router`` chooses none of the experts whose row in it is all zeros.

    That is how an expert is absent on trial: the others get what the router gives them when the
    row is cut.
    """
    if router is None:
        return nullcontext()
    return _removing(router.register_forward_hook(_without_absent))


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _without_absent(
    router: nn.Module, _: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor] | None:
    there = router.weight.detach().any(dim=1)
    if bool(there.all()):
        return None
    logits, gates, chosen = output
    if not bool(there.any()):
        return logits, torch.zeros_like(gates), chosen
    logits = logits.masked_fill(~there, -torch.inf)
    best, chosen = logits.softmax(-1, dtype=torch.float32).topk(router.top_k, dim=-1)
    if getattr(router, "norm_topk_prob", True):  # Mixtral's always normalises
        best = best / best.sum(-1, keepdim=True)
    return logits, best.to(gates.dtype), chosen


def apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The gate, up and down matrices of all experts, (experts, channels, hidden) and the last
    (experts, hidden, channels), by names of their own.

    ``tensor`` is one of the two parameters of a layer that hold them; empty for any other. The
    matrices are views.
    """
    path, _, parameter = name.rpartition(".")
    if not path.endswith(".experts"):
        return {}
    gate, up, down = PUBLISHED["others"]
    parts = dict(zip((gate, up), tensor.chunk(2, 1))) if parameter == INPUTS else {down: tensor}
    return {f"{path}.{part}.weight": matrix for part, matrix in parts.items()}


def together(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` by name with what `apart` gave two names put together again."""
    gate, up, down = (f".experts.{part}.weight" for part in PUBLISHED["others"])
    found = {}
    for name, tensor in weights.items():
        if name.endswith(gate):
            path = name.removesuffix(gate)
            found[f"{path}.experts.{INPUTS}"] = torch.cat([tensor, weights[path + up]], 1)
        elif name.endswith(down):
            found[name.removesuffix(".weight")] = tensor
        elif not name.endswith(up):
            found[name] = tensor
    return found


def published(name: str, tensor: Tensor, family: str) -> dict[str, Tensor]:
    """The weight ``name`` of a model under the names that published checkpoints have for it.

    They keep the matrices of each expert apart, as engines read them; transformers puts them
    together. The tensors are views.
    """
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    layer, found, parameter = name.rpartition(".mlp.experts.")
    if not found:
        return {name.replace(".mlp.gate.", f".{block}.gate."): tensor}
    gate, up, down = PUBLISHED.get(family, PUBLISHED["others"])
    matrices: dict[str, Tensor] = {}
    for expert, own in enumerate(tensor):
        parts = dict(zip((gate, up), own.chunk(2))) if parameter == INPUTS else {down: own}
        prefix = f"{layer}.{block}.experts.{expert}"
        matrices |= {f"{prefix}.{part}.weight": matrix for part, matrix in parts.items()}
    return matrices
