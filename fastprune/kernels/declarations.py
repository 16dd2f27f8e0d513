"""What each op takes and gives: the one place that says so.

ops.py and attention.py call the compiled ops by what is listed here. The tests hold every other
signature against it: the compiled module's, its stub _C.pyi, and those of reference.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch

TENSOR, OPTIONAL, TENSORS = "Tensor", "Tensor | None", "list[Tensor]"


@dataclass(frozen=True)
class Op:
    """An op: a function that is compiled, and defined in plain torch under the same name.

    The plain function takes the inputs and returns the results. The compiled one takes inputs,
    hints, results to be filled and, where it wants one, a workspace, in that order. Values are
    types, as the stub writes them.
    """

    name: str
    inputs: Mapping[str, str]
    results: Mapping[str, str]
    workspace: tuple[str, ...] = ()
    """the values on which the size of the workspace depends; none: there is no workspace"""
    hints: Mapping[str, str] = field(default_factory=dict)
    """what only the compiled op wants to know"""

    @cached_property
    def arguments(self) -> dict[str, str]:
        """The arguments of the compiled op, in order."""
        workspace = {"workspace": TENSOR} if self.workspace else {}
        return {**self.inputs, **self.hints, **self.results, **workspace}

    def run(self, module: ModuleType, device: torch.device, **values: Any) -> None:
        """Call the compiled op; `values` are all its arguments but the workspace, which is made
        here, and what the size of that depends on."""
        if self.workspace:
            size = getattr(module, f"{self.name}_workspace")(*[values[n] for n in self.workspace])
            values["workspace"] = torch.empty(size, dtype=torch.uint8, device=device)
        getattr(module, self.name)(*[values[name] for name in self.arguments])


TAYLOR = Op(
    "taylor",
    {"w": TENSOR, "g": OPTIONAL, "h": OPTIONAL, "x": OPTIONAL, "kind": "str"},
    {"rows": TENSOR, "cols": TENSOR},
    workspace=("w",),
)
GATHER = Op(
    "gather",
    {"tensors": TENSORS, "indices": TENSORS, "dims": "list[int]"},
    {"out": TENSORS},
    workspace=("tensors", "indices", "dims", "out"),
    hints={"fresh": "bool"},
)
SCAN = Op("scan", {"tensors": TENSORS}, {"out": TENSOR}, workspace=("tensors",))
CROSS_ENTROPY = Op(
    "cross_entropy",
    {"logits": TENSOR, "targets": TENSOR, "scale": "float | None"},
    {"loss": TENSOR, "log_normaliser": TENSOR},
)
ATTENTION = Op(
    "attention",
    {"q": TENSOR, "k": TENSOR, "v": TENSOR, "scale": "float"},
    {"out": TENSOR, "log_sums": TENSOR},
    workspace=("q", "k"),
)
ATTENTION_BACKWARD = Op(
    "attention_backward",
    {
        **dict.fromkeys(("grad_out", "q", "k", "v", "out", "log_sums"), TENSOR),
        "scale": "float",
    },
    {"grad_q": TENSOR, "grad_k": TENSOR, "grad_v": TENSOR},
    workspace=("q", "at_once"),
)
OPS = (TAYLOR, GATHER, SCAN, CROSS_ENTROPY, ATTENTION, ATTENTION_BACKWARD)


class AdamWBuffers(NamedTuple):
    """What AdamW keeps from step to step on one device, beside the states of n parameters."""

    steps: torch.Tensor
    """(n,) int64, steps taken"""
    stats: torch.Tensor
    """(n, 2) float64, result: sum of squares (of finite values), non-finite count"""
    total: torch.Tensor
    """(2,) float64, result: the same over all parameters"""
    control: torch.Tensor
    """(3,) float64: loss scale, sound steps since it changed, skipped steps"""
    workspace: torch.Tensor
    """bytes, as many as ops.adamw_workspace has"""


class AdamWRule(NamedTuple):
    """Settings of an AdamW step that all groups of parameters share."""

    max_norm: float = 0.0
    """clip the gradients' total norm; 0 does not clip"""
    master: str = "none"
    """what half-precision weights have: fp32 (copies), stochastic (rounding, drawn from seed, step,
    slot and index) or none"""
    seed: int = 0
    growth: float = 1.0
    """the loss scale changes by this factor after `interval` sound steps in a row"""
    backoff: float = 1.0
    """and by this one after a step that is skipped"""
    interval: int = 0
    """0 keeps the loss scale"""
