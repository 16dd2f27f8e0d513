"""Causal attention of bf16 on a CPU, forward and with its gradients, against torch.

What counts here is arithmetic: in place of bytes, extra_info has the floating-point operations of
the products under the diagonal (4 n^2 / 2 a head's value forward, 14 n^2 / 2 with the gradients, in
which the scores are computed anew), so the table's GB/s are GFLOP/s. `limit` is one product of two
matrices by torch, of as many.
"""

import functools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastprune.kernels.attention import attention_serves

SHAPES = {  # batch, heads, kv heads, n, d
    "smollm2 2x1024": (2, 9, 3, 1024, 64),
    "smollm2 8x256": (8, 9, 3, 256, 64),
    "llama3-8b 1x2048": (1, 32, 8, 2048, 128),
}
WIDTH = 1024  # of the matrices that `limit` multiplies


def fastprune(q, k, v):
    return torch.ops.fastprune.attention(q, k, v, q.shape[-1] ** -0.5)[0]


def eager(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@functools.cache
def inputs(shape):
    batch, heads, kv_heads, n, d = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(batch, n, count, d, generator=generator).bfloat16().transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    return [t.requires_grad_() for t in tensors[:3]], tensors[3]


def operations(shape, passes):
    batch, heads, _, n, d = SHAPES[shape]
    return batch * heads * passes * 2 * n * n // 2 * d


@functools.cache
def matrices(work):
    generator = torch.Generator().manual_seed(0)
    rows = work // (2 * WIDTH**2)
    return [torch.randn(n, WIDTH, generator=generator).bfloat16() for n in (rows, WIDTH)]


def limit(work):
    a, b = matrices(work)
    return a @ b


@pytest.mark.skipif(
    not attention_serves(torch.device("cpu")), reason="no bf16 products on this processor"
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("provider", [fastprune, eager, limit], ids=lambda p: p.__name__)
def test_attention(measure, provider, gradients, shape):
    leaves, grad = inputs(shape)
    work = operations(shape, 7 if gradients else 2)

    def run():
        if provider is limit:
            return limit(work)
        with torch.set_grad_enabled(gradients):
            out = provider(*leaves)
            return torch.autograd.grad(out, leaves, grad) if gradients else out

    measure(run, f"attention {'with gradients' if gradients else 'forward'} {shape}", work)
