"""What only the CUDA kernels promise: agreement with the CPU kernels, no waiting, one result."""

import pytest
import torch

from fastprune.kernels import AdamW, ops
from fastprune.kernels.backend import compiled

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda", 0)
SHAPES = [(1,), (111,), (3, 111), (130, 576), (257, 1536), (70_001,)]


@pytest.fixture(autouse=True)
def _kernels():
    if not torch.cuda.is_available() or compiled(CUDA) is None:
        pytest.skip("no CUDA device")


def step_on(device, dtype, steps=3, poisoned=None, **options):
    """Optimizer, weights and gradients after some steps, the same on every device but for it."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda s: torch.randn(s, generator=generator).to(dtype).to(device)  # noqa: E731
    weights = [draw(shape).requires_grad_() for shape in SHAPES]
    optimizer = AdamW(weights, lr=1e-2, weight_decay=0.1, **options)
    for number in range(steps):
        for w in weights:
            w.grad = draw(w.shape)
        if number == poisoned:
            weights[2].grad[1, 5] = float("nan")
        optimizer.step()
    return optimizer, weights


@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        (torch.float32, "none"),
        (torch.bfloat16, "fp32"),
        (torch.bfloat16, "stochastic"),
        (torch.float16, "stochastic"),
        (torch.float16, "none"),
    ],
)
def test_adamw_updates_as_on_the_cpu(dtype, master):
    # Exactly: the rule is one piece of code without contraction, the random bits are counted, and
    # without clipping no sum enters it. fp64 pow may differ in its last bit, which survives the
    # rounding to fp32 about once in 10^8.
    _, on_cpu = step_on("cpu", dtype, master=master)
    _, on_cuda = step_on("cuda", dtype, master=master)
    for ours, theirs in zip(on_cuda, on_cpu):
        assert torch.equal(ours.cpu(), theirs)


def test_clipped_steps_repeat():
    _, first = step_on("cuda", torch.bfloat16, max_grad_norm=0.5)
    _, again = step_on("cuda", torch.bfloat16, max_grad_norm=0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_adamw_does_not_wait():
    step_on("cuda", torch.bfloat16)  # allocations and module loading may wait
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [torch.randn(s, device="cuda", generator=generator) for s in SHAPES]
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer = AdamW(weights, lr=1e-3, max_grad_norm=1.0)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_adamw_skips_on_the_device():
    optimizer, weights = step_on("cuda", torch.bfloat16, steps=2, poisoned=1)
    _, after_one = step_on("cuda", torch.bfloat16, steps=1)
    assert int(optimizer.skipped_steps) == 1
    assert list(optimizer.culprits().values()) == [1]
    assert all(torch.equal(a, b) for a, b in zip(weights, after_one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [576, 577])
def test_sums_repeat_while_the_device_is_busy(dtype, columns):
    w, g = (torch.randn(1000, columns, device="cuda").to(dtype) for _ in range(2))
    expected = ops.taylor(w, g, kind="first")
    table = ops.scan_table([w, g])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        with torch.cuda.stream(side):
            noise = torch.randn(2048, 2048, device="cuda")
            noise @ noise
        assert all(
            torch.equal(a, b) for a, b in zip(ops.taylor(w, g, kind="first"), expected, strict=True)
        )
        assert torch.equal(ops.scan_table([w, g]), table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scan_counts_as_on_the_cpu(dtype):
    x = torch.randn(200_003).to(dtype)
    x[::1000] = 0
    x[5::5000] = float("nan")
    x[7::7000] = -float("inf")
    x[11::20_000] = 60
    ours, theirs = ops.scan(x.cuda()), ops.scan(x)
    assert ours[:7] == theirs[:7]  # counts and extremes are exact
    assert ours.numel == theirs.numel
    # Moments: fp32 sums of at most 256 values, then fp64, here; longer fp32 sums on the CPU.
    assert ours.mean == pytest.approx(theirs.mean, abs=1e-5)
    assert ours.second_moment == pytest.approx(theirs.second_moment, rel=1e-5)


def test_gather_of_many_tensors_takes_one_table_after_another():
    # More tensors than one kernel argument area holds.
    tensors = [torch.randn(1 + i % 5, 8, device="cuda") for i in range(1200)]
    index = torch.tensor([0, 1, 4, 5, 7])
    results = ops.gather(tensors, [index] * len(tensors), [1] * len(tensors))
    for t, r in zip(tensors, results):
        assert torch.equal(r, t[:, index.cuda()])
