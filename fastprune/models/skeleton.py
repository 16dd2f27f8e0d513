"""A model without values: what its parameters are called, and their shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastprune.models.attention import use_attention
from fastprune.models.modeling import register
from fastprune.models.quiet import quiet_libraries


def skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal language model that ``config`` describes, on the meta device, in eval mode."""
    from transformers import AutoModelForCausalLM

    register()
    with torch.device("meta"), quiet_libraries():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    use_attention(model)
    return model
