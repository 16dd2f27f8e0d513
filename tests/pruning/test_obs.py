"""OBS costs against the least-squares error that each removal really adds."""

from __future__ import annotations

import pytest
import torch
from calibrated import by_kind, calibrated
from tiny import FAMILIES, tiny_model, token_ids

from fastprune.pruning.importance import score
from fastprune.pruning.obs import DAMPING, elimination_costs


def refit_error(w: torch.Tensor, h: torch.Tensor, kept: torch.Tensor) -> float:
    """min over V of tr((W - V) H (W - V)ᵀ) for V that uses the columns ``kept`` only."""
    cross = w @ h[:, kept]
    best = torch.linalg.solve(h[kept][:, kept], cross.T).T if len(kept) else cross
    return ((w @ h * w).sum() - (best * cross).sum()).item()


@pytest.mark.parametrize("width", [1, 3])
def test_costs_are_what_each_removal_adds(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(12, 12, generator=generator, dtype=torch.float64)  # correlated
    w = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    costs = elimination_costs(w, x.T @ x, width, steps=12)
    h = x.T @ x
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    kept, error = list(range(12 // width)), 0.0
    for unit in costs.argsort().tolist():
        kept.remove(unit)
        columns = torch.tensor([u * width + i for u in kept for i in range(width)], dtype=torch.int)
        added = refit_error(w, h, columns.long()) - error
        error += added
        # Costs are raised to the highest before them, where removals make the next one cheaper.
        assert costs[unit].item() >= added * (1 - 1e-8)  # fp64 solves of a 12 × 12 system
    cheapest = [
        refit_error(w, h, torch.tensor([c for c in range(12) if c // width != u]))
        for u in range(12 // width)
    ]
    assert costs.min().item() == pytest.approx(min(cheapest), rel=1e-8)  # as above


def test_units_as_wide_as_a_real_kv_group() -> None:
    """192 columns, as in SmolLM2: on two threads torch.linalg.solve may fail on such a batch."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1000, 576, generator=generator, dtype=torch.float64)
    w = torch.randn(8, 576, generator=generator, dtype=torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        costs = elimination_costs(w, x.T @ x, 192)
    finally:
        torch.set_num_threads(threads)
    h = x.T @ x
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    first = [refit_error(w, h, torch.arange(576)[torch.arange(576) // 192 != u]) for u in range(3)]
    assert costs.min().item() == pytest.approx(min(first), rel=1e-8)  # fp64 solves of order 400


def test_a_duplicated_channel_costs_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 8, generator=generator)
    x[:, 5] = x[:, 2]
    w = torch.randn(4, 8, generator=generator)
    costs = elimination_costs(w, x.T @ x, 1, steps=8)
    assert costs.argmin().item() in (2, 5)
    assert len(costs.unique()) == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_scored(family: str) -> None:
    model = tiny_model(family)
    scores = score(calibrated(model, token_ids(16, 32)), "obs")
    assert [len(s) for s in by_kind(scores, "attention")] == [4] * 4
    assert [len(s) for s in by_kind(scores, "mlp")] == [96] * 4
    assert scores.finite() and all(bool((s > 0).all()) for s in by_kind(scores, "mlp"))
