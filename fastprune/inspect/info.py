"""What is installed and what can run: the first thing to look at when something is slow or missing."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastprune.config import CommonConfig
from fastprune.kernels import backend

PACKAGES = ("fastprune", "torch", "transformers", "peft", "safetensors", "gguf")


@dataclass(kw_only=True)
class InfoConfig(CommonConfig):
    """Show versions, compiled kernels, why CUDA is on or off, CPU level and threads."""


def run_info(config: InfoConfig) -> dict[str, Any]:
    """Versions, backends and devices as plain data."""
    return {
        "versions": {"python": platform.python_version(), **versions()},
        "kernels": backend.report(),
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """Installed versions of the packages a result depends on; None where one is missing."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }
