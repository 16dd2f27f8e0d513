"""What is installed and what can run: look here first when something is slow or missing."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastprune.config import CommonConfig
from fastprune.kernels.backend import backends
from fastprune.report.run import versions


@dataclass(kw_only=True)
class InfoConfig(CommonConfig):
    """Show versions, compiled kernels, why CUDA is on or off, CPU level and threads.

    For example:
        fastprune info
        fastprune info --json info.json
    """


def run_info(config: InfoConfig) -> dict[str, Any]:
    """Versions, backends and devices as plain data."""
    return {
        "versions": versions(),
        "kernels": [asdict(found) for found in backends()],
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
    }


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }
