"""A forward pass as a test: what comes out, and where it first went wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.inspect.anatomy import LAYER
from fastprune.inspect.health import unsound
from fastprune.messages import Message


@dataclass(frozen=True)
class ForwardTest:
    """Output of one forward pass over ``tokens`` tokens, computed in ``dtype``.

    ``min``, ``max`` and ``mean`` are over the finite logits. ``broken_at`` names the first module,
    in the order they run, whose output was not finite. ``constant`` says that all logits are the
    same. ``layers`` holds the largest magnitude of each layer's output, NaN where it is not finite.
    """

    tokens: int
    shape: tuple[int, ...]
    nan: int
    inf: int
    min: float
    max: float
    mean: float
    constant: bool
    broken_at: str | None
    layers: dict[str, float]
    seconds: float
    dtype: str = "float32"

    @property
    def sound(self) -> bool:
        return self.broken_at is None and not (self.nan or self.inf) and not self.constant

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready data; NaN where nothing is finite."""
        return {**asdict(self), "shape": list(self.shape)}


@torch.no_grad()
def try_forward(model: nn.Module, ids: Tensor) -> ForwardTest:
    """Run ``model`` on the token ids ``ids`` (1, s) and look at everything it puts out."""
    start = time.perf_counter()
    inputs = {"input_ids": ids.to(next(model.parameters()).device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with _watched(model) as watch:
        logits = model(**inputs, use_cache=False).logits
    finite = logits[logits.isfinite()].float()
    low, high, mean = (
        (math.nan,) * 3
        if not finite.numel()
        else (finite.min().item(), finite.max().item(), finite.mean().item())
    )
    return ForwardTest(
        tokens=ids.numel(),
        shape=tuple(logits.shape),
        nan=int(logits.isnan().sum()),
        inf=int(logits.isinf().sum()),
        min=low,
        max=high,
        mean=mean,
        constant=low == high,
        broken_at=watch.broken_at,
        layers=watch.layers,
        seconds=time.perf_counter() - start,
        dtype=str(logits.dtype).removeprefix("torch."),
    )


@contextmanager
def finite_logits(model: nn.Module) -> Iterator[None]:
    """NumericalError as soon as ``model``, called in the block, puts out logits to take no token
    by: NaN, or infinite for the likeliest token that follows."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def check(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not math.isfinite(output.logits[:, -1].amax().item()):  # the largest: some are masked
            raise unsound(inner, Message("the output of the model"))

    handle = inner.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Watch:
    broken_at: str | None = None
    layers: dict[str, float] = field(default_factory=dict)


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Watch]:
    """Hooks on every module; the innermost one that breaks is heard first."""
    watch = _Watch()
    layers = {name for name, _ in model.named_modules() if LAYER.fullmatch(f"{name}.weight")}
    layers = {LAYER.fullmatch(f"{name}.weight")[1] for name in layers}  # type: ignore[index]

    def listen(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
            tensors = [t for t in tensors if t.numel()]
            if watch.broken_at is None and not all(bool(t.isfinite().all()) for t in tensors):
                watch.broken_at = name
            if name in layers and tensors:
                watch.layers[name] = _magnitude(tensors[0])

        return hook

    handles = [
        module.register_forward_hook(listen(name)) for name, module in model.named_modules() if name
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _magnitude(values: Tensor) -> float:
    largest = values.abs().max().item()
    return largest if math.isfinite(largest) else math.nan
