"""Scores of units: Taylor, magnitude, activation, OBS, random.

Taylor scores are means over the calibration windows of the per-window term, so they do not depend
on how windows are batched: one backward pass a window, in which every parameter's gradient is
reduced to unit scores by the `taylor` kernel and freed as soon as it exists. Peak memory is
therefore the weights, one parameter's gradient, and one window's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastprune.distributed import Processes
from fastprune.errors import InputError
from fastprune.inspect.health import unsound
from fastprune.kernels import ops
from fastprune.messages import Message
from fastprune.models.families import FINEST, KINDS, sublayers
from fastprune.models.forward import loss_and_hidden_grad
from fastprune.models.layers import Layers
from fastprune.models.units import Slice, Sublayer
from fastprune.precision import fast_forward
from fastprune.progress import track
from fastprune.pruning.calibration import Calibration, Prefix
from fastprune.pruning.moments import outputs
from fastprune.pruning.obs import obs
from fastprune.pruning.routed import Routed, Units, channel_energies, expert_terms, extent

TAYLOR = {
    "taylor-first": "first",
    "taylor-second": "second",
    "taylor-mix": "mix",
    "taylor-vector": "vector",
}
MAGNITUDE = {"magnitude-l1": "l1", "magnitude-l2": "l2"}
ACTIVATION = ("activation", "activation-maw", "routed-output")
METHODS = (*TAYLOR, *MAGNITUDE, *ACTIVATION, "obs", "random")

Hooks = dict[nn.Parameter, Callable[[Tensor], None]]
"""What to do with the gradient of a parameter as soon as it exists."""


REGISTERED: dict[str, Callable[[nn.Module], Units]] = {}
"""Criteria from outside the package, by name."""


def register_score(name: str, units: Callable[[nn.Module], Units]) -> None:
    """Let ``importance=name`` score each decoder layer by ``units``, higher is kept.

    It is given a layer with its weights and returns tensors (units,) by kind, of all kinds that the
    layer has; of channels inside of experts (experts, channels). Raises ValueError when the name is
    taken.
    """
    if name in (*METHODS, *REGISTERED):
        raise ValueError(f"the score '{name}' is registered already")
    REGISTERED[name] = units


@dataclass
class Scores:
    """Importance per unit, higher is kept: of each layer fp64 CPU tensors (units,) by kind.

    A sublayer that is gone has no units. Those of channels inside of experts are (experts,
    channels).
    """

    layers: list[Units]

    def __post_init__(self) -> None:
        nothing = {kind: torch.zeros(0, dtype=torch.float64) for kind in KINDS}
        self.layers = [nothing | units for units in self.layers]

    def ascending(self, layer: int, kind: str) -> list[float]:
        """The scores of the units of ``kind`` that ``layer`` may lose, lowest first.

        Every expert loses as many channels: of those one unit is the next lowest of each expert.
        """
        values = self.layers[layer][kind].sort(-1).values
        return (values if values.dim() == 1 else values.sum(0)).tolist()

    def finite(self) -> bool:
        return all(bool(s.isfinite().all()) for units in self.layers for s in units.values())


def score(calibration: Calibration, method: str, *, seed: int = 0) -> Scores:
    """Score every unit of a model by ``method`` on the windows of ``calibration``.

    Magnitude and random need no windows. The model is left as it was. Where layers are fetched the
    host keeps (layers + 1)·n·s hidden states for Taylor scores, n·s for activation and OBS. Raises
    NumericalError when a score is not finite, ValueError for an unknown method, and InputError for
    a registered one that does not score every unit.
    """
    layers = calibration.layers
    if method in TAYLOR:
        found = _taylor(calibration, TAYLOR[method])
    elif method in MAGNITUDE:
        kind = MAGNITUDE[method]
        found = [magnitude(layer, kind) for _, layer in layers.walk("scoring")]
    elif method in ACTIVATION:
        found = _activations(calibration, method)
    elif method == "obs":
        with torch.no_grad():
            prefix = Prefix(calibration, random=False)
            found = [obs(prefix, index) for index, _ in layers.walk("OBS")]
    elif method in REGISTERED:
        found = [_registered(method, layer) for _, layer in layers.walk("scoring")]
    elif method == "random":
        found = random(layers, seed)
    else:
        raise ValueError(
            f"unknown importance '{method}'; known: {', '.join((*METHODS, *REGISTERED))}"
        )
    scores = Scores(found)
    if not scores.finite():
        raise unsound(layers.model, Message("the {method} scores", method=method))
    return scores


def magnitude(layer: nn.Module, kind: str) -> Units:
    """Sums of |w| (``kind`` l1) or w² (l2) over each unit of ``layer``."""
    return _sums(layer, lambda sublayer, s: _terms(sublayer, s, layer, kind))


def _registered(name: str, layer: nn.Module) -> Units:
    """The scores of ``layer`` by a criterion from outside. InputError where units have none."""
    found = {kind: s.detach().double().cpu() for kind, s in REGISTERED[name](layer).items()}
    for kind, shape in (pair for s in sublayers(layer) for pair in _shapes(s).items()):
        if kind not in found or found[kind].shape != shape:
            got = f"one of {tuple(found[kind].shape)}" if kind in found else "none"
            raise InputError(f"the score '{name}' gives {got} for '{kind}'; give a tensor {shape}")
    return found


class Inputs:
    """What ``layer`` and its cut linear modules read, summed over tokens.

    Attributes:
        behind: what lies behind each output module of a sublayer.
        norms: of each of those modules the L2 norms of its input columns, (in_features,); what an
            output module reads is counted as `Behind.seen` has it.
        routed: what its experts have done, where it has some.
        scale: the mean over tokens of 1 / ‖h‖², h the hidden state that the layer reads.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.layer = layer
        self.behind = {b.linear: b for b in outputs(layer) if b.linear is not None}
        parts = sublayers(layer)
        slices = (s for part in parts if part.mixture is None for s in part.slices)
        modules = {layer.get_submodule(s.module): None for s in slices}
        mixtures = [part for part in parts if part.mixture is not None]
        self.routed = Routed(mixtures[0], layer, device) if mixtures else None
        self._squares = {
            module: torch.zeros(module.in_features, dtype=torch.float64, device=device)
            for module in modules
        }
        # Σ 1 / ‖h‖² and the number of tokens. The first token's ‖h‖ can be a hundred times the
        # others', and a mean of ‖h‖² would show nothing else.
        self._inverse = torch.zeros(2, dtype=torch.float64, device=device)
        self.norms: dict[nn.Module, Tensor] = {}
        self.scale = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """What the layer is given inside the block counts."""
        handles = [m.register_forward_pre_hook(self._see_columns) for m in self._squares]
        handles.append(self.layer.register_forward_pre_hook(self._see_states))
        try:
            with nullcontext() if self.routed is None else self.routed.watching():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def complete(self, processes: Processes) -> Inputs:
        """Itself, with what all ``processes`` have seen; call it once, when all was seen."""
        processes.sum_(*self._squares.values(), self._inverse)
        if self.routed is not None:
            self.routed.complete(processes)
        self.norms = {module: total.sqrt().float() for module, total in self._squares.items()}
        total, count = self._inverse
        self.scale = (total / count.clamp_min(1)).item()
        return self

    def _see_columns(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        if module in self.behind:
            x, _ = self.behind[module].seen(x, None)
        self._squares[module] += x.square().sum(0).double()

    def _see_states(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        energy = inputs[0].flatten(0, -2).float().square().sum(1).double()
        counted = energy > 0  # masks, not indices: the device need not be waited for
        self._inverse[0] += torch.where(counted, energy.reciprocal(), 0.0).sum()
        self._inverse[1] += counted.sum()


def activation(layer: nn.Module, seen: Inputs, method: str) -> Units:
    """Scores of ``layer``'s units by weights and inputs ``seen`` in a forward pass.

    ``activation`` sums |w|·‖x‖ over the unit. ``activation-maw`` is the energy of what the unit
    adds to the hidden states, relative to theirs, so that units of all kinds and layers compare.
    That of a KV group is the sum of ‖w‖²·‖x‖² over its o columns, with the norm that lies behind
    them in some families. That of a channel is the median over the layer's channels, times
    (m / median m)², where m ranks them: the largest weights of the gate row, up row and down column
    (max w + |min w|, relative to the layer's largest, summed; the maximum absolute weight of
    optipfair) times the channel's own activation norm. That of an expert is the energy of its
    output times its gate, summed over the tokens routed to it. The energies that leave with
    channels inside of experts are those of channels, times the gates. ``routed-output`` is the same
    but for experts: see `Routed.mean_outputs`.
    """
    if method == "activation":
        return _sums(layer, lambda sublayer, s: _activation_terms(sublayer, s, layer, seen))
    found: Units = {}
    for sublayer in sublayers(layer):
        if sublayer.mixture is None:
            found[sublayer.kind] = _energies(layer, sublayer, seen)
        else:
            assert seen.routed is not None
            energy, m = channel_energies(layer, sublayer, seen.routed)
            found["mlp"] = _median(energy * seen.scale) * (m / _median(m)).square()
            found["experts"] = seen.routed.energies * seen.scale
            if method == "routed-output":
                found["experts"] = seen.routed.mean_outputs()
    return {kind: values.cpu() for kind, values in found.items()}


def _activation_terms(sublayer: Sublayer, s: Slice, layer: nn.Module, seen: Inputs) -> Units:
    """Sums of |w|·‖x‖ of one parameter; routers and biases have no part in them."""
    if sublayer.mixture is not None:
        assert seen.routed is not None
        if s.module == sublayer.mixture.router:
            return {}
        x = seen.routed.inputs_of(s.parameter)
    elif s.parameter == "weight":
        x = seen.norms[layer.get_submodule(s.module)]
    else:
        return {}
    return _terms(sublayer, s, layer, "activation", x=x)


def _energies(layer: nn.Module, sublayer: Sublayer, seen: Inputs) -> Tensor:
    """Energy (units,) that leaves with each unit's columns of the output module.

    Where a unit is one column, the median energy, weighed by the units' largest weights.
    """
    output, linear = sublayer.output, sublayer.linear(layer)
    columns, gain = seen.norms[linear].double(), seen.behind[linear].gain
    weight = linear.weight.detach()
    weight = weight if gain is None else weight * gain.to(weight.dtype)[:, None]
    _, squares = ops.taylor(weight, kind="l2")
    energy = output.by_unit(squares.double() * columns.square()).sum(1) * seen.scale
    if output.width > 1:
        return energy
    m = _maximum_weight(layer, sublayer) * columns
    return _median(energy) * (m / _median(m)).square()


def _maximum_weight(layer: nn.Module, sublayer: Sublayer) -> Tensor:
    """Largest weights (units,) of each unit, relative to the layer's, summed over its slices."""
    total: Tensor | float = 0.0
    for s in sublayer.slices:
        if s.parameter == "weight":
            largest = extent(layer.get_parameter(s.name).detach(), 1 - s.dim)
            largest = s.by_unit(largest).flatten()
            total = total + largest / largest.max().clamp_min(torch.finfo(torch.float64).tiny)
    assert isinstance(total, Tensor)
    return total


def _median(x: Tensor) -> Tensor:
    """The median of the positive ones of ``x``, or 1 where there is none."""
    return x[x > 0].median() if bool((x > 0).any()) else x.new_ones(())


def random(layers: Layers, seed: int) -> list[Units]:
    """Uniform random scores of every layer; the same ``seed`` gives the same."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Units] = [{} for _ in layers.modules]
    for kind in KINDS:
        for units, layer in zip(found, layers.modules, strict=True):
            for shape in (own[kind] for own in map(_shapes, sublayers(layer)) if kind in own):
                units[kind] = torch.rand(shape, generator=generator, dtype=torch.float64)
    return found


def _shapes(sublayer: Sublayer) -> dict[str, tuple[int, ...]]:
    """The shapes of the scores of its units, by kind: of experts also those of their channels."""
    found: dict[str, tuple[int, ...]] = {sublayer.kind: (sublayer.units,)}
    if sublayer.mixture is not None:
        found[FINEST] = sublayer.units, sublayer.channels
    return found


def _terms(
    sublayer: Sublayer,
    s: Slice,
    layer: nn.Module,
    kind: str,
    grad: Tensor | None = None,
    x: Tensor | None = None,
) -> Units:
    """Unit sums of one parameter's terms, by kind of units."""
    parameter = layer.get_parameter(s.name).detach()
    if parameter.dim() == 3:
        parameter = parameter if grad is None else parameter.to(grad.dtype)
        return expert_terms(s.parameter, parameter, kind, grad, x)
    return {sublayer.kind: _reduce(s, layer, kind, grad, x)}


def _reduce(
    s: Slice, layer: nn.Module, kind: str, grad: Tensor | None = None, x: Tensor | None = None
) -> Tensor:
    """Unit sums (units,) of one parameter's terms."""
    parameter = layer.get_parameter(s.name).detach()
    if grad is not None:
        parameter = parameter.to(grad.dtype)
    rows, columns = ops.taylor(parameter, grad, x=x, kind=kind)
    return s.by_unit((rows if s.dim == 0 else columns).double()).sum(1)


def _sums(layer: nn.Module, terms: Callable[[Sublayer, Slice], Units]) -> Units:
    found: Units = {}
    for sublayer in sublayers(layer):
        for s in sublayer.slices:
            for kind, values in terms(sublayer, s).items():
                found[kind] = found[kind] + values if kind in found else values
    return {kind: values.cpu() for kind, values in found.items()}


class TaylorSums:
    """Sums over windows of Taylor terms, fed by the gradients of some of the ``layers`` at a time.

    ``kind`` is the term as the `taylor` kernel calls it.
    """

    def __init__(self, layers: Layers, kind: str) -> None:
        self.layers, self.kind = layers, kind
        self.totals: list[Units] = [
            {
                kind: torch.zeros(shape, dtype=torch.float64, device=layers.device)
                for s in sublayers(layer)
                for kind, shape in _shapes(s).items()
            }
            for layer in layers.modules
        ]
        # Gradients of a mean loss underflow in fp16: the loss is scaled, and the gradient scaled
        # back in fp32 before its reduction.
        self.scale = 2.0**12 if layers.dtype == torch.float16 else 1.0

    @contextmanager
    def watching(self, stage: range) -> Iterator[None]:
        """Inside the block the layers of ``stage`` are loaded, and each gradient of what units own
        in them is summed up and freed as soon as it exists; nothing else gets one.

        The gradients are those of the mean loss of one window times ``self.scale``.
        """
        with self.layers.loaded(stage) as modules:
            hooks: Hooks = {}
            for index, layer in zip(stage, modules, strict=True):
                for sublayer in sublayers(layer):
                    for name in dict.fromkeys(s.name for s in sublayer.slices):
                        hooks[layer.get_parameter(name)] = self._reducer(index, sublayer, name)
            with only_gradients_of([*modules, self.layers.final_norm], hooks):
                yield

    def means(self, windows: int, processes: Processes) -> list[Units]:
        """The means over so many ``windows``, those of all ``processes``; call it once."""
        processes.sum_(*(total for units in self.totals for total in units.values()))
        finish = torch.abs if self.kind == "vector" else torch.Tensor.clone
        return [
            {kind: finish(total / windows).cpu() for kind, total in units.items()}
            for units in self.totals
        ]

    def _reducer(self, index: int, sublayer: Sublayer, name: str) -> Callable[[Tensor], None]:
        totals, layer = self.totals[index], self.layers.modules[index]
        slices = [s for s in sublayer.slices if s.name == name]

        def reduce(parameter: Tensor) -> None:
            grad = parameter.grad
            assert grad is not None
            parameter.grad = None
            grad = grad if self.scale == 1.0 else grad.float() / self.scale
            for s in slices:
                for kind, values in _terms(sublayer, s, layer, self.kind, grad).items():
                    totals[kind].add_(values)

        return reduce


def _taylor(calibration: Calibration, kind: str) -> list[Units]:
    """A forward and a backward pass for each window, stage by stage.

    The last stage ends at the loss, where the backward pass begins. Of the stages before it only
    the inputs are kept, and their forward is computed again; there are none where all layers are
    resident.
    """
    layers, sums = calibration.layers, TaylorSums(calibration.layers, kind)
    *before, last = layers.stages
    with sums.watching(last):
        for group, description in layers.groups(calibration.single(), "scoring"):
            states = layers.embed(group)
            inputs = []
            for stage in track(before, description and f"{description}, forward"):
                inputs.append(states)
                # With gradients, though none are taken: kernels may be chosen by that.
                with sums.watching(stage):
                    states = [
                        _through(layers, stage, h)[1].detach().to(layers.waiting) for h in states
                    ]
            gradients = _from_loss(sums, last, states, group)
            backward = description and f"{description}, backward"
            for stage in track(list(reversed(before)), backward):
                with sums.watching(stage):
                    for number, hidden in enumerate(inputs.pop()):
                        first, after = _through(layers, stage, hidden)
                        after.backward(gradients[number].to(layers.device))
                        if first.grad is not None:
                            gradients[number] = first.grad.to(layers.waiting)
    return sums.means(len(calibration.windows), calibration.processes)


def _through(
    layers: Layers, stage: range, hidden: Tensor, *, norm: bool = False
) -> tuple[Tensor, Tensor]:
    """Input and output of the layers of ``stage``, and with ``norm`` of the final norm behind them.

    As in the whole model, embeddings need no gradient.
    """
    first = hidden.to(layers.device).detach().requires_grad_(stage.start > 0)
    after = first
    with fast_forward(layers.device, layers.dtype):
        for index in stage:
            after = layers.run(index, after)
        return first, layers.norm(after) if norm else after


def _from_loss(
    sums: TaylorSums, last: range, states: Sequence[Tensor], ids: Sequence[Tensor]
) -> list[Tensor]:
    """Back from the loss through the stage ``last``, whose inputs are ``states``.

    Returns the gradients of ``sums.scale`` times each window's mean loss for them, where anything
    is before that stage.
    """
    layers, gradients = sums.layers, []
    with layers.headed() as head:
        for hidden, window in zip(states, ids, strict=True):
            first, final = _through(layers, last, hidden, norm=True)
            _, gradient = loss_and_hidden_grad(final.detach(), head, window.to(layers.device))
            final.backward(gradient * sums.scale)
            if first.grad is not None:
                gradients.append(first.grad.to(layers.waiting))
    return gradients


@contextmanager
def only_gradients_of(modules: Iterable[nn.Module], hooks: Hooks) -> Iterator[None]:
    """Of ``modules`` only the parameters in ``hooks`` get gradients, and their hook sees each as it
    is made."""
    before = {p: p.requires_grad for module in modules for p in module.parameters()}
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
def _activations(calibration: Calibration, method: str) -> list[Units]:
    """A layer is scored as soon as the last group has gone through it, while it is loaded."""
    layers, batches = calibration.layers, calibration.batches()
    seen = [Inputs(layer, layers.device) for layer in layers.modules]
    found, left = [], len(batches)
    for group, description in layers.groups(batches, "activations"):
        states = layers.embed(group)
        left -= len(group)
        for index, layer in layers.walk(description):
            with seen[index].watching():
                states = layers.through(index, states, fast=True)
            if not left:
                inputs = seen[index].complete(calibration.processes)
                found.append(activation(layer, inputs, method))
    return found
