"""How the units of a sublayer lie in the parameters of its decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastprune.models.experts import INPUTS as EXPERT_INPUTS
from fastprune.models.experts import OUTPUT as EXPERT_OUTPUT
from fastprune.models.experts import Mixture


@dataclass(frozen=True)
class Slice:
    """How the units of a sublayer lie in one parameter.

    ``dim`` is the dimension that units index; unit ``u`` owns the entries ``offset + u * width`` to
    ``offset + (u + 1) * width`` of it.
    """

    module: str
    parameter: str
    dim: int
    width: int
    offset: int
    units: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}"

    @property
    def span(self) -> slice:
        """The entries along ``dim`` that units own."""
        return slice(self.offset, self.offset + self.units * self.width)

    def by_unit(self, values: Tensor) -> Tensor:
        """Of ``values``, one for each entry along ``dim``, those of the units (units, width)."""
        return values[self.span].view(self.units, self.width)


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of one decoder layer: its units, and where they lie in its parameters.

    ``inputs`` are the slices whose rows make the units, ``output`` the columns through which they
    reach the hidden states, ``scales`` those of norms over all heads. ``norms`` are the modules
    that nothing reads without the sublayer, ``output_norm`` the one among them that the output goes
    through before it is added to the hidden states, if any. Where the sublayer is a ``mixture`` the
    units are its experts, each with so many ``channels``, and at least so many stay as a token is
    routed to.
    """

    kind: str
    module: str
    norms: tuple[str, ...]
    inputs: tuple[Slice, ...]
    output: Slice
    units: int
    scales: tuple[Slice, ...] = ()
    output_norm: str | None = None
    mixture: Mixture | None = None
    channels: int = 0
    least: int = 1

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The slices of linear modules, by which units are scored; the output last."""
        return (*self.inputs, self.output)

    @property
    def owned(self) -> dict[str, list[Slice]]:
        """All slices by the parameter they lie in, which is cut once with all of its own."""
        found: dict[str, list[Slice]] = {}
        for s in (*self.inputs, *self.scales, self.output):
            found.setdefault(s.name, []).append(s)
        return found

    def linear(self, layer: nn.Module) -> nn.Linear:
        """The linear module of ``layer`` whose columns ``output`` describes; a mixture has none."""
        return layer.get_submodule(self.output.module)

    def adds(self, layer: nn.Module) -> nn.Module:
        """The module of ``layer`` whose output the layer adds to the hidden states."""
        path = self.output.module if self.mixture is None else self.mixture.block
        return layer.get_submodule(self.output_norm or path)

    def switches(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of ``layer`` by which units are taken out on trial, by name."""
        if self.mixture is None:
            modules = [self.output.module]
        else:
            modules = [self.mixture.router, *filter(None, [self.mixture.always])]
        found = {
            f"{path}.{name}": parameter
            for path in modules
            for name, parameter in layer.get_submodule(path).named_parameters()
        }
        if self.mixture is not None:
            found[self.output.name] = layer.get_parameter(self.output.name)
        return found

    def unit_cost(self, layer: nn.Module) -> int:
        """Parameters of ``layer`` that one unit owns."""
        total = 0
        for name, slices in self.owned.items():
            parameter = layer.get_parameter(name)
            width = sum(s.width for s in slices)
            total += width * parameter.numel() // parameter.shape[slices[0].dim]
        return total

    def channel_cost(self, layer: nn.Module) -> int:
        """Parameters of ``layer`` that one channel of every expert owns."""
        names = (f"{self.output.module}.{name}" for name in (EXPERT_INPUTS, EXPERT_OUTPUT))
        return sum(layer.get_parameter(name).numel() for name in names) // self.channels

    def parameters(self, layer: nn.Module) -> int:
        """Parameters that leave ``layer`` with the whole sublayer, its norms included."""
        modules = (layer.get_submodule(name) for name in (self.module, *self.norms))
        return sum(p.numel() for module in modules for p in module.parameters())
