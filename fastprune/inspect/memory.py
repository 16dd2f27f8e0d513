"""How much memory a process or a CUDA device has used, and what a piece of work took."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_PEAK = Path("/proc/self/clear_refs")


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use so far: of the CUDA device's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        # VmHWM is this program's own; ru_maxrss also counts the process that started it.
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB elsewhere


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory_bytes` count from now on; on a CPU only Linux can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        CLEAR_PEAK.write_text("5")


class Extra:
    """The most memory taken since it was made, beyond what was in use then.

    ``bytes()`` is 0 where the system does not tell (a CPU without Linux). Forgets the peak so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._give_back()
        forget_peak(device)
        self.before = self._in_use()

    def bytes(self) -> int:
        """How many there were at most, so far."""
        return max(0, peak_memory_bytes(self.device) - self.before)

    def _in_use(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status("VmRSS") if STATUS.exists() else sys.maxsize

    def _give_back(self) -> None:
        """Return to the system what was freed: taken again, it would not count as growth."""
        if self.device.type == "cpu" and sys.platform == "linux":
            with suppress(AttributeError):  # another C library than glibc
                ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """Bytes that the kernel's line `name` of this process says."""
    line = next(s for s in STATUS.read_text().splitlines() if s.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
