"""Every op in plain torch: what it means, the oracle of the tests, and the fallback.

The fallback runs where the compiled module is missing or has no backend for the device. The
`compute` argument lets a test ask for the same sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastprune.kernels.declarations import AdamWBuffers, AdamWRule

IGNORED = -100
"""Target of a row that is not scored, as in torch."""
KINDS = ("first", "second", "mix", "vector", "l1", "l2", "activation")
SCAN_FIELDS = 10
SIGMAS = 6.0
_WORD = 0xFFFFFFFF


def taylor(
    w: Tensor,
    g: Tensor | None = None,
    h: Tensor | None = None,
    *,
    x: Tensor | None = None,
    kind: str,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Sums of the per-weight scores of w (out, in): over columns (out,) and over rows (in,).

    The terms are those of LLM-Pruner (arXiv 2305.11627).
    """
    w = _matrix(w, compute)
    g = None if g is None else _matrix(g, compute)
    if h is not None:
        h = _matrix(h, compute)
    elif g is not None:
        h = g * g
    if kind == "first":
        terms = (w * g).abs()
    elif kind == "second":
        terms = (w * w * h).abs()
    elif kind == "mix":
        terms = (w * g - 0.5 * (w * w * h)).abs()
    elif kind == "vector":
        terms = w * g
    elif kind == "l1":
        terms = w.abs()
    elif kind == "l2":
        terms = w * w
    else:
        assert x is not None  # ops.taylor has checked it
        terms = w.abs() * x.to(compute)
    return terms.sum(1), terms.sum(0)


def gather(
    tensors: Sequence[Tensor], indices: Sequence[Tensor], dims: Sequence[int]
) -> list[Tensor]:
    """Selected rows (dim 0) or columns (dim 1) of each tensor."""
    return [
        t.detach().index_select(dim, index.to(t.device))
        for t, index, dim in zip(tensors, indices, dims)
    ]


def scan(tensors: Sequence[Tensor]) -> Tensor:
    """Health of each tensor: (tensors, SCAN_FIELDS) float64, in the order of ops.ScanResult."""
    return torch.stack([_health(t) for t in tensors])


def _health(x: Tensor) -> Tensor:
    x = x.detach().to(torch.float64).flatten()
    finite = x[x.isfinite()]
    counts = [x.isnan().sum(), x.isinf().sum(), (x == 0).sum()]
    if finite.numel() == 0:
        nan = x.new_full((), math.nan)
        moments, outliers = [nan] * 5, x.new_zeros(())
    else:
        mean, second = finite.mean(), (finite * finite).mean()
        sigma = (finite - mean).square().mean().sqrt()
        outliers = ((finite - mean).abs() > SIGMAS * sigma).sum()
        outliers = outliers * (finite.min() < finite.max())  # among equal values there are none
        moments = [finite.min(), finite.max(), finite.abs().max(), mean, second]
    numel = x.new_full((), x.numel())
    return torch.stack([v.to(torch.float64) for v in (*counts, outliers, *moments, numel)])


class AdamWStates:
    """The moments and master weights of all parameters, one dict each."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []

    def sync(self, states: list[dict[str, Any]]) -> None:
        self.states = states


class AdamWStep:
    """One optimizer step in two passes; see fastprune.kernels.ops.adamw_step for the arguments.

    norms() sums the squares and counts the non-finite values of the gradients; update() changes
    weights, moments and counters, or only the counter of skipped steps. Neither waits for a device.
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        states: AdamWStates,
        group_of: list[int],
        groups: list[list[float]],
        buffers: AdamWBuffers,
        rule: AdamWRule,
    ) -> None:
        self.items = [
            (slot, p, g, s["exp_avg"], s["exp_avg_sq"], s.get("master"), groups[group])
            for slot, (p, g, s, group) in enumerate(zip(params, grads, states.states, group_of))
            if g is not None
        ]
        self.buffers, self.rule = buffers, rule

    def misfits(self) -> list[int]:
        """Parameters whose gradient is laid out differently; here that does not matter."""
        return []

    @torch.no_grad()
    def norms(self) -> None:
        self.buffers.stats.zero_()
        unscale = self._factor(clip=False)
        for slot, _, g, *_ in self.items:
            g = g.float() * unscale
            finite = g.isfinite()
            self.buffers.stats[slot, 0] = g.where(finite, 0).double().square().sum()
            self.buffers.stats[slot, 1] = (~finite).sum()
        self.buffers.total.copy_(self.buffers.stats.sum(0))

    @torch.no_grad()
    def update(self) -> None:
        largest = torch.finfo(torch.float32).max
        sound = (self.buffers.total[1] == 0) & (self.buffers.total[0] <= largest)
        factor = self._factor(clip=True)
        for slot, p, g, m, v, w32, (lr, beta1, beta2, eps, decay) in self.items:
            step = self.buffers.steps[slot] + 1
            correction1 = (lr / (1 - beta1 ** step.double())).float()
            correction2 = (1 / (1 - beta2 ** step.double()).sqrt()).float()
            g = g.float() * factor
            w = p.float() if w32 is None else w32
            m_new = m + (1 - beta1) * (g - m)
            v_new = beta2 * v + (1 - beta2) * (g * g)
            denominator = v_new.sqrt() * correction2 + eps
            w_new = w * (1 - lr * decay) - correction1 * (m_new / denominator)
            if self.rule.master == "stochastic" and p.dtype != torch.float32:
                p_new = stochastic_round(w_new, p.dtype, self.rule.seed, step, slot)
            else:
                p_new = w_new.to(p.dtype)
            changes = [(p, p_new), (m, m_new), (v, v_new)]
            if w32 is not None:
                changes.append((w32, w_new))
            for old, new in changes:
                old.copy_(torch.where(sound, new, old))
            self.buffers.steps[slot] += sound
        self._adapt_loss_scale(sound)

    def _factor(self, clip: bool) -> Tensor:
        factor = self.buffers.total.new_ones(())
        if clip and self.rule.max_norm > 0:
            factor = (self.rule.max_norm / (self.buffers.total[0].sqrt() + 1e-6)).clamp(max=1.0)
        return (factor / self.buffers.control[0]).float()

    def _adapt_loss_scale(self, sound: Tensor) -> None:
        scale, good, skipped = self.buffers.control.clone().unbind()
        self.buffers.control[2] = skipped + ~sound
        if self.rule.interval == 0:
            return
        good = torch.where(sound, good + 1, 0.0)
        grows = sound & (good >= self.rule.interval)
        factor = torch.where(sound, torch.where(grows, self.rule.growth, 1.0), self.rule.backoff)
        self.buffers.control[0] = scale * factor
        self.buffers.control[1] = torch.where(grows, 0.0, good)


def _mix_bits(x: Tensor | int) -> Tensor | int:
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _WORD
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _WORD
    return x ^ (x >> 16)


def random_bits(seed: int, step: Tensor, slot: int, numel: int) -> Tensor:
    """32 random bits per element as int64: a function of (seed, step, slot, index) only."""
    key = _mix_bits((seed & _WORD) + 0x9E3779B9 & _WORD)
    key = _mix_bits(key ^ (seed >> 32 & _WORD))
    index = torch.arange(numel, device=step.device)
    step_key = _mix_bits(_mix_bits(step ^ key) ^ slot)
    keys = _mix_bits(step_key ^ (index >> 32))
    return _mix_bits((index & _WORD) ^ keys)


def stochastic_round(x: Tensor, dtype: torch.dtype, seed: int, step: Tensor, slot: int) -> Tensor:
    """Rounds float32 to a half-precision neighbour, up with the probability of the distance."""
    random = random_bits(seed, step, slot, x.numel())
    # Elements are numbered in memory order, which for a dense tensor is that of its strides.
    flat = x.as_strided((x.numel(),), (1,))
    bits = flat.view(torch.int32).long() & _WORD
    if dtype == torch.bfloat16:
        rounded = _float_of(bits + (random >> 16) & 0xFFFF0000)
    else:
        noise = random >> 19
        normal = _float_of(bits + noise & 0xFFFFE000)
        grid = flat.abs() * 2.0**24 + noise.float() * 2.0**-13
        subnormal = (grid.trunc() * 2.0**-24).copysign(flat)
        rounded = torch.where(flat.abs() < 2.0**-14, subnormal, normal)
    rounded = torch.where(flat.isnan(), flat, rounded).to(dtype)
    return rounded.as_strided(x.shape, x.stride())


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    scale: float | None = None,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Losses (rows,) and log-normalisers (rows,) of logits (rows, vocabulary), in `compute`.

    With a scale, the logits become scale * (softmax(logits) - onehot(targets)).
    """
    x = logits.detach().to(compute)
    scored = targets != IGNORED
    column = targets.where(scored, 0)[:, None]
    shift = x.amax(1, keepdim=True)
    shift = torch.where(shift == -math.inf, 0, shift)
    log_sum = (x - shift).exp().sum(1).log()
    shift = shift[:, 0]
    loss = torch.where(scored, (shift - x.gather(1, column)[:, 0]) + log_sum, 0)
    if scale is not None:
        gradient = (x - shift[:, None] - log_sum[:, None]).exp()
        gradient.scatter_add_(1, column, gradient.new_full(column.shape, -1))
        logits.detach().copy_(torch.where(scored[:, None], scale * gradient, 0))
    return loss, shift + log_sum


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, compute: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Causal attention out (batch, heads, n, d) and log_sums (batch, heads, n), in `compute`."""
    scores = _scores(q, k, scale, compute)
    log_sums = scores.logsumexp(-1)
    weights = (scores - log_sums[..., None]).exp()
    return (weights @ _per_head(v, q, compute)).to(q.dtype), log_sums.float()


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    *,
    scale: float,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; heads of q that share one of k and v add up there."""
    grad = grad_out.detach().to(compute)
    weights = (_scores(q, k, scale, compute) - log_sums[..., None].to(compute)).exp()
    mean = (grad * out.detach().to(compute)).sum(-1, keepdim=True)
    grad_scores = weights * (grad @ _per_head(v, q, compute).mT - mean) * scale
    grad_k = (grad_scores.mT @ q.detach().to(compute)).unflatten(1, (k.shape[1], -1)).sum(2)
    grad_v = (weights.mT @ grad).unflatten(1, (k.shape[1], -1)).sum(2)
    grad_q = grad_scores @ _per_head(k, q, compute)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _scores(q: Tensor, k: Tensor, scale: float, compute: torch.dtype) -> Tensor:
    """(batch, heads, n, n), -inf where a position would look ahead."""
    n = q.shape[2]
    later = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    scores = q.detach().to(compute) @ _per_head(k, q, compute).mT * scale
    return scores.masked_fill(later, -math.inf)


def _per_head(shared: Tensor, q: Tensor, compute: torch.dtype) -> Tensor:
    """k or v (batch, kv heads, n, d), repeated for each head of q."""
    repeats = q.shape[1] // shared.shape[1]
    return shared.detach().to(compute).repeat_interleave(repeats, 1)


def _float_of(bits: Tensor) -> Tensor:
    return torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits).int().view(torch.float32)


def _matrix(t: Tensor, compute: torch.dtype) -> Tensor:
    t = t.detach().to(compute)
    return t if t.ndim == 2 else t.unsqueeze(1)
