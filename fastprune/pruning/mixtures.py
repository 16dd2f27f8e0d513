"""What pruning asks for in mixtures of experts: settings that apply, and a guard against collapse.

A router that loses experts gives their tokens to the others. The routed share of every kept expert
is counted on the evaluation text, before and after, in the passes that measure the perplexity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.distributed import Processes
from fastprune.errors import InputError
from fastprune.models.families import declaration, decoder_layers, geometries, sublayers
from fastprune.models.layers import Layers
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.plan import Plan

MOST, TIMES = 0.5, 2.0
"""An expert takes most tokens if so large a part of them is routed to it, and so many times what it
would be if all were used alike."""
HARDLY = 0.05
"""An expert is hardly used if it gets less than this share of what it would if all were used
alike."""
MULTIPLE = 8
"""Kernels that multiply the matrices of all experts at once, as transformers does by default, take
16-bit rows of a multiple of 16 bytes."""
INSTEAD = {
    "allocation": ("search", "uniform or global"),
    "importance": ("obs", "routed-output or activation-maw"),
}
"""Values of settings that need one output matrix for a sublayer, which a mixture does not have, and
what to use instead."""


def has_experts(model: nn.Module) -> bool:
    """Whether some layer of ``model`` has experts in place of its MLP."""
    return any(size.experts for size in geometries(model))


def check_mixture(model: nn.Module, config: PruneConfig) -> None:
    """InputError when ``config`` asks for what cannot be done with the layers of ``model``."""
    if not has_experts(model):
        for asked, flag in (
            ("experts" in config.structures, "--structures experts"),
            (config.importance == "routed-output", "--importance routed-output"),
        ):
            if asked:
                raise InputError(f"{flag}: no layer of this model has experts; leave it out")
        return
    for name, (value, instead) in INSTEAD.items():
        if getattr(config, name) == value:
            raise InputError(
                f"--{name} {value} goes by the one output matrix of a sublayer, and every expert "
                f"has its own; use --{name} {instead}"
            )
    if config.importance == "routed-output" and config.allocation == "global":
        raise InputError(
            "--importance routed-output ranks the experts of one layer, --allocation global those "
            "of all; use --allocation uniform, or --importance activation-maw"
        )
    inside = "mlp" in config.structures and "experts" not in config.structures
    if inside and config.align is not None and config.align % MULTIPLE:
        raise InputError(
            f"--align {config.align}: experts are computed together, which takes multiples of "
            f"{MULTIPLE} channels; use --align {MULTIPLE} or a multiple of it"
        )
    if config.target_latency is not None:
        raise InputError(
            "--target-latency: a token takes as many experts as before, however many there are to "
            "choose from; use --ratio, --target-params or --target-bytes"
        )


def check_routed(model: nn.Module, plan: Plan) -> None:
    """InputError where ``plan`` leaves a layer fewer experts than a token is routed to, or experts
    of a width that cannot be computed."""
    for layer, own in zip(decoder_layers(model), plan.layers, strict=True):
        for sublayer in sublayers(layer):
            kept = len(own.kept[sublayer.kind])
            if sublayer.mixture is not None and 0 < kept < sublayer.least:
                raise InputError(
                    f"the plan keeps {kept} experts of layer {own.index}, and a token is routed to "
                    f"{sublayer.least}; keep that many, or lower num_experts_per_tok in the "
                    "model's config.json first"
                )
            width = own.channels
            if sublayer.mixture is not None and width and width % smallest_align(model):
                raise InputError(
                    f"the plan keeps {width} channels of the experts of layer {own.index}, which "
                    f"are computed together in multiples of {MULTIPLE}; keep such a number"
                )


def smallest_align(model: nn.Module) -> int:
    """The least multiple in which channels inside of the experts of ``model`` can be kept; 1 where
    its own numbers of channels are no multiples of `MULTIPLE`."""
    widths = {size.channels for size in geometries(model) if size.experts}
    return MULTIPLE if widths and not any(width % MULTIPLE for width in widths) else 1


class Shares:
    """How many of the tokens are routed to each expert of the layers of a model."""

    def __init__(self, layers: Layers) -> None:
        mixture = declaration(layers.model).mixture
        self.routers = {
            index: router
            for index, layer in enumerate(layers.modules)
            if mixture is not None and (router := mixture.router_of(layer)) is not None
        }
        self.counts = {
            index: torch.zeros(router.num_experts + 1, dtype=torch.float64, device=layers.device)
            for index, router in self.routers.items()
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Tokens that are routed inside the block count."""

        def count(index: int) -> Any:
            def see(_: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
                chosen, own = output[2], self.counts[index]
                own[:-1] += torch.bincount(chosen.flatten(), minlength=len(own) - 1)
                own[-1] += len(chosen)

            return see

        with ExitStack() as stack:
            for index, router in self.routers.items():
                stack.callback(router.register_forward_hook(count(index)).remove)
            yield

    def complete(self, processes: Processes) -> dict[int, list[float]]:
        """By layer, the part of all tokens that each expert gets; those of one layer sum to the
        experts of a token. Call it once; all ``processes`` count."""
        processes.sum_(*self.counts.values())
        return {i: (c[:-1] / c[-1].clamp_min(1)).tolist() for i, c in self.counts.items()}


def shares_record(
    plan: Plan, before: Mapping[int, Sequence[float]], after: Mapping[int, Sequence[float]]
) -> list[dict[str, Any]]:
    """The routed shares of the experts that ``plan`` keeps, layer by layer, as metrics have them.

    ``before`` are those of all experts of the uncut model, ``after`` those of the result's.
    """
    return [
        {
            "layer": index,
            "experts": list(kept),
            "before": [before[index][expert] for expert in kept],
            "after": list(after[index]),
        }
        for index in before
        if (kept := plan.layers[index].kept["experts"]) and index in after
    ]


def collapse(shares: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on experts that take most tokens, or hardly any, and did not do so before."""
    most, least = [], []
    for layer in shares:
        for expert, before, after in zip(layer["experts"], layer["before"], layer["after"]):
            even = sum(layer["after"]) / len(layer["after"])
            name = f"{expert} of layer {layer['layer']} ({before:.0%} before, {after:.0%} now)"
            if _most(after, even) and not _most(before, even):
                most.append(name)
            if after < HARDLY * even and before >= HARDLY * even:
                least.append(name)
    found = []
    for names, what in ((most, "takes most tokens"), (least, "is hardly used any more")):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(
                f"the routing has changed: expert {names[0]} {what}{more}; finetune the result, "
                "or remove fewer experts"
            )
    return found


def _most(share: float, even: float) -> bool:
    return share > MOST and share > TIMES * even
