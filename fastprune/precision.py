"""Which precision a forward pass may use where only its statistics matter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

UNITS = {
    torch.bfloat16: {"amx_bf16", "avx512_bf16", "bf16", "sve_bf16"},
    torch.float16: {"amx_fp16", "avx512_fp16", "fp16_arith"},
}
"""Any of these features of a processor, as torch names them, multiplies in that precision."""

FAST_BF16 = {"amx_bf16", "avx512_bf16"}
"""With either, a processor multiplies in bf16 several times as fast as in fp32."""


def fast_forward(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> AbstractContextManager[object]:
    """bf16 autocast where bf16 matrix units make it several times faster, else nothing.

    ``dtype`` is that of the weights: half-precision weights are left as they are.

    For passes that gather statistics over thousands of tokens: weights, sums and results stay in
    their own precision, only the matrix products are rounded to bf16 on the way in.
    """
    fast = dtype == torch.float32 and bf16_is_fast(device)
    return torch.autocast(device.type, dtype=torch.bfloat16) if fast else nullcontext()


def convert_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters of ``model`` to ``dtype`` in place, and nothing else.

    ``model.to(dtype)`` would round the buffers as well, rotary frequencies among them, which a
    model that is loaded in ``dtype`` keeps in fp32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def leave_double(model: nn.Module) -> None:
    """Convert the float64 parameters of ``model`` to float32 in place: no kernel computes in more.

    Its configs say so too, where they named float64.
    """
    for parameter in model.parameters():
        if parameter.dtype == torch.float64:
            parameter.data = parameter.data.float()
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "dtype", None) == torch.float64:
            config.dtype = torch.float32


def bf16_is_fast(device: torch.device) -> bool:
    """Whether `device` has bf16 matrix units; without them bf16 can be far slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and not FAST_BF16.isdisjoint(cpu_features())


def lacks_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` is a processor without instructions for products in the half-precision
    `dtype`: they can take it hundreds of times as long as fp32. False where torch cannot tell."""
    features = cpu_features() if device.type == "cpu" else set()
    return bool(features) and UNITS[dtype].isdisjoint(features)


def cpu_features() -> set[str]:
    """What this processor has, by torch's names; empty where torch cannot tell."""
    # torch 2.10 does not have it: products stay in fp32 there
    features: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return {name for name, present in features.items() if present}
