import math

import pytest
import torch
from torch.nn import functional

from fastprune.kernels import ops, reference
from fastprune.kernels.reference import IGNORED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 2), (5, 111), (2, 1024), (4, 1025), (7, 3000), (2, 49_152), (0, 5)]
# Each exponential is good to 2 ulp and fp32 sums are of at most 126 of them: a few 1e-7 of the sum,
# which the logarithm makes an absolute error; then one rounding of the result.
LOSS = {"atol": 5e-7, "rtol": 1e-7}
# The same relative error per probability; the target's is a difference of values up to 1. Below the
# smallest normal number (fp32: 1.2e-38) exponentials are 0. Half precision: its own rounding, 2^-9
# and 2^-12 of the value, or half a unit of fp16's fixed grid below 2^-14.
GRADIENT = {
    torch.float32: {"atol": 3e-7, "rtol": 2e-6},
    torch.bfloat16: {"atol": 3e-7, "rtol": 4e-3},
    torch.float16: {"atol": 3e-7, "rtol": 5e-4},
}


def inputs(shape, dtype, device, spread=3.0):
    logits = (torch.randn(shape) * spread).to(dtype)
    targets = torch.randint(0, shape[1], shape[:1])
    return logits.to(device), targets.to(device)


def check(logits, targets, scale=0.25):
    """Against fp64, without and with the gradient in place."""
    before = logits.clone()
    gradient = before.double()
    expected = reference.cross_entropy(gradient, targets, scale=scale, compute=torch.float64)
    results = ops.cross_entropy(logits, targets)
    assert same(logits, before)
    in_place = ops.cross_entropy(logits, targets, scale=scale)
    for ours, again, true in zip(results, in_place, expected):
        assert ours.dtype == torch.float32
        assert same(ours, again)
        torch.testing.assert_close(ours.double(), true, equal_nan=True, **LOSS)
    tolerance = GRADIENT[logits.dtype]
    torch.testing.assert_close(logits.double(), gradient, equal_nan=True, **tolerance)
    return results


def same(a, b):
    return torch.equal(a.nan_to_num(nan=12345), b.nan_to_num(nan=12345))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_fp64(device, shape, dtype):
    check(*inputs(shape, dtype, device))


@pytest.mark.parametrize("shape", [(4, 7), (3, 2000)])
def test_is_what_torch_computes(device, shape):
    logits, targets = inputs(shape, torch.float32, device)
    targets[1] = IGNORED
    theirs = logits.clone().requires_grad_()
    losses = functional.cross_entropy(theirs, targets, reduction="none")
    (2 * losses.sum()).backward()
    ours, normaliser = ops.cross_entropy(logits, targets, scale=2.0)
    # two fp32 computations, each good to a few 1e-7
    torch.testing.assert_close(ours, losses.detach(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(normaliser, theirs.detach().logsumexp(1), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(logits, theirs.grad, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [-6e4, -100.0, 100.0, 6e4])
def test_only_differences_of_logits_count(device, base, dtype):
    logits, targets = inputs((4, 1500), torch.float32, device)
    logits = (logits + base).to(dtype)
    x = logits.double()
    expected = x.logsumexp(1) - x.gather(1, targets[:, None])[:, 0]
    loss, normaliser = ops.cross_entropy(logits, targets)
    torch.testing.assert_close(loss.double(), expected, **LOSS)
    torch.testing.assert_close(normaliser.double(), x.logsumexp(1), **LOSS)


def test_maximum_wherever_it_lies(device):
    for place in (0, 15, 16, 1023, 1024, 2999):
        logits, targets = inputs((2, 3000), torch.float32, device)
        logits[:, place] = 80.0
        check(logits, targets)
    ascending = torch.arange(3000.0, device=device)[None] / 10
    check(ascending, torch.tensor([5], device=device))
    check(ascending.flip(1), torch.tensor([5], device=device))


def test_range_of_float32(device):
    logits, targets = inputs((4, 500), torch.float32, device, spread=3e37)
    check(logits, targets)
    tiny, targets = inputs((4, 500), torch.float32, device, spread=1e-38)
    loss, _ = check(tiny, targets)
    assert loss[0].item() == pytest.approx(math.log(500), rel=1e-6)  # an fp32 logarithm


def test_exponentials_are_exact_to_two_units(device):
    # Two words: the gradient at the smaller one is e^x / (1 + e^x). Below -17 that is e^x itself.
    x = torch.linspace(-87.3, -17, 100_003, device=device)
    logits = torch.stack([x, torch.zeros_like(x)], 1)
    exact = x.double().exp()
    ops.cross_entropy(logits, torch.ones(len(x), dtype=torch.int64, device=device), scale=1.0)
    assert ((logits[:, 0].double() - exact).abs() / exact).max() < 2 * 2**-23


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_has_no_probability(device, dtype):
    logits, targets = inputs((3, 1200), dtype, device)
    logits[:, ::3] = -math.inf
    logits[1, :1100] = -math.inf
    targets[:] = 1151
    check(logits, targets)
    assert not logits[:, ::3].any()
    impossible, _ = ops.cross_entropy(
        torch.tensor([[0.0, -math.inf]], device=device), torch.tensor([1], device=device)
    )
    assert impossible.item() == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 700, 1100])
def test_broken_rows_are_nan_and_alone(device, dtype, bad, place):
    logits, targets = inputs((3, 1111), dtype, device)
    logits[1, place] = bad
    theirs = functional.cross_entropy(logits.float(), targets, reduction="none")
    loss, _ = check(logits, targets)
    assert loss.isnan().tolist() == theirs.isnan().tolist() == [False, True, False]
    assert logits[1].isnan().all()


def test_nothing_but_minus_infinity(device):
    logits = torch.full((1, 40), -math.inf, device=device)
    loss, normaliser = check(logits, torch.tensor([3], device=device))
    assert math.isnan(loss)
    assert normaliser.item() == -math.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows(device, dtype):
    logits, targets = inputs((5, 300), dtype, device)
    targets[::2] = IGNORED
    logits[4, 7] = math.nan
    normaliser = logits.float().logsumexp(1)
    loss, ours = check(logits, targets)
    assert not loss[::2].any()
    assert not logits[::2].any()
    torch.testing.assert_close(ours, normaliser, atol=2e-6, rtol=1e-6, equal_nan=True)  # as above


def test_views(device):
    base, targets = inputs((20, 90), torch.bfloat16, device)
    outside = base.clone()
    check(base[3:18, 5:70], targets[:15] % 65)
    outside[3:18, 5:70] = base[3:18, 5:70]
    assert torch.equal(base, outside)  # in place touches nothing else
    strided = base.t()
    ours = ops.cross_entropy(strided, targets.repeat(5)[:90:1] % 20)
    theirs = ops.cross_entropy(strided.contiguous(), targets.repeat(5)[:90] % 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    spaced = targets.repeat_interleave(2)[::2]
    assert torch.equal(ops.cross_entropy(base, spaced)[0], ops.cross_entropy(base, targets)[0])


def test_overwriting_is_noticed_by_autograd(device):
    logits, targets = inputs((2, 9), torch.float32, device)
    weight = torch.ones(2, 9, device=device, requires_grad=True)
    product = (weight * logits).sum()
    ops.cross_entropy(logits, targets, scale=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_target_out_of_range():
    logits, _ = inputs((3, 10), torch.float32, "cpu")
    before = logits.clone()
    for bad in (10, -1, -101, 2**40):
        with pytest.raises(ValueError, match=f"the target of row 1 is {bad}, neither"):
            ops.cross_entropy(logits, torch.tensor([1, bad, 2]), scale=1.0)
    assert torch.equal(logits, before)


@pytest.mark.cuda
def test_target_out_of_range_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits, _ = inputs((3, 10), torch.float32, "cuda")
    loss, normaliser = ops.cross_entropy(logits, torch.tensor([1, 10, 2]).cuda(), scale=1.0)
    assert loss.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, False]
    assert normaliser.isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("scale", [None, 0.5])
def test_does_not_wait_for_the_device(scale):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    logits, targets = inputs((3, 1000), torch.bfloat16, "cuda")
    ops.cross_entropy(logits, targets, scale=scale)  # allocations and module loading may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.cross_entropy(logits, targets, scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_every_way(same_bits, dtype):
    logits, targets = inputs((9, 40_007), dtype, "cpu", spread=20.0)
    logits[2, 77], logits[4, 40_006] = -math.inf, math.nan
    targets[6] = IGNORED

    def all_results():
        gradient = logits.clone()
        return [*ops.cross_entropy(gradient, targets, scale=0.3), gradient]

    same_bits(all_results)


def test_repeats(device):
    logits, targets = inputs((9, 40_007), torch.bfloat16, device)
    first, again = (ops.cross_entropy(logits, targets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


ROWS = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "targets", "scale", "message"),
    [
        (torch.ones(3, 4, dtype=torch.float64), ROWS, None, "logits must be float32"),
        (torch.ones(3), ROWS, None, "logits must have 2 dimensions"),
        (torch.ones(3, 4), ROWS.int(), None, "targets must be int64"),
        (torch.ones(3, 4), ROWS[:2], None, r"targets has shape \(2,\), expected \(3,\)"),
        (torch.ones(3, 4), ROWS.to("meta"), None, "targets has no memory"),
        (torch.ones(4, 3).t(), ROWS, 1.0, r"not with strides \(1, 3\)"),
        (torch.ones(4).expand(3, 4), ROWS, 1.0, r"not with strides \(0, 1\)"),
    ],
)
def test_errors_name_the_culprit(logits, targets, scale, message):
    with pytest.raises(ValueError, match=message):
        ops.cross_entropy(logits, targets, scale=scale)
