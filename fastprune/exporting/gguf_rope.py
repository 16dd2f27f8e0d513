"""The rotary embedding in the words of llama.cpp: settings, and tensors of factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.exporting.gguf_architectures import Architecture
from fastprune.models.gguf import ATTENTION, DEFAULT_THETA, FREQUENCIES, LONG, SHORT

KNOWN = ("default", "linear", "llama3", "yarn", "longrope")


def rope(
    config: Any, architecture: Architecture, head_dim: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings by name, without the architecture in front, and tensors by name.

    Raises InputError for a rotary embedding that llama.cpp does not compute.
    """
    said = config.rope_parameters
    settings: dict[str, Any] = {}
    if "full_attention" in said:  # a rotary embedding of their own for layers with a window
        settings["rope.freq_base_swa"] = _window_base(said["sliding_attention"])
        said = said["full_attention"]
    kind = said.get("rope_type", "default")
    part = said.get("partial_rotary_factor", 1.0)
    settings |= {
        "rope.freq_base": float(said["rope_theta"]),
        "rope.dimension_count": int(head_dim * part),
    }
    if part != 1.0 and not architecture.partial:
        raise _refusal("a rotary embedding of a part of each head")
    if kind in KNOWN[1:] and kind not in architecture.scalings:
        raise _refusal(f"{kind} rotary scaling in the architecture {architecture.name}")
    if kind == "default":
        return settings, {}
    if kind == "linear":
        return settings | _scaling("linear", said["factor"]), {}
    if kind == "llama3":
        return settings, {FREQUENCIES: _llama3(config, said, head_dim)}
    if kind == "yarn":
        return settings | _yarn(said, config.max_position_embeddings), {}
    if kind == "longrope":
        found = {LONG: said["long_factor"], SHORT: said["short_factor"]}
        tensors = {name: torch.tensor(values).float() for name, values in found.items()}
        return settings | _longrope(said, config), tensors
    raise _refusal(f"{kind} rotary scaling")


def _window_base(said: dict[str, Any]) -> float:
    """The base of the layers with a sliding window, whose rotary embedding is never scaled.

    Loaders that do not read it take the default.
    """
    if said.get("rope_type", "default") != "default" or said["rope_theta"] != DEFAULT_THETA:
        raise _refusal("a rotary embedding of its own kind for layers with a sliding window")
    return float(said["rope_theta"])


def _scaling(kind: str, factor: float) -> dict[str, Any]:
    return {"rope.scaling.type": kind, "rope.scaling.factor": float(factor)}


def _llama3(config: Any, said: dict[str, Any], head_dim: int) -> Tensor:
    """What each rotary frequency is divided by (head_dim / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return said["rope_theta"] ** -powers / scaled


def _yarn(said: dict[str, Any], positions: int) -> dict[str, Any]:
    original = said.get("original_max_position_embeddings") or positions
    usual = 0.1 * math.log(said["factor"]) + 1.0 if said["factor"] > 1 else 1.0
    attention = said.get("attention_factor")
    special = attention is not None and not math.isclose(attention, usual, rel_tol=1e-6)
    if (
        special
        or said.get("mscale")
        or said.get("mscale_all_dim")
        or not said.get("truncate", True)
    ):
        raise _refusal("yarn rotary scaling with an attention factor or borders of its own")
    return _scaling("yarn", said["factor"]) | {
        "rope.scaling.original_context_length": int(original),
        "rope.scaling.yarn_beta_fast": float(said.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(said.get("beta_slow") or 1.0),
    }


def _longrope(said: dict[str, Any], config: Any) -> dict[str, Any]:
    original = said.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if not original:
        raise _refusal("longrope rotary scaling without an original context length")
    factor = said.get("factor") or config.max_position_embeddings / original
    attention = said.get("attention_factor") or (
        math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    )
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": int(original),
        ATTENTION: float(attention),
    }


def _refusal(what: str) -> InputError:
    return InputError(f"{what} cannot be in a .gguf file; export as hf")
