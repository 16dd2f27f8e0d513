"""Kept rows and columns, against index_select and a plain copy of as many bytes.

reused: into results that exist (out=), the copy's own speed. fresh: into new results, where page
faults cost more than the copy.
"""

import pytest
import torch
from shapes import copy, matrices, size

from fastprune.kernels import gather

KEPT = 0.75


def indices(tensors, what):
    """Rows and channels at random; heads in runs of 64."""
    generator = torch.Generator().manual_seed(0)
    dim = 0 if what == "rows" else 1
    unit = 64 if what == "heads" else 1
    kept = []
    for t in tensors:
        units = t.shape[dim] // unit
        chosen = torch.randperm(units, generator=generator)[: round(KEPT * units)].sort().values
        kept.append((chosen[:, None] * unit + torch.arange(unit)).flatten())
    return kept, [dim] * len(tensors)


def fastprune(tensors, index, dims, out):
    return gather(tensors, index, dims, out=out)


def index_select(tensors, index, dims, out):
    out = out or [None] * len(tensors)
    return [torch.index_select(t, d, i, out=o) for t, i, d, o in zip(tensors, index, dims, out)]


def limit(tensors, index, dims, out):
    """As many bytes as are kept, copied from one place to one place."""
    chosen = out or gather_shapes(tensors, index, dims)
    copy([t.view(-1)[: o.numel()] for t, o in zip(tensors, chosen)], [o.view(-1) for o in chosen])


def gather_shapes(tensors, index, dims):
    shapes = [
        [len(i) if k == d else n for k, n in enumerate(t.shape)]
        for t, i, d in zip(tensors, index, dims)
    ]
    return [torch.empty(s, dtype=t.dtype) for t, s in zip(tensors, shapes)]


@pytest.mark.parametrize("shape", ["4096x14336", "smollm2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["rows", "columns", "heads"])
@pytest.mark.parametrize("results", ["reused", "fresh"])
@pytest.mark.parametrize("provider", [fastprune, index_select, limit], ids=lambda p: p.__name__)
def test_gather(measure, provider, results, what, dtype, shape):
    tensors = matrices(shape, dtype)
    index, dims = indices(tensors, what)
    kept = gather_shapes(tensors, index, dims)
    out = kept if results == "reused" else None
    group = f"gather {what} {shape} {dtype} {results}"
    beside = None if provider is fastprune else lambda: fastprune(tensors, index, dims, out)
    measure(lambda: provider(tensors, index, dims, out), group, 2 * size(kept), beside)
