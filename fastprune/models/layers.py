"""A causal language model as a walk over its decoder layers, wherever their weights are.

Calibration runs a model one layer at a time: it looks at a layer's inputs, changes a layer, and
wants everything before it computed once. `Layers` is the one way through a model whose weights are
all on the device that computes. `FetchedLayers` brings one layer at a time to that device:
`OffloadedLayers` from the host's memory, `fastprune.models.streamed.StreamedModel` from files.

The order of the loops follows from that. Where all layers are resident, a few windows go through
all of them before the next ones begin, so that little is kept. Where a layer has to be fetched, all
windows go through it while it is there, and their hidden states wait on the host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.models.experts import routing
from fastprune.models.families import declaration, decoder_layers, family_of, sublayers
from fastprune.models.forward import Head, decoder_and_head
from fastprune.precision import fast_forward
from fastprune.progress import track

ROTARY = "rotary_emb"
"""The rotary embedding in a decoder that has one."""


class Layers:
    """The decoder layers of ``model``, all of whose weights are on one device.

    Hidden states are (n, s, hidden). A layer is run with exactly the arguments that the model hands
    to it: they are recorded from the model's own forward, so masks and rotary embeddings of every
    family come out right. Run the model in eval mode and choose gradients outside.
    """

    resident = True
    """whether all weights are where they are computed with"""

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self.model = model
        self.family = declaration(model)
        self.modules = decoder_layers(model)
        self.device = device or next(model.parameters()).device
        """where the layers compute"""
        self.dtype = next(self.modules.parameters()).dtype
        """that of their weights"""
        self.waiting = self.device if self.resident else torch.device("cpu")
        """where hidden states wait between two layers"""
        self._arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def head(self) -> Head:
        """The language-model head; it has values inside of `headed`."""
        return decoder_and_head(self.model)[1]

    @property
    def stages(self) -> list[range]:
        """The layers in runs that are loaded together, the last of which ends at the head.

        Where all are resident they are one run; elsewhere each is, and the last is empty.
        """
        count = len(self)
        if self.resident:
            return [range(count)]
        return [range(i, min(i + 1, count)) for i in range(count + 1)]

    @contextmanager
    def loaded(self, layers: range) -> Iterator[list[nn.Module]]:
        """Inside the block the modules of ``layers`` have their weights on the device.

        Changes of weights that are fetched are dropped at its end, unless `keep` has been called.
        """
        with ExitStack() as stack:
            yield [stack.enter_context(self._layer(index)) for index in layers]

    @contextmanager
    def headed(self) -> Iterator[Head]:
        """Inside the block the language-model head has its weights on the device."""
        with self._loaded(self.family.head):
            yield self.head

    def walk(
        self, description: str | None = None, order: Sequence[int] | None = None
    ) -> Iterator[tuple[int, nn.Module]]:
        """Every layer with its index, or those in ``order``, loaded for its turn."""
        for index in track(range(len(self)) if order is None else order, description):
            with self._layer(index) as layer:
                yield index, layer

    def groups(
        self, batches: Sequence[Tensor], description: str
    ) -> Iterator[tuple[Sequence[Tensor], str | None]]:
        """The ``batches`` in groups that go through the layers together; at least one group.

        Where all layers are resident a group is one batch, elsewhere it is all of them. With each
        comes the description for the `walk` inside, or None where progress is shown by groups.
        """
        if not self.resident:
            yield batches, description
            return
        for number in track(range(max(1, len(batches))), description):
            yield batches[number : number + 1], None

    @torch.no_grad()
    def embed(self, batches: Sequence[Tensor], place: torch.device | None = None) -> list[Tensor]:
        """Token ids (n, s) each to the first layer's inputs, at ``place`` (default: `waiting`).

        Prepares `run` for batches of these shapes.
        """
        place = place or self.waiting
        with self._loaded(self.family.embeddings):
            return [self._embedded(ids.to(self.device)).to(place) for ids in batches]

    def run(self, index: int, hidden: Tensor, *, fast: bool = False) -> Tensor:
        """Layer ``index``, which is loaded, on ``hidden`` of a shape that `embed` has seen.

        With ``fast`` products are as in `fast_forward`. Experts may be absent, as in `routing`.
        """
        layer = self.modules[index]
        router = None if self.family.mixture is None else self.family.mixture.router_of(layer)
        with self._products(fast), routing(router):
            return layer(hidden, **self._arguments[tuple(hidden.shape[:2])][index])

    def norm(self, hidden: Tensor, *, fast: bool = False) -> Tensor:
        """The final norm, whose output the language-model head reads."""
        with self._products(fast):
            return self.final_norm(hidden)

    def through(self, index: int, states: Iterable[Tensor], *, fast: bool = False) -> list[Tensor]:
        """What `run` makes of ``states``, which may lie anywhere, put where states wait."""
        return [self.run(index, h.to(self.device), fast=fast).to(self.waiting) for h in states]

    @torch.no_grad()
    def final(
        self, batches: Sequence[Tensor], description: str, *, fast: bool = False
    ) -> Iterator[Tensor]:
        """What the head reads for token ids (n, s) each, batch by batch; it is loaded then."""
        for group, inside in self.groups(batches, description):
            states = self.embed(group)
            for index, _ in self.walk(inside):
                states = self.through(index, states, fast=fast)
            with self.headed():
                for hidden in states:
                    yield self.norm(hidden.to(self.device), fast=fast)

    def outputs(self, index: int, kind: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by which sublayers of layer ``index`` reach the hidden states, by name;
        of all kinds or of one. Of a mixture the router's are among them.

        A model that is thinned on trial differs from the dense one in these alone.
        """
        layer = self.modules[index]
        for sublayer in (s for s in sublayers(layer) if kind in (None, s.kind)):
            for name, parameter in sublayer.switches(layer).items():
                yield f"{self.family.layers}.{index}.{name}", parameter

    def keep(self, index: int) -> None:
        """Let `outputs` of layer ``index``, which is loaded, stay as they are now."""

    def commit(self) -> None:
        """Write what was kept into the model's own weights."""

    def saved(self) -> Mapping[str, Tensor]:
        """What `restore` and `restored` need to know of all `outputs` as they are now.

        Copies on the host: about a third of the block parameters.
        """
        return {
            name: parameter.detach().to("cpu", copy=True)
            for index in range(len(self))
            for name, parameter in self.outputs(index)
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Put all `outputs` back to what they were, bit for bit."""
        for index in range(len(self)):
            for name, parameter in self.outputs(index):
                parameter.copy_(saved[name])

    def restored(self, saved: Mapping[str, Tensor], name: str) -> Tensor:
        """The values that the output ``name`` had, anywhere."""
        return saved[name]

    def identity(self) -> Iterator[tuple[str, Tensor | str]]:
        """What tells these weights from others: tensors or texts, each with a name, in a fixed
        order."""
        yield from self.model.named_parameters()

    def _layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """The context in which layer ``index`` is loaded."""
        return nullcontext(self.modules[index])

    def _loaded(self, name: str) -> AbstractContextManager[nn.Module]:
        """The context in which the submodule ``name`` is loaded."""
        return nullcontext(self.model.get_submodule(name))

    @property
    def final_norm(self) -> nn.Module:
        return self.model.get_submodule(self.family.norm)

    def _products(self, fast: bool) -> AbstractContextManager[object]:
        return fast_forward(self.device, self.dtype) if fast else nullcontext()

    def _embedded(self, ids: Tensor) -> Tensor:
        """The first layer's input, from the model's own forward around layers that only record."""
        recorders = [_Recorder() for _ in self.modules]
        decoder = self.model.get_submodule(self.family.decoder)
        layers = self.family.layers.rpartition(".")[2]
        with replaced(decoder, **{layers: nn.ModuleList(recorders)}):
            decoder(input_ids=ids, use_cache=False)
        self._arguments[tuple(ids.shape)] = [recorder.arguments for recorder in recorders]
        return recorders[0].hidden


def resident(model: nn.Module) -> Layers:
    """The walk over ``model``, all of whose weights are on one device.

    Raises InputError for a family that is not supported.
    """
    family_of(model)
    return Layers(model)


class _Recorder(nn.Module):
    """Stands where a decoder layer is: notes what is handed to it, and gives back its input."""

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden


@contextmanager
def replaced(module: nn.Module, **children: nn.Module) -> Iterator[None]:
    """Inside the block ``module`` has other ``children``; afterwards its own again."""
    own = {name: module.get_submodule(name) for name in children}
    try:
        for name, child in children.items():
            setattr(module, name, child)
        yield
    finally:
        for name, child in own.items():
            setattr(module, name, child)


class FetchedLayers(Layers, ABC):
    """Layers of a ``model`` whose weights are elsewhere: a layer has them for its turn only.

    What `keep` keeps of a layer lies on the host and is laid over what is fetched.
    """

    resident = False

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model, device)
        self._kept: dict[str, Tensor] = {}

    @abstractmethod
    def fetch(self, name: str) -> Tensor:
        """A copy of the weight ``name`` on the device."""

    def read(self, name: str) -> Tensor:
        """The weight ``name`` on the device, as fetched or as it was kept; a copy."""
        kept = self._kept.get(name)
        return self.fetch(name) if kept is None else kept.to(self.device, copy=True)

    def keep(self, index: int) -> None:
        for name, parameter in self.outputs(index):
            self._kept[name] = parameter.detach().to("cpu", copy=True)

    def saved(self) -> Mapping[str, Tensor]:
        """What was kept so far; nothing is copied."""
        return dict(self._kept)

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        self._kept = dict(saved)

    def restored(self, saved: Mapping[str, Tensor], name: str) -> Tensor:
        return saved[name] if name in saved else self.fetch(name)

    def identity(self) -> Iterator[tuple[str, Tensor | str]]:
        yield from self._sources()
        yield from sorted(self._kept.items())

    @abstractmethod
    def _sources(self) -> Iterator[tuple[str, Tensor | str]]:
        """What tells the weights that are fetched from others."""

    def _layer(self, index: int) -> AbstractContextManager[nn.Module]:
        return self._loaded(f"{self.family.layers}.{index}")

    @contextmanager
    def _loaded(self, name: str) -> Iterator[nn.Module]:
        module = self.model.get_submodule(name)
        own = dict(module.named_parameters())
        module.load_state_dict({key: self.read(f"{name}.{key}") for key in own}, assign=True)
        try:
            yield module
        finally:
            module.load_state_dict(own, assign=True)


class OffloadedLayers(FetchedLayers):
    """Layers of a ``model`` on the host that compute on another ``device``, one at a time."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model, device)
        self._weights = dict(model.named_parameters(remove_duplicate=False))
        small = (self.family.norm, f"{self.family.decoder}.{ROTARY}")
        self._norm, self._rotary = (deepcopy(model.get_submodule(n)).to(device) for n in small)

    def fetch(self, name: str) -> Tensor:
        return self._weights[name].detach().to(self.device, copy=True)

    @property
    def final_norm(self) -> nn.Module:
        return self._norm

    @torch.no_grad()
    def commit(self) -> None:
        for name, value in self._kept.items():
            self._weights[name].copy_(value)
        self._kept.clear()

    def _embedded(self, ids: Tensor) -> Tensor:
        decoder = self.model.get_submodule(self.family.decoder)
        norm = self.family.norm.rpartition(".")[2]
        with replaced(decoder, **{norm: nn.Identity(), ROTARY: self._rotary}):
            return super()._embedded(ids)

    def _sources(self) -> Iterator[tuple[str, Tensor | str]]:
        yield from self._weights.items()


class Branches:
    """Passes that leave a common prefix behind some layer and go on to the head on their own.

    Where all layers are resident each goes on at once and leaves nothing behind but its value.
    Elsewhere they travel side by side, so that a layer is fetched once for all of them: their
    hidden states wait on the host until `finish`.

    Args:
        layers: the model.
        measure: the value of a branch, from what the head reads, batch by batch, and the head.
        fast: products are as in `fast_forward`.
    """

    def __init__(
        self,
        layers: Layers,
        measure: Callable[[Iterable[Tensor], Head], float],
        *,
        fast: bool = False,
    ) -> None:
        self.layers, self.measure, self.fast = layers, measure, fast
        self.values: dict[Hashable, float] = {}
        self._travelling: dict[Hashable, list[Tensor]] = {}

    def leave(self, key: Hashable, index: int, states: Iterable[Tensor]) -> None:
        """Begin the branch ``key`` with ``states`` behind layer ``index``, batch by batch."""
        if self.layers.resident:
            self.values[key] = self._measured(index + 1, states)
        else:
            self._travelling[key] = [hidden.to(self.layers.waiting) for hidden in states]

    def pass_through(self, index: int) -> None:
        """Let the branches on their way take layer ``index``, which is loaded."""
        for key, states in self._travelling.items():
            self._travelling[key] = self.layers.through(index, states, fast=self.fast)

    def finish(self) -> dict[Hashable, float]:
        """Let those on their way arrive; the values of all branches, in the order they left."""
        with self.layers.headed() if self._travelling else nullcontext():
            for key, states in self._travelling.items():
                self.values[key] = self._measured(len(self.layers), states)
        self._travelling.clear()
        return self.values

    def _measured(self, start: int, states: Iterable[Tensor]) -> float:
        """The value of a branch whose ``states`` are the inputs of layer ``start``."""

        def final(hidden: Tensor) -> Tensor:
            for index in range(start, len(self.layers)):
                hidden = self.layers.run(index, hidden, fast=self.fast)
            return self.layers.norm(hidden, fast=self.fast)

        here = (hidden.to(self.layers.device) for hidden in states)
        return self.measure((final(hidden) for hidden in here), self.layers.head)
