"""AdamW whose whole step is two passes: fp32 moments always, clipping and loss scaling inside,
steps with non-finite gradients skipped on the device without waiting for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastprune.kernels.checks import check_apart, check_written
from fastprune.kernels.declarations import AdamWBuffers, AdamWRule
from fastprune.kernels.ops import MASTERS, adamw_states, adamw_step, adamw_workspace
from fastprune.sharding import add_up, as_shard, local, shard_of

_NO_STATE: dict[str, Tensor | None] = {"exp_avg": None, "exp_avg_sq": None}
_DYNAMIC_SCALE, _GROWTH, _BACKOFF, _INTERVAL = 2.0**16, 2.0, 0.5, 2000


class _Part:
    """The parameters that share a device, and are spread over the same processes if over several,
    with the buffers that belong to them all."""

    def __init__(self, device: torch.device, loss_scale: float) -> None:
        self.device = device
        self.params: list[Tensor] = []
        self.group_of: list[int] = []
        self.names: list[str] = []
        self.loss_scale = loss_scale
        self.with_grad: list[bool] = []
        self.states: list[dict[str, Tensor | None]] = []
        self.sharded = False
        self.views = adamw_states(device)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.views = adamw_states(self.device)

    def freeze(self) -> None:
        """All parameters are known: make room for them."""
        n = len(self.params)
        named = zip(self.names, self.params, strict=True)
        check_apart("AdamW", {name: local(p) for name, p in named}, {})
        f64 = {"dtype": torch.float64, "device": self.device}
        self.buffers = AdamWBuffers(
            steps=torch.zeros(n, dtype=torch.int64, device=self.device),
            stats=torch.zeros(n, 2, **f64),
            total=torch.zeros(2, **f64),
            control=torch.tensor([self.loss_scale, 0, 0], **f64),
            workspace=adamw_workspace([local(p).detach() for p in self.params]),
        )
        self.states = [_NO_STATE] * n
        self.with_grad = [False] * n
        self.sharded = local(self.params[0]) is not self.params[0]


class AdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay, as torch.optim.AdamW) that is sound in half precision.

    Moments and arithmetic are float32 whatever the weights are, so `eps` and small squared
    gradients survive. A step whose gradients are not all finite changes nothing but the counter
    `skipped_steps`; `culprits()` names the tensors. The step never waits for the device.

    Parameters that are DTensors (FSDP2) are updated shard by shard; norm and count of non-finite
    gradients are those of all shards, by one all-reduce, so that all processes clip and skip alike.

    Args:
        params: parameters, (name, parameter) pairs, or groups of either.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; may differ between groups.
        max_grad_norm: clip the norm of all gradients together, as clip_grad_norm_ does; 0 does not.
        master: how weights in bfloat16 or float16 keep small updates. "fp32": a float32 copy;
            "stochastic": rounding up with the probability of the distance (no extra memory);
            "none": rounding to nearest, which loses updates below half an ulp.
        loss_scale: for float16. A number, or "dynamic": starts at 65536, doubles after 2000 sound
            steps in a row, halves after a skipped one. Backpropagate `optimizer.scale(loss)`.
        seed: of the stochastic rounding; the draws depend on seed, step and position only.
        reduce_total: called between the passes with a float64 tensor [sum of squares, non-finite
            count] of the gradients here, instead of the all-reduce of DTensors. Where gradients are
            sharded by other means, sum it over the shards:
            `lambda total: dist.all_reduce(total, group=shard_group)`.

    Raises:
        ValueError: an option is out of range, or a parameter is not float32, bfloat16 or float16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float = 0.0,
        master: str = "fp32",
        *,
        loss_scale: float | str | None = None,
        seed: int = 0,
        reduce_total: Callable[[Tensor], object] | None = None,
    ) -> None:
        if master not in MASTERS:
            raise ValueError(f"AdamW: master is {master!r}, expected one of {', '.join(MASTERS)}")
        if not max_grad_norm >= 0:
            raise ValueError(f"AdamW: max_grad_norm must not be negative, got {max_grad_norm}")
        if isinstance(loss_scale, str) and loss_scale != "dynamic":
            raise ValueError(f"AdamW: loss_scale is {loss_scale!r}, expected a number or 'dynamic'")
        self.max_grad_norm = float(max_grad_norm)
        self.master = master
        self.seed = seed
        self.reduce_total = reduce_total
        self._dynamic = loss_scale == "dynamic"
        self._loss_scale = _DYNAMIC_SCALE if self._dynamic else float(loss_scale or 1.0)
        if not (self._loss_scale > 0 and math.isfinite(self._loss_scale)):
            raise ValueError(f"AdamW: loss_scale must be positive, got {loss_scale}")
        self._parts: list[_Part] | None = None
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    # ------------------------------------------------------------------------ step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Unscales, clips and updates, or skips; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [_hyperparameters(group) for group in self.param_groups]
        parts = self._arranged()
        steps = [self._begin(part, groups) for part in parts]
        for step in steps:
            step.norms()
        self._combine_totals(parts)
        for step in steps:
            step.update()
        for part in parts:
            torch.autograd.graph.increment_version(part.params)
        return loss

    def _begin(self, part: _Part, groups: list[list[float]]) -> Any:
        grads = [p.grad for p in part.params]
        with_grad = [g is not None for g in grads]
        if with_grad != part.with_grad:
            self._add_states(part, with_grad)
        params = part.params
        if part.sharded:
            params = [local(p) for p in params]
            grads = [None if g is None else local(g) for g in grads]
        step = self._kernel_step(part, params, grads, groups)
        misfits = step.misfits()
        negated = [i for i, g in enumerate(grads) if g is not None and g.is_neg()]
        if misfits or negated:
            for i in {*misfits, *negated}:
                grads[i] = torch.empty_like(params[i], dtype=grads[i].dtype).copy_(grads[i])
            step = self._kernel_step(part, params, grads, groups)
        return step

    def _kernel_step(
        self,
        part: _Part,
        params: list[Tensor],
        grads: list[Tensor | None],
        groups: list[list[float]],
    ) -> Any:
        part.views.sync(part.states)
        interval = _INTERVAL if self._dynamic else 0
        rule = AdamWRule(self.max_grad_norm, self.master, self.seed, _GROWTH, _BACKOFF, interval)
        return adamw_step(params, grads, part.views, part.group_of, groups, part.buffers, rule)

    def _combine_totals(self, parts: list[_Part]) -> None:
        if self.reduce_total is None:
            for part in parts:
                add_up(part.buffers.total, part.params[0])
        if len(parts) > 1:
            total = parts[0].buffers.total.clone()
            for part in parts[1:]:
                total += part.buffers.total.to(total.device)
        elif self.reduce_total is not None:
            total = parts[0].buffers.total
        else:
            return
        if self.reduce_total is not None:
            self.reduce_total(total)
        for part in parts:
            part.buffers.total.copy_(total)

    # ------------------------------------------------------------------------ what happened

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale, to be backpropagated."""
        return loss * self._arranged()[0].buffers.control[0].to(loss.device, loss.dtype)

    @property
    def loss_scale(self) -> Tensor:
        """The loss scale, a float64 scalar on the first parameter's device."""
        return self._arranged()[0].buffers.control[0]

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped for non-finite gradients, a float64 scalar on the first parameter's
        device. int() of it waits for the device."""
        return self._arranged()[0].buffers.control[2]

    @property
    def grad_norm(self) -> Tensor:
        """Norm of all gradients of the last step, unscaled and before clipping (finite values)."""
        return self._arranged()[0].buffers.total[0].sqrt()

    def culprits(self) -> dict[str, int]:
        """Names of the tensors whose last gradients were not finite, with how many values.

        A tensor whose squares alone exceed float32 is named with 0. Waits for the device; with
        DTensors all processes must call it.
        """
        largest = torch.finfo(torch.float32).max
        found = {}
        for part in self._arranged():
            stats = part.buffers.stats.clone()
            add_up(stats, part.params[0])
            for name, (squares, count) in zip(part.names, stats.tolist()):
                if count > 0 or squares > largest:
                    found[name] = int(count)
        return found

    # ------------------------------------------------------------------------ state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the states of the groups there were stay."""
        super().add_param_group(param_group)
        try:
            _check_group(len(self.param_groups) - 1, self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        if self._parts is not None:
            self.load_state_dict(super().state_dict() | {"fastprune": self._extra()})

    def state_dict(self) -> dict[str, Any]:
        """torch's format, with the loss scale and the counter of skipped steps in "fastprune".

        Moments and master weights of a DTensor are DTensors spread alike.
        """
        packed = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        packed["state"] = {
            i: {key: as_shard(value, params[i]) for key, value in state.items()}
            for i, state in packed["state"].items()
        }
        return packed | {"fastprune": self._extra()}

    def _extra(self) -> dict[str, Any]:
        return {"control": self._arranged()[0].buffers.control.clone(), "seed": self.seed}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues bit for bit. Moments and master weights stay float32 whatever the weights are.

        States of torch.optim.AdamW are accepted too; missing master weights are the weights. For a
        DTensor the state may be whole, a DTensor, or this process's part.
        """
        super().load_state_dict({**state_dict, "state": {}})
        extra = state_dict.get("fastprune", {})
        self.seed = extra.get("seed", self.seed)
        self._parts = None
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        saved = {p: state_dict["state"][i] for i, p in zip(ids, params) if i in state_dict["state"]}
        for part in self._arranged():
            if "control" in extra:
                part.buffers.control.copy_(extra["control"])
            self._add_states(part, [p in saved for p in part.params])
            part.with_grad = [False] * len(part.params)  # decided by the next step
            for p in part.params:
                for key, value in saved.get(p, {}).items():
                    if key in self.state[p]:
                        self.state[p][key].copy_(shard_of(torch.as_tensor(value), p))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__  # torch's own would leave our options out of copies

    def _arranged(self) -> list[_Part]:
        """The parameters by device and sharding; made at the first use, with all groups known."""
        if self._parts is None:
            parts: dict[Any, _Part] = {}
            for number, group in enumerate(self.param_groups):
                names = group.get("param_names")
                for position, p in enumerate(group["params"]):
                    mesh = getattr(p, "device_mesh", None)
                    key = (p.device, mesh, getattr(p, "placements", None))
                    part = parts.get(key)
                    if part is None:
                        part = parts[key] = _Part(p.device, self._loss_scale)
                    part.params.append(p)
                    part.group_of.append(number)
                    part.names.append(
                        names[position] if names else f"group {number}, parameter {position}"
                    )
            self._parts = list(parts.values())
            for part in self._parts:
                part.freeze()
        return self._parts

    def _add_states(self, part: _Part, wanted: list[bool]) -> None:
        """Moments (and master weights) for parameters that have a gradient for the first time."""
        for slot, (p, needed) in enumerate(zip(part.params, wanted)):
            if needed and part.states[slot] is _NO_STATE:
                own = local(p).detach()
                state = {
                    "step": part.buffers.steps[slot],
                    "exp_avg": torch.zeros_like(own, dtype=torch.float32),
                    "exp_avg_sq": torch.zeros_like(own, dtype=torch.float32),
                }
                if self.master == "fp32" and p.dtype != torch.float32:
                    state["master"] = own.to(torch.float32, copy=True)
                self.state[p] = part.states[slot] = state
        part.with_grad = wanted


def _hyperparameters(group: dict[str, Any]) -> list[float]:
    beta1, beta2 = group["betas"]
    return [float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"]]


def _check_group(number: int, group: dict[str, Any]) -> None:
    lr, beta1, beta2, eps, decay = _hyperparameters(group)
    for name, value, sound in (
        ("lr", lr, lr >= 0),
        ("betas[0]", beta1, 0 <= beta1 < 1),
        ("betas[1]", beta2, 0 <= beta2 < 1),
        ("eps", eps, eps >= 0),
        ("weight_decay", decay, decay >= 0),
    ):
        if not sound:
            raise ValueError(f"AdamW: {name} of group {number} is out of range: {value}")
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"AdamW: a parameter of group {number} is {p.dtype}, "
                "expected float32, bfloat16 or float16"
            )
        check_written("AdamW", f"a parameter of group {number}", local(p))
