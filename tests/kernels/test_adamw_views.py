"""AdamW and views: lazily negated, expanded, or lying over each other in memory."""

import pytest
import torch

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
