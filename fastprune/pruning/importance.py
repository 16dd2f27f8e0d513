"""Scores of KV groups and channels: Taylor, magnitude, activation, OBS, random.

Taylor scores are means over the calibration windows of the per-window term, so
they do not depend on how windows are batched: one backward pass a window, in
which every parameter's gradient is reduced to unit scores by the `taylor`
kernel and freed as soon as it exists. Peak memory is therefore the weights, one
parameter's gradient, and one window's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprune import distributed
from fastprune.inspect.health import unsound
from fastprune.inspect.perplexity import batches, decoder_and_head, loss_and_hidden_grad
from fastprune.kernels import ops
from fastprune.models.families import (
    KINDS,
    Geometry,
    Slice,
    attention_slices,
    decoder_layers,
    geometries,
    mlp_slices,
)
from fastprune.precision import fast_forward
from fastprune.progress import track
from fastprune.pruning.compensation import Prefix
from fastprune.pruning.obs import obs

TAYLOR = {
    "taylor-first": "first",
    "taylor-second": "second",
    "taylor-mix": "mix",
    "taylor-vector": "vector",
}
MAGNITUDE = {"magnitude-l1": "l1", "magnitude-l2": "l2"}
ACTIVATION = ("activation", "activation-maw")
METHODS = (*TAYLOR, *MAGNITUDE, *ACTIVATION, "obs", "random")

Units = tuple[Tensor, Tensor]
"""One layer's sums per KV group (kv_heads,) and per channel (channels,), fp64 on the CPU."""
Hooks = dict[nn.Parameter, Callable[[Tensor], None]]
"""What to do with the gradient of a parameter as soon as it exists."""


@dataclass
class Scores:
    """Importance per unit, higher is kept: of each layer by kind of sublayer, fp64 CPU tensors
    (units,)."""

    layers: list[dict[str, Tensor]]

    @staticmethod
    def of(layers: Iterable[Units]) -> Scores:
        """The scores of all ``layers``, in order."""
        return Scores([dict(zip(KINDS, units, strict=True)) for units in layers])

    @property
    def attention(self) -> list[Tensor]:
        """Scores of the KV groups of every layer."""
        return [layer["attention"] for layer in self.layers]

    @property
    def mlp(self) -> list[Tensor]:
        """Scores of the channels of every layer."""
        return [layer["mlp"] for layer in self.layers]

    def finite(self) -> bool:
        return all(bool(s.isfinite().all()) for layer in self.layers for s in layer.values())


def score(model: nn.Module, windows: Tensor, method: str, *, seed: int = 0) -> Scores:
    """Score every unit of ``model`` by ``method`` on token ``windows`` (n, s).

    Magnitude and random need no windows. The model is left as it was.
    Raises NumericalError when a score is not finite, and ValueError for an unknown method.
    """
    if method in TAYLOR:
        scores = _taylor(model, windows, TAYLOR[method])
    elif method in MAGNITUDE:
        scores = Scores.of(magnitude(layer, MAGNITUDE[method]) for layer in decoder_layers(model))
    elif method in ACTIVATION:
        with inputs_of(decoder_layers(model)) as seen:
            _forward(model, windows)
        scores = Scores.of(activation(layer, seen, method) for layer in decoder_layers(model))
    elif method == "obs":
        with torch.no_grad():
            prefix = Prefix(model, windows, random=False)
            scores = Scores.of(
                obs(prefix, index) for index in track(range(len(prefix.blocks)), "OBS")
            )
    elif method == "random":
        scores = random(geometries(model), seed)
    else:
        raise ValueError(f"unknown importance '{method}'; known: {', '.join(METHODS)}")
    return checked(scores, method, model)


def checked(scores: Scores, method: str, model: nn.Module) -> Scores:
    """``scores`` of ``model`` by ``method``, or NumericalError when one of them is not finite."""
    if not scores.finite():
        raise unsound(model, f"the {method} scores")
    return scores


def magnitude(layer: nn.Module, kind: str) -> Units:
    """Sums of |w| (``kind`` l1) or w² (l2) over each unit of ``layer``."""
    return _sums(layer, lambda s: _reduce(s, layer, kind))


@dataclass
class Inputs:
    """What the layers have read, over all tokens."""

    norms: dict[nn.Module, Tensor]
    """of each of q, k, v, o, gate, up, down the L2 norms of its input columns, (in_features,)"""
    scale: dict[nn.Module, float]
    """of each layer the mean over tokens of 1 / ‖h‖², h the hidden state it reads"""


def activation(layer: nn.Module, seen: Inputs, method: str) -> Units:
    """Scores of ``layer``'s units by weights and inputs ``seen`` in a forward pass.

    ``activation`` sums |w|·‖x‖ over the unit. ``activation-maw`` is the energy of what the unit
    adds to the hidden states, relative to theirs, so that units of all kinds and layers compare.
    That of a KV group is the sum of ‖w‖²·‖x‖² over its o columns. That of a channel is the median
    over the layer's channels, times (m / median m)², where m ranks them: the largest weights of the
    gate row, up row and down column (max w + |min w|, relative to the layer's largest, summed; the
    maximum absolute weight of optipfair) times the channel's own activation norm.
    """
    if method == "activation-maw":
        groups, channels = (
            _output_energy(layer, slices, seen)
            for slices in (attention_slices(layer), mlp_slices(layer))
        )
        if len(channels):
            m = _maximum_weight(layer, seen)
            channels = _median(channels) * (m / _median(m)).square()
        return groups.cpu(), channels.cpu()
    return _sums(
        layer,
        lambda s: (
            _reduce(s, layer, "activation", x=seen.norms[_module(layer, s)])
            if s.parameter == "weight"
            else None
        ),
    )


def _output_energy(layer: nn.Module, slices: list[Slice], seen: Inputs) -> Tensor:
    """Energy (units,) that leaves with each unit's columns of o_proj or down_proj."""
    if not slices:
        return torch.zeros(0, dtype=torch.float64)
    last = slices[-1]
    _, columns = ops.taylor(layer.get_parameter(last.name).detach(), kind="l2")
    energy = columns.double() * seen.norms[_module(layer, last)].double().square()
    return last.by_unit(energy).sum(1) * seen.scale[layer]


def _maximum_weight(layer: nn.Module, seen: Inputs) -> Tensor:
    slices = [s for s in mlp_slices(layer) if s.parameter == "weight"]
    total: Tensor | float = 0.0
    for s in slices:
        weight = layer.get_parameter(s.name).detach()
        largest = weight.amax(1 - s.dim).double() + weight.amin(1 - s.dim).double().abs()
        largest = s.by_unit(largest).flatten()
        total = total + largest / largest.max().clamp_min(torch.finfo(torch.float64).tiny)
    return total * seen.norms[_module(layer, slices[-1])].double()


def _median(x: Tensor) -> Tensor:
    """The median of the positive ones of ``x``, or 1 where there is none."""
    return x[x > 0].median() if bool((x > 0).any()) else x.new_ones(())


def random(sizes: Sequence[Geometry], seed: int) -> Scores:
    """Uniform random scores for layers of ``sizes``; the same ``seed`` gives the same."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (
        [torch.rand(g.units[kind], generator=generator, dtype=torch.float64) for g in sizes]
        for kind in KINDS
    )
    return Scores.of(zip(*drawn, strict=True))


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
    return s.by_unit((rows if s.dim == 0 else columns).double()).sum(1)


def _sums(layer: nn.Module, term: Callable[[Slice], Tensor | None]) -> Units:
    totals = []
    for slices in (attention_slices(layer), mlp_slices(layer)):
        terms = [t for s in slices if (t := term(s)) is not None]
        total = sum(terms[1:], terms[0]) if terms else torch.zeros(0, dtype=torch.float64)
        totals.append(total.cpu())
    return totals[0], totals[1]


class TaylorSums:
    """Sums over windows of Taylor terms, fed by the gradients of one layer or of all.

    ``sizes`` are the geometries of all layers, ``kind`` the term as the `taylor` kernel calls it,
    ``dtype`` that of the weights.
    """

    def __init__(
        self, sizes: Sequence[Geometry], kind: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kind = kind
        self.attention = [
            torch.zeros(g.kv_heads, dtype=torch.float64, device=device) for g in sizes
        ]
        self.mlp = [torch.zeros(g.channels, dtype=torch.float64, device=device) for g in sizes]
        # Gradients of a mean loss underflow in fp16: the loss is scaled, and the gradient scaled
        # back in fp32 before its reduction.
        self.scale = 2.0**12 if dtype == torch.float16 else 1.0

    def hooks(self, index: int, layer: nn.Module) -> Hooks:
        """What to do with each gradient of ``layer``, the model's layer ``index``, as it is made.

        The gradients are those of the mean loss of one window times ``self.scale``.
        """
        parts: dict[nn.Parameter, list[Slice]] = {}
        totals = {}
        for total, slices in (
            (self.attention[index], attention_slices(layer)),
            (self.mlp[index], mlp_slices(layer)),
        ):
            for s in slices:
                parameter = layer.get_parameter(s.name)
                parts.setdefault(parameter, []).append(s)
                totals[parameter] = total
        return {p: self._reducer(totals[p], layer, own) for p, own in parts.items()}

    def scores(self, windows: int) -> Scores:
        """The means over so many ``windows``, those of all processes; call it once."""
        distributed.sum_(*self.attention, *self.mlp)
        finish = torch.abs if self.kind == "vector" else torch.Tensor.clone
        pairs = zip(self.attention, self.mlp, strict=True)
        return Scores.of(tuple(finish(t / windows).cpu() for t in pair) for pair in pairs)

    def _reducer(
        self, total: Tensor, layer: nn.Module, slices: Sequence[Slice]
    ) -> Callable[[Tensor], None]:
        def reduce(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            grad = grad if self.scale == 1.0 else grad.float() / self.scale
            for s in slices:
                total.add_(_reduce(s, layer, self.kind, grad))

        return reduce


def _taylor(model: nn.Module, windows: Tensor, kind: str) -> Scores:
    layers = decoder_layers(model)
    weight = next(layers.parameters())
    device, dtype = weight.device, weight.dtype
    sums = TaylorSums(geometries(model), kind, dtype, device)
    hooks: Hooks = {}
    for index, layer in enumerate(layers):
        hooks |= sums.hooks(index, layer)
    decoder, head = decoder_and_head(model)
    with only_gradients_of(model, hooks):
        for window in track(distributed.share(windows), "scoring"):
            ids = window[None].to(device)
            with fast_forward(device, dtype):
                hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            _, gradient = loss_and_hidden_grad(hidden.detach(), head, ids)
            hidden.backward(gradient * sums.scale)
    return sums.scores(len(windows))


@contextmanager
def only_gradients_of(module: nn.Module, hooks: Hooks) -> Iterator[None]:
    """Only the parameters in ``hooks`` get gradients, and their hook sees each as it is made."""
    before = {p: p.requires_grad for p in module.parameters()}
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


@contextmanager
def inputs_of(layers: Iterable[nn.Module]) -> Iterator[Inputs]:
    """Watch what ``layers`` and their cut linear modules read while the body runs them.

    Afterwards the `Inputs` hold the sums over the tokens that all processes have seen.
    """
    layers = list(layers)
    watched = {
        _module(layer, s): None
        for layer in layers
        for s in attention_slices(layer) + mlp_slices(layer)
    }
    squares = {
        module: torch.zeros(module.in_features, dtype=torch.float64, device=module.weight.device)
        for module in watched
    }
    # Σ 1 / ‖h‖² and the number of tokens. The first token's ‖h‖ can be a hundred times the others',
    # and a mean of ‖h‖² would show nothing else.
    inverse = {
        layer: torch.zeros(2, dtype=torch.float64, device=next(layer.parameters()).device)
        for layer in layers
    }
    seen = Inputs({}, {})

    def columns(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        squares[module] += x.square().sum(0).double()

    def states(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        energy = inputs[0].flatten(0, -2).float().square().sum(1).double()
        counted = energy > 0  # masks, not indices: the device need not be waited for
        inverse[layer][0] += torch.where(counted, energy.reciprocal(), 0.0).sum()
        inverse[layer][1] += counted.sum()

    handles = [module.register_forward_pre_hook(columns) for module in watched]
    handles += [layer.register_forward_pre_hook(states) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    distributed.sum_(*squares.values(), *inverse.values())
    seen.norms |= {module: total.sqrt().float() for module, total in squares.items()}
    seen.scale |= {
        layer: (total / count.clamp_min(1)).item() for layer, (total, count) in inverse.items()
    }


@torch.no_grad()
def _forward(model: nn.Module, windows: Tensor) -> None:
    weight = next(model.parameters())
    decoder, _ = decoder_and_head(model)
    for ids in track(distributed.share(batches(windows)), "activations"):
        with fast_forward(weight.device, weight.dtype):
            decoder(input_ids=ids.to(weight.device), use_cache=False)
