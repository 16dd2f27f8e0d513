"""Row and column sums of |w g|, against torch expressions and a plain read of w and g."""

from functools import cache

import pytest
import torch
from shapes import matrices, read, size

from fastprune.kernels import taylor


def fastprune(w, g):
    return [taylor(a, b, kind="first") for a, b in zip(w, g)]


def eager(w, g):
    """Products in the weights' dtype, sums in fp32."""
    terms = [(a * b).abs().float() for a, b in zip(w, g)]
    return [(t.sum(1), t.sum(0)) for t in terms]


def eager_fp32(w, g):
    """Products in fp32 too, which is what taylor computes."""
    terms = [(a.float() * b.float()).abs() for a, b in zip(w, g)]
    return [(t.sum(1), t.sum(0)) for t in terms]


def compiled(w, g):
    return [_compile()(a, b) for a, b in zip(w, g)]


@cache  # compiled at the first call: importing the compiler is slow, and warns
def _compile():
    def terms_summed(a, b):
        terms = (a.float() * b.float()).abs()
        return terms.sum(1), terms.sum(0)

    return torch.compile(terms_summed, dynamic=False)


def limit(w, g):
    read([*w, *g])


@pytest.mark.filterwarnings("default")  # torch.compile's own imports warn
@pytest.mark.parametrize("shape", ["4096x14336", "smollm2", "64M"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "provider", [fastprune, eager, eager_fp32, compiled, limit], ids=lambda p: p.__name__
)
def test_taylor(measure, provider, dtype, shape):
    w, g = matrices(shape, dtype), matrices(shape, dtype, seed=1)
    beside = None if provider is fastprune else lambda: fastprune(w, g)
    measure(lambda: provider(w, g), f"taylor {shape} {dtype}", size(w) + size(g), beside)
