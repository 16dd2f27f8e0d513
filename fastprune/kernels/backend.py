"""Which kernels can run here, and why the others cannot.

Importing this module loads the compiled kernels, connects them to torch (DLPack exchange, thread
pool) and chooses the CPU level; FASTPRUNE_CPU_LEVEL asks for a lower one. Nothing here fails: what
is missing is recorded with its reason, and the ops fall back to reference.py.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch


@dataclass(frozen=True)
class Backend:
    """One way to run the kernels. `reason` says why it is not usable, or notes a limitation."""

    name: str
    usable: bool
    reason: str = ""
    detail: str = ""


def _load() -> tuple[ModuleType | None, str]:
    try:
        from fastprune.kernels import _C
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None:
        return None, f"torch {torch.__version__} has no DLPack exchange API (2.10 and later have)"
    try:
        _C.connect(torch.Tensor, exchange)
        level = os.environ.get("FASTPRUNE_CPU_LEVEL")
        if level:
            _C.set_cpu_level(level)
    except ValueError as error:
        return None, str(error)
    return _C, ""


def _borrow_threads(module: ModuleType) -> str:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).torch_parallel_for
    except (OSError, AttributeError) as error:
        return f"single-threaded: torch's thread pool is out of reach ({error})"
    module.set_parallel_for(ctypes.cast(function, ctypes.c_void_p).value)
    return ""


_module, _reason = _load()
_threads_reason = _borrow_threads(_module) if _module else ""
_cuda_reason = _module.cuda_unavailable_reason() if _module else _reason


def compiled(device: torch.device) -> ModuleType | None:
    """The compiled module if it serves this device, else None (use reference.py)."""
    if device.type == "cpu":
        return _module
    return _module if device.type == "cuda" and not _cuda_reason else None


def cpu_level() -> str | None:
    """The instruction set in use (v2, v3, v4, amx, generic), None without compiled kernels."""
    return _module.cpu_level() if _module else None


def backends() -> list[Backend]:
    """CPU and CUDA, with reasons and details for a person to read."""
    if _module is None:
        return [Backend("cpu", False, _reason), Backend("cuda", False, _reason)]
    levels = ", ".join(_module.cpu_levels())
    threads = 1 if _threads_reason else torch.get_num_threads()
    cpu = f"level {_module.cpu_level()} of {levels}; threads: {threads}"
    cuda = "" if _cuda_reason else torch.cuda.get_device_name()
    return [
        Backend("cpu", True, _threads_reason, cpu),
        Backend("cuda", not _cuda_reason, _cuda_reason, cuda),
    ]
