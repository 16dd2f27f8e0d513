"""A model without values: what its parameters are called, and their shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastprune.errors import InputError
from fastprune.models.attention import use_attention
from fastprune.models.checks import reason
from fastprune.models.modeling import register
from fastprune.models.multimodal import auto_class, text_part
from fastprune.models.quiet import quiet_libraries


def skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal language model that ``config`` describes, on the meta device, in eval mode.

    Of a multimodal model it is the decoder. Raises InputError where transformers has no such model.
    """
    register()
    try:
        with torch.device("meta"), quiet_libraries():
            model = text_part(auto_class(config).from_config(config, dtype=dtype)).eval()
    except ValueError as error:
        raise InputError(
            f"a '{config.model_type}' is no language model that transformers builds"
        ) from error
    except Exception as error:  # sizes that are none lead torch and transformers to any
        raise InputError(
            f"the config of a '{config.model_type}' describes no model: {reason(error)}"
        ) from error
    use_attention(model)
    return model
