"""Compiled kernels (CPU and CUDA) with plain-torch definitions, and the optimizer built on them."""

from fastprune.kernels import attention as attention  # registers torch.ops.fastprune.attention
from fastprune.kernels.backend import Backend, backends, cpu_level
from fastprune.kernels.ops import ScanResult, cross_entropy, gather, scan, scan_all, taylor
from fastprune.kernels.optim import AdamW

__all__ = [
    "AdamW",
    "Backend",
    "ScanResult",
    "backends",
    "cpu_level",
    "cross_entropy",
    "gather",
    "scan",
    "scan_all",
    "taylor",
]
