"""The health of a tensor, against the torch expressions for the same figures and a plain read."""

import pytest
from shapes import matrices, read, size

from fastprune.kernels import scan_all


def fastprune(tensors):
    return scan_all(tensors)


def eager(tensors):
    """The same ten figures, given that nothing is non-finite (else the tensor must be masked)."""
    results = []
    for t in tensors:
        x = t.float()
        mean, second = x.mean(), x.square().mean()
        sigma = (second - mean * mean).sqrt()
        figures = (
            x.isnan().sum(), x.isinf().sum(), (x == 0).sum(), x.min(), x.max(), x.abs().max(),
            mean, second, ((x - mean).abs() > 6 * sigma).sum(),
        )  # fmt: skip
        results.append([float(f) for f in figures])
    return results


def limit(tensors):
    read(tensors)


@pytest.mark.parametrize("shape", ["4096x14336", "smollm2", "64M"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("outlier", [False, True], ids=["", "second-sweep"])
@pytest.mark.parametrize("provider", [fastprune, eager, limit], ids=lambda p: p.__name__)
def test_scan(measure, provider, outlier, dtype, shape):
    tensors = matrices(shape, dtype)
    for t in tensors:
        t.clamp_(-5, 5)
        if outlier:
            t[3, 5] = 100
    group = f"scan {shape} {dtype}{' with outliers' if outlier else ''}"
    beside = None if provider is fastprune else lambda: fastprune(tensors)
    measure(lambda: provider(tensors), group, size(tensors), beside)
