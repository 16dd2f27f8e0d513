import math

import pytest
import torch

from fastprune.kernels import ops, reference
from fastprune.kernels.ops import ScanResult

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (3,), (111,), (576, 192), (3, 5, 7), (40_000,), (1536, 111), ()]
# Moments: fp32 sums of 64 values a lane, each addition good to 2^-24, then fp64: 64 * 2^-24 = 4e-6
# at the worst, relative to the root of the second moment and to the second moment.
TOLERANCE = 4e-6


def check(x):
    ours, true = ops.scan(x), ScanResult(*reference.scan([x])[0].tolist())
    assert ours[:4] == true[:4]
    assert ours.numel == true.numel == x.numel()
    size = max(math.sqrt(true.second_moment), 1e-300) if ours.nan + ours.inf < x.numel() else 1.0
    for name in ("min", "max", "absmax"):
        assert same(getattr(ours, name), getattr(true, name), 0)
    assert same(ours.mean, true.mean, TOLERANCE * size)
    assert same(ours.second_moment, true.second_moment, TOLERANCE * size * size)
    return ours


def same(a, b, tolerance):
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(device, shape, dtype):
    check(torch.randn(shape, device=device).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts(device, dtype):
    x = torch.randn(70_001, device=device).to(dtype)
    x[::100] = 0
    x[5] = -0.0
    x[7::5000] = float("nan")
    x[8::7000] = float("inf")
    x[9::7000] = float("-inf")
    x[70_000] = 60_000.0
    result = check(x)
    assert result.nan == 14
    assert result.inf == 20
    assert result.outliers == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, -3.7, 1e-30, 6e4])
def test_equal_values_have_no_outliers(device, dtype, value):
    assert check(torch.full((70_001,), value, device=device).to(dtype)).outliers == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_are_told_from_the_mean(device, dtype):
    x = 10 + torch.rand(50_000, device=device)
    x[3], x[40_000] = 30.0, -20.0
    assert check(x.to(dtype)).outliers == 2


@pytest.mark.parametrize("value", [1e30, 1e-30, 3e38])
def test_squares_beyond_float32(device, value):
    x = torch.full((40_000,), value, device=device)
    x[1::2] *= -1
    assert check(x).second_moment == pytest.approx(x[0].item() ** 2, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nothing_finite(device, value):
    result = check(torch.full((33,), value, device=device))
    assert math.isnan(result.mean)
    assert math.isnan(result.absmax)


@pytest.mark.parametrize("mean", [1.0, -3.7, 1000.0])
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_values_that_differ_little_have_no_outliers(device, mean, spread):
    """Deviations of a single ulp too: one of 70,001 values that is another is one outlier."""
    x = (mean * (1 + spread * torch.randn(70_001, dtype=torch.float64))).float().to(device)
    found = check(x)
    assert found.outliers == 0
    deviation = math.sqrt(found.second_moment - found.mean**2)
    # float64 has the difference of the moments to a few 1e-16 of the mean's square
    exact = float(x.double().std(correction=0))
    assert deviation == pytest.approx(exact, abs=4e-8 * abs(mean))
    x = torch.full((70_001,), mean, device=device)
    x[123] = torch.nextafter(x[123], x.new_tensor(math.inf))
    assert check(x).outliers == 1


def test_empty(device):
    result = ops.scan(torch.empty(0, 4, device=device))
    assert result[:4] == (0, 0, 0, 0)
    assert math.isnan(result.min)
    assert result.numel == 0


def test_views_and_parameters(device):
    base = torch.randn(100, 90, device=device)
    check(base[3:80, 5:70])
    check(base.t())
    check(base[:, 4])
    check(torch.nn.Parameter(base))
    check(torch._neg_view(base))
    check(base[:1].expand(100, 90))
    check(base.flatten()[:12].as_strided((2, 2, 3), (0, 9, 1)))  # as far apart as it has elements
    check(base.flatten()[:12].as_strided((2, 2, 3), (3, 4, 2)))


def test_many_tensors_at_once(device):
    tensors = [torch.randn(n, device=device).to(d) for n in (1, 40_000, 7) for d in DTYPES]
    tensors.append(tensors[1])
    assert ops.scan_all(tensors) == [ops.scan(t) for t in tensors]
    assert ops.scan_all([]) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_way(same_bits, dtype):
    x = torch.randn(300_007).to(dtype)
    x[12345] = float("inf")
    x[54321] = 100
    same_bits(lambda: [ops.scan_table([x, x[:99]])])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(3, dtype=torch.float64), "tensor 0 must be float32"),
        (torch.ones(3, dtype=torch.int64), "tensor 0 must be float32"),
        (torch.ones(3, device="meta"), "tensor 0 has no memory"),
        ("x", "tensor 0 must be a tensor, not str"),
    ],
)
def test_errors_name_the_culprit(x, message):
    with pytest.raises(ValueError, match=message):
        ops.scan(x)
