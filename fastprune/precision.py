"""Which precision a forward pass may use where only its statistics matter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

CPU_UNITS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}
"""Any of these features of a processor, as torch names them, multiplies in that precision."""


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


def bf16_is_fast(device: torch.device) -> bool:
    """Whether `device` has bf16 matrix units; without them bf16 can be far slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def lacks_units(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `device` is a processor without instructions for products in the half-precision
    `dtype`: they can take it hundreds of times as long as fp32. False where torch cannot tell."""
    if device.type != "cpu":
        return False
    # torch 2.10 does not have it
    features: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(features) and not any(features.get(name) for name in CPU_UNITS[dtype])
