"""A whole optimizer step with clipping, against clip_grad_norm_ and torch.optim.AdamW(fused=True).

The bytes are those that must move: gradients twice, weights, moments (and masters) read and
written. In half precision the peer is the usual recipe: fp32 master weights, gradients copied to
fp32, clip, step, weights copied back.
"""

import pytest
import torch
from shapes import copy, matrices

from fastprune.kernels import AdamW

CLIP = 1.0
OPTIONS = {"lr": 1e-4, "weight_decay": 0.01}


def parameters(shape, dtype):
    params = [torch.nn.Parameter(0.02 * w) for w in matrices(shape, dtype)]
    for p, g in zip(params, matrices(shape, dtype, seed=1)):
        p.grad = g
    return params


def fastprune(params, master):
    optimizer = AdamW(params, max_grad_norm=CLIP, master=master, **OPTIONS)
    return optimizer.step


def torch_fused(params, _):
    optimizer = torch.optim.AdamW(params, fused=True, **OPTIONS)

    def step():
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()

    return step


@torch.no_grad()
def torch_masters(params, _):
    masters = [torch.nn.Parameter(p.detach().float()) for p in params]
    optimizer = torch.optim.AdamW(masters, fused=True, **OPTIONS)

    @torch.no_grad()
    def step():
        for p, w in zip(params, masters):
            w.grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        for p, w in zip(params, masters):
            p.copy_(w)

    return step


def limit(params, _):
    """A copy that moves as many bytes as the fp32 step."""
    source = [torch.empty(4 * p.numel()) for p in params]
    into = [torch.empty_like(s) for s in source]
    return lambda: copy(source, into)


@pytest.mark.parametrize("shape", ["64M", "smollm2"])
@pytest.mark.parametrize("provider", [fastprune, torch_fused, limit], ids=lambda p: p.__name__)
def test_float32(measure, provider, shape):
    params = parameters(shape, "fp32")
    moved = sum(p.numel() for p in params) * 32  # g twice; w, m, v read and written
    beside = None if provider is fastprune else fastprune(parameters(shape, "fp32"), "none")
    measure(provider(params, "none"), f"adamw {shape} fp32", moved, beside)


@pytest.mark.parametrize("shape", ["64M", "smollm2"])
@pytest.mark.parametrize("master", ["fp32", "stochastic"])
@pytest.mark.parametrize("provider", [fastprune, torch_masters], ids=lambda p: p.__name__)
def test_bfloat16(measure, provider, master, shape):
    params = parameters(shape, "bf16")
    # g twice; m, v read and written; w written and a master read and written, or w both
    per_weight = 4 + 16 + (2 + 8 if master == "fp32" else 4)
    moved = sum(p.numel() for p in params) * per_weight
    beside = None if provider is fastprune else fastprune(parameters(shape, "bf16"), master)
    measure(provider(params, master), f"adamw {shape} bf16 master {master}", moved, beside)


@pytest.mark.parametrize("provider", [fastprune, torch_fused], ids=lambda p: p.__name__)
def test_overhead(measure, provider):
    """300 tiny tensors: what a step costs beside its arithmetic."""
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(300)]
    for p in params:
        p.grad = torch.randn(4)
    beside = None if provider is fastprune else fastprune(params, "none")
    measure(provider(params, "none"), "adamw 300 tensors of 4", 32 * 1200, beside)
