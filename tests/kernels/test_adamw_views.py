"""AdamW and views: lazily negated, expanded, or lying over each other in memory."""

import pytest
import torch

from fastprune.kernels import ops
from fastprune.kernels.optim import AdamW

LR = 1e-2


def test_parameters_are_no_views(module):
    block = torch.ones(12)
    views = {
        "lazily negated": torch._neg_view(block),
        "one block of memory": block[::2],
        r"strides \(0, 9, 1\)": block.as_strided((2, 2, 3), (0, 9, 1)),
    }
    for message, view in views.items():
        with pytest.raises(ValueError, match=f"parameter of group 0 .*{message}"):
            AdamW([torch.nn.Parameter(view)])
    both = [torch.nn.Parameter(view) for view in (block, block[6:])]
    for p in both:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="parameter 1 and group 0, parameter 0 share memory"):
        AdamW(both).step()


def test_parameters_may_not_become_views(module):
    for view in (torch.ones(10)[::2], torch.ones(12).as_strided((2, 2, 3), (0, 9, 1))):
        p = torch.nn.Parameter(torch.ones(view.shape))
        optimizer = AdamW([p])
        p.data = view
        p.grad = torch.ones(view.shape)
        with pytest.raises(ValueError, match="parameter 0 of shape"):
            optimizer.step()


def test_gradients_may_be_lazy_views(device):
    """A negated gradient, one expanded from a scalar, and one of another layout."""
    gradients = [torch._neg_view(torch.randn(6, 5, device=device))]
    gradients += [torch.ones((), device=device).expand(6, 5), torch.randn(5, 6, device=device).t()]
    for gradient in gradients:
        lazy, plain = (torch.nn.Parameter(torch.ones(6, 5, device=device)) for _ in range(2))
        lazy.grad, plain.grad = gradient, gradient.clone().resolve_neg().contiguous()
        for p in (lazy, plain):
            AdamW([p], lr=LR).step()
        assert torch.equal(lazy, plain)


def step(p, g, m, v, **changes):
    """One step of the op over `p`, in place."""
    f64 = {"dtype": torch.float64, "device": p.device}
    counters = {
        "steps": torch.zeros(1, dtype=torch.int64, device=p.device),
        "stats": torch.zeros(1, 2, **f64),
        "total": torch.zeros(2, **f64),
        "control": torch.tensor([1.0, 0, 0], **f64),
    }
    ops.adamw([p], [g], [m], [v], [], **(counters | changes), lr=LR)


def test_gradients_of_the_op_may_be_negated(device):
    gradient, results = torch.randn(6, 5, device=device), []
    for g in (-gradient, torch._neg_view(gradient)):
        p, m, v = (torch.full_like(gradient, fill) for fill in (1, 0, 0))
        step(p, g, m, v)
        results.append(p)
    assert torch.equal(*results)


def test_the_op_names_what_it_cannot_write(module):
    block, state = torch.ones(12), torch.zeros(24)
    g, m, v = torch.ones(12), state[:12], state[12:]
    wide = torch.zeros(1, dtype=torch.float64).expand(2)
    for arguments, changes, message in (
        ((torch._neg_view(block), g, m, v), {}, r"params\[0\] is a lazily negated view"),
        ((block[:1].expand(12), g, m, v), {}, r"params\[0\] must fill one block"),
        ((block, g, m, state[6:18]), {}, r"exp_avg_sqs\[0\] and exp_avgs\[0\] share memory"),
        ((block, block, m, v), {}, r"params\[0\] and grads\[0\] share memory"),
        ((block, g, m, v), {"total": wide}, "total must fill one block"),
    ):
        with pytest.raises(ValueError, match=message):
            step(*arguments, **changes)
    assert bool((block == 1).all())
