"""Compiled kernels (CPU and CUDA) with plain-torch definitions, and the optimizer built on them."""

from fastprune.kernels.backend import Backend, backends, cpu_level
from fastprune.kernels.ops import ScanResult, adamw, gather, scan, scan_all, taylor

__all__ = [
    "Backend",
    "ScanResult",
    "adamw",
    "backends",
    "cpu_level",
    "gather",
    "scan",
    "scan_all",
    "taylor",
]
