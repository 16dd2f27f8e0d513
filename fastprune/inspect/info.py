"""What is installed and what can run: look here first when something is slow or missing."""

import importlib.metadata
import os
import platform
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastprune.config import CommonConfig
from fastprune.kernels.backend import backends
from fastprune.report.run import versions


@dataclass(kw_only=True)
class InfoConfig(CommonConfig):
    """Show versions, compiled kernels, why CUDA is on or off, CPU level and threads.

    Include its output when you report a fault. For example:
        fastprune info
        fastprune info --json info.json
    """


def run_info(config: InfoConfig) -> dict[str, Any]:
    """Versions, machine, backends and devices as plain data: no names of users, hosts or paths."""
    return {
        "versions": versions(_required()),
        "system": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        },
        "kernels": [asdict(found) for found in backends()],
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
    }


def _required() -> list[str]:
    """Names of the packages that this one requires, those of extras left out."""
    try:
        requirements = importlib.metadata.requires("fastprune") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, without an installation
        return []
    needed = (r for r in requirements if "extra ==" not in r)
    return sorted(re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in needed)


def _processor() -> str:
    """The processor's name as Linux has it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }
