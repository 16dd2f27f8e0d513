"""Scores of KV groups and channels: Taylor, magnitude, activation, random.

Taylor scores are means over the calibration windows of the per-window term, so
they do not depend on how windows are batched: one backward pass a window, in
which every parameter's gradient is reduced to unit scores by the `taylor`
kernel and freed as soon as it exists. Peak memory is therefore the weights, one
parameter's gradient, and one window's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastprune.errors import NumericalError
from fastprune.inspect.perplexity import decoder_and_head, loss_and_hidden_grad
from fastprune.kernels import ops
from fastprune.models.families import (
    Slice,
    attention_slices,
    decoder_layers,
    geometries,
    mlp_slices,
)
from fastprune.precision import fast_forward
from fastprune.progress import track

TAYLOR = {
    "taylor-first": "first",
    "taylor-second": "second",
    "taylor-mix": "mix",
    "taylor-vector": "vector",
}
MAGNITUDE = {"magnitude-l1": "l1", "magnitude-l2": "l2"}
METHODS = (*TAYLOR, *MAGNITUDE, "activation", "random")


@dataclass
class Scores:
    """Importance per unit, higher is kept: fp64 CPU tensors, one per layer.

    ``attention[l]`` has shape (kv_heads,), ``mlp[l]`` (channels,).
    """

    attention: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)

    def finite(self) -> bool:
        return all(bool(s.isfinite().all()) for s in [*self.attention, *self.mlp])


def score(model: nn.Module, windows: Tensor, method: str, *, seed: int = 0) -> Scores:
    """Score every unit of ``model`` by ``method`` on token ``windows`` (n, s).

    Magnitude and random need no windows. The model is left as it was.
    Raises NumericalError when a score is not finite, and ValueError for an unknown method.
    """
    if method in TAYLOR:
        scores = _taylor(model, windows, TAYLOR[method])
    elif method in MAGNITUDE:
        scores = _sums(model, lambda layer, s: _reduce(s, layer, MAGNITUDE[method]))
    elif method == "activation":
        norms = input_norms(model, windows)
        scores = _sums(
            model,
            lambda layer, s: (
                _reduce(s, layer, "activation", x=norms[_module(layer, s)])
                if s.parameter == "weight"
                else None
            ),
        )
    elif method == "random":
        generator = torch.Generator().manual_seed(seed)
        sizes = geometries(model)
        scores = Scores(
            [torch.rand(g.kv_heads, generator=generator, dtype=torch.float64) for g in sizes],
            [torch.rand(g.channels, generator=generator, dtype=torch.float64) for g in sizes],
        )
    else:
        raise ValueError(f"unknown importance '{method}'; known: {', '.join(METHODS)}")
    if not scores.finite():
        raise NumericalError(
            f"the {method} scores are not finite: the weights or the activations hold NaN or Inf; "
            "run `fastprune diagnose` on the model"
        )
    return scores


def _module(layer: nn.Module, s: Slice) -> nn.Module:
    return layer.get_submodule(s.module)


def _reduce(
    s: Slice, layer: nn.Module, kind: str, grad: Tensor | None = None, x: Tensor | None = None
) -> Tensor:
    """Unit sums (units,) of one parameter's terms."""
    parameter = layer.get_parameter(s.name).detach()
    if grad is not None:
        parameter = parameter.to(grad.dtype)
    rows, columns = ops.taylor(parameter, grad, x=x, kind=kind)
    return (rows if s.dim == 0 else columns).double().view(-1, s.width).sum(1)


def _sums(model: nn.Module, term: Callable[[nn.Module, Slice], Tensor | None]) -> Scores:
    scores = Scores()
    for layer in decoder_layers(model):
        for slices, out in (
            (attention_slices(layer), scores.attention),
            (mlp_slices(layer), scores.mlp),
        ):
            terms = [t for s in slices if (t := term(layer, s)) is not None]
            total = sum(terms[1:], terms[0]) if terms else torch.zeros(0, dtype=torch.float64)
            out.append(total.cpu())
    return scores


def _taylor(model: nn.Module, windows: Tensor, kind: str) -> Scores:
    layers = decoder_layers(model)
    device = next(model.parameters()).device
    scores = Scores(
        [torch.zeros(g.kv_heads, dtype=torch.float64, device=device) for g in geometries(model)],
        [torch.zeros(g.channels, dtype=torch.float64, device=device) for g in geometries(model)],
    )
    # Gradients of a mean loss underflow in fp16: the loss is scaled, and the gradient scaled back
    # in fp32 before its reduction.
    scale = 2.0**12 if next(layers.parameters()).dtype == torch.float16 else 1.0

    def reducer(total: Tensor, layer: nn.Module, s: Slice) -> Callable[[Tensor], None]:
        def reduce(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            total.add_(_reduce(s, layer, kind, grad if scale == 1.0 else grad.float() / scale))

        return reduce

    hooks: dict[nn.Parameter, Callable[[Tensor], None]] = {}
    for index, layer in enumerate(layers):
        for total, slices in (
            (scores.attention[index], attention_slices(layer)),
            (scores.mlp[index], mlp_slices(layer)),
        ):
            for s in slices:
                hooks[layer.get_parameter(s.name)] = reducer(total, layer, s)
    decoder, head = decoder_and_head(model)
    with _only_gradients_of(model, hooks):
        for window in track(windows, "scoring"):
            ids = window[None].to(device)
            with fast_forward(device):
                hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            _, gradient = loss_and_hidden_grad(hidden.detach(), head, ids)
            hidden.backward(gradient * scale)
    finish = torch.abs if kind == "vector" else torch.Tensor.clone
    return Scores(
        [finish(t / len(windows)).cpu() for t in scores.attention],
        [finish(t / len(windows)).cpu() for t in scores.mlp],
    )


@contextmanager
def _only_gradients_of(
    model: nn.Module, hooks: dict[nn.Parameter, Callable[[Tensor], None]]
) -> Iterator[None]:
    """Only the parameters in ``hooks`` get gradients, and their hook sees each as it is made."""
    before = {p: p.requires_grad for p in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(parameter in hooks)
    handles = [p.register_post_accumulate_grad_hook(hook) for p, hook in hooks.items()]
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


@torch.no_grad()
def input_norms(model: nn.Module, windows: Tensor) -> dict[nn.Module, Tensor]:
    """L2 norm over the calibration tokens of every input column of the cut linear layers.

    Returns a tensor (in_features,) fp32 for each of q, k, v, o, gate, up, down of every layer,
    keyed by module.
    """
    squares: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        squares[module] = squares.get(module, 0) + x.square().sum(0).double()

    handles = [
        module.register_forward_pre_hook(hook)
        for layer in decoder_layers(model)
        for module in {_module(layer, s): None for s in attention_slices(layer) + mlp_slices(layer)}
    ]
    try:
        device = next(model.parameters()).device
        decoder, _ = decoder_and_head(model)
        for window in track(windows, "activations"):
            decoder(input_ids=window[None].to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {module: total.sqrt().float() for module, total in squares.items()}
