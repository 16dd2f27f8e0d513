"""Whether a model that is not declared can be cut: masking and surgery tried on a small one.

That modules have the names and shapes of a family does not say that they compute the same. So a
small random model of the same class loses half of its units twice: once they are zeroed, once cut
out. Both must compute the same, and so must a stock model that is built anew with the cut weights.
A decoder inside a multimodal model must compute of a text what that model does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.models.adopted import adopted_config
from fastprune.models.checks import reason
from fastprune.models.families import UNITS, geometries
from fastprune.models.layers import Layers
from fastprune.models.multimodal import enclosing
from fastprune.models.quiet import quiet_libraries
from fastprune.pruning.masking import mask
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.surgery import apply_plan

GROUPS, CHANNELS, VOCABULARY = 2, 32, 64
MOST_QUERIES = 4
"""Query heads to a KV group of the small model."""
WINDOWS, LENGTH = 2, 16
TOLERANCE = 1e-4
"""Relative error of the logits that rounding in fp32 explains."""
MOST_PARAMETERS = 10**8
"""Of the small model."""
HALF_TOLERANCE = 2e-2
"""The same in half precision."""
SPREAD = 0.2
"""Standard deviation of the random norms and biases, which stock models begin with ones and zeros.
"""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_surgery(model: nn.Module, structures: Iterable[str]) -> None:
    """InputError unless cutting the units of `structures` equals zeroing them.

    `model` is of an adopted type; its weights are not looked at. What is tried is a random fp32
    model of its class with its head size, two KV groups and a few channels.
    """
    kind = model.config.model_type
    for structure in structures:
        problem = _tried(model, structure)
        if problem is None:
            continue
        channels = structure == "attention" and _tried(model, "mlp") is None
        instead = "; use --structures mlp" if channels else ""
        raise InputError(
            f"the {UNITS[structure]} of a '{kind}' cannot be removed as those of its family: on a "
            f"small random model of that type, {problem}{instead}"
        )


def _tried(model: nn.Module, structure: str) -> str | None:
    """What goes wrong when `structure` is cut in a small model; None where nothing does."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), quiet_libraries():
            torch.manual_seed(0)
            return _problem(small_model(model), structure)
    except Exception as error:  # a class that is not known may raise whatever it likes
        return f"it ended in an error ({reason(error)})"


@torch.no_grad()
def check_decoder(model: nn.Module, windows: Tensor) -> None:
    """InputError unless the multimodal model around `model`, if there is one, computes of a text
    what `model` does. The beginning of the first of the `windows` (n, s) of token ids is read."""
    around = enclosing(model)
    if around is None:
        return
    kind = around.model.config.model_type
    ids = windows[:1, :LENGTH].to(next(model.parameters()).device)
    own = model(input_ids=ids, use_cache=False).logits.float()
    try:
        whole = around.model(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:  # a class that is not known may raise whatever it likes
        raise InputError(f"a '{kind}' does not read a text alone: {reason(error)}") from error
    tolerance = TOLERANCE if model.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    if not (difference := _relative(own, whole)) <= tolerance:
        raise InputError(
            f"a '{kind}' computes something else of a text than its decoder with its head (logits "
            f"differ by {difference:.1e} of their size), so its decoder cannot be pruned by itself"
        )


def small_model(model: nn.Module) -> Any:
    """A random fp32 model in eval mode, of the class of `model`, with two layers or one of each of
    its layer types, GROUPS KV groups and CHANNELS channels."""
    size = geometries(model)[0]
    heads = GROUPS * min(size.queries_per_kv, MOST_QUERIES)
    settings = model.config.to_dict()
    count = settings["num_hidden_layers"]
    kinds = settings.get("layer_types") or ["layer"] * count
    chosen = sorted({kinds.index(kind) for kind in kinds})
    chosen = chosen if len(chosen) > 1 else list(range(min(2, count)))
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == count and name not in TOKENS:
            settings[name] = [value[index] for index in chosen]
    settings |= {
        "num_hidden_layers": len(chosen),
        "num_attention_heads": heads,
        "num_key_value_heads": GROUPS,
        "head_dim": size.head_dim,
        "hidden_size": heads * size.head_dim,
        "intermediate_size": CHANNELS,
        "vocab_size": VOCABULARY,
        "dtype": torch.float32,
        **{name: 0 for name in TOKENS if settings.get(name) is not None},
    }
    for name in ("model_type", "architectures"):
        settings.pop(name, None)
    config = type(model.config)(**settings)
    with torch.device("meta"):
        if sum(p.numel() for p in type(model)(config).parameters()) > MOST_PARAMETERS:
            raise ValueError("its config leaves parts of it large")
    found = type(model)(config).float().eval()
    for name, parameter in found.named_parameters():
        if parameter.dim() > 1:  # outputs as large as inputs, so that every unit shows
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=SPREAD)
    return found


@torch.no_grad()
def _problem(model: Any, structure: str) -> str | None:
    """What goes wrong when half of the units of `structure` leave `model`; None where nothing
    does."""
    masked, cut = copy.deepcopy(model), copy.deepcopy(model)
    plan = _halved(model, structure)
    mask(Layers(masked), plan, None)
    apply_plan(cut, plan)
    anew = type(model)(adopted_config(model.config, plan.result())).float().eval()
    weights = cut.state_dict()
    for name, parameter in anew.named_parameters():
        if parameter.shape != weights[name].shape:
            built, own = tuple(parameter.shape), tuple(weights[name].shape)
            return f"its stock class builds {name} as {built}, and {own} is left of it"
    anew.load_state_dict(weights)
    ids = torch.randint(VOCABULARY, (WINDOWS, LENGTH))
    layers = Layers(masked)
    expected = masked(input_ids=ids, use_cache=False).logits
    walked = torch.cat([layers.head(hidden) for hidden in layers.final([ids], "trying")])
    for found, what in (
        (walked, "its logits are not what its head makes of the last hidden states"),
        (
            cut(input_ids=ids, use_cache=False).logits,
            f"cutting {structure} units differs from zeroing them",
        ),
        (anew(input_ids=ids, use_cache=False).logits, "its stock class computes something else"),
    ):
        if not (error := _relative(expected, found)) <= TOLERANCE:
            return f"{what} (logits differ by {error:.1e} of their size)"
    return None


def _halved(model: nn.Module, structure: str) -> Plan:
    """Every second unit of `structure` goes, in every layer."""
    sizes = geometries(model)
    layers = []
    for index, size in enumerate(sizes):
        kept = {kind: tuple(range(units)) for kind, units in size.units.items()}
        layers.append(LayerPlan(index, kept | {structure: kept[structure][1::2]}))
    return Plan(tuple(sizes), tuple(layers))


def _relative(expected: Tensor, found: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where the shapes differ."""
    if expected.shape != found.shape:
        return float("inf")
    return ((found - expected).norm() / expected.norm()).item()
