"""The loss of rows of logits, alone and with its gradient in their place, against torch.

Bytes that must move: the logits once; with the gradient, its result as well. Every provider but
`limit` computes the losses of all rows. fastprune's gradient takes the place of the logits, so its
later rounds work on other values; no provider's time depends on them.
"""

import functools

import pytest
import torch
from shapes import DTYPES, copy, read
from torch.nn.functional import cross_entropy

from fastprune.kernels import ops


def fastprune(logits, targets):
    return ops.cross_entropy(logits, targets)[0]


def eager(logits, targets):
    return cross_entropy(logits.float(), targets, reduction="none")


@functools.cache  # compiled at the first call: importing the compiler is slow, and warns
def _compile(function):
    return torch.compile(function, dynamic=False)


def compiled(logits, targets):
    return _compile(eager)(logits, targets)


def limit(logits, targets):
    read([logits])


def fastprune_gradient(logits, targets):
    return ops.cross_entropy(logits, targets, scale=1 / len(targets))[0]


def autograd_gradient(logits, targets):
    """F.cross_entropy and its backward."""
    x = logits.detach().requires_grad_()
    losses = cross_entropy(x.float(), targets, reduction="none")
    return losses, *torch.autograd.grad(losses.sum() / len(targets), x)


def eager_gradient(logits, targets):
    """The same by hand, which torch.compile can fuse."""
    x = logits.float()
    normaliser = x.logsumexp(-1, keepdim=True)
    losses = normaliser - x.gather(1, targets[:, None])
    onehot = torch.arange(x.shape[1]) == targets[:, None]
    gradient = ((x - normaliser).exp() - onehot.float()) / len(targets)
    return losses, gradient.to(logits.dtype)


def compiled_gradient(logits, targets):
    return _compile(eager_gradient)(logits, targets)


def limit_gradient(logits, targets):
    copy([logits], [result_like(logits.shape, logits.dtype)])


@functools.cache
def result_like(shape, dtype):
    return torch.empty(shape, dtype=dtype)


def inputs(shape, dtype):
    rows, vocabulary = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator).mul_(3).to(DTYPES[dtype])
    return logits, torch.randint(0, vocabulary, (rows,), generator=generator)


@pytest.mark.filterwarnings("default")  # torch.compile's own imports warn
@pytest.mark.parametrize("shape", ["128x49152", "512x128256"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("provider", [fastprune, eager, compiled, limit], ids=lambda p: p.__name__)
def test_loss(measure, provider, dtype, shape):
    logits, targets = inputs(shape, dtype)
    group = f"cross_entropy loss {shape} {dtype}"
    measure(lambda: provider(logits, targets), group, logits.nbytes)


@pytest.mark.filterwarnings("default")  # torch.compile's own imports warn
@pytest.mark.parametrize("shape", ["128x49152", "512x128256"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "provider",
    [fastprune_gradient, autograd_gradient, eager_gradient, compiled_gradient, limit_gradient],
    ids=lambda p: p.__name__.removesuffix("_gradient"),
)
def test_gradient(measure, provider, dtype, shape):
    logits, targets = inputs(shape, dtype)
    group = f"cross_entropy gradient {shape} {dtype}"
    measure(lambda: provider(logits, targets), group, 2 * logits.nbytes)
