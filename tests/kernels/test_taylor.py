import pytest
import torch

from fastprune.kernels import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 1), (1, 3), (111, 3), (3, 111), (576, 192), (130, 1536), (65, 14336), (4097,)]
KINDS = reference.KINDS
# Sums of up to 4096 floats a lane in fp32, then a tree: a relative error of a few 1e-7 of the sum
# of magnitudes is expected, 1e-5 is far below any difference in scores that matters.
RTOL = 1e-5


def arguments(shape, dtype, kind, device, own_h=True):
    """w, g, h, x as `kind` wants them."""
    matrix = lambda: torch.randn(shape, device=device)  # noqa: E731
    w = matrix().to(dtype)
    g = matrix().to(dtype) if kind in ("first", "vector", "mix") else None
    h = None
    if kind in ("second", "mix") and own_h:
        h = matrix().square()
    elif kind == "second":
        g = matrix().to(dtype)
    x = torch.rand(shape[1] if len(shape) == 2 else 1, device=device)
    return w, g, h, x if kind == "activation" else None


def assert_close(result, w, g, h, x, kind):
    """Against float64, relative to the sums of magnitudes (signed sums may cancel)."""
    exact = reference.taylor(w, g, h, x=x, kind=kind, compute=torch.float64)
    sign = -1 if kind == "mix" else 1  # so that the two terms of mix add up
    size = reference.taylor(
        w.abs(), None if g is None else sign * g.abs(), h, x=x,
        kind="first" if kind == "vector" else kind, compute=torch.float64,
    )  # fmt: skip
    for ours, true, scale in zip(result, exact, size):
        assert ours.dtype == torch.float32
        assert ours.shape == true.shape
        assert ((ours - true).abs() <= RTOL * scale.abs() + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(device, kind, shape, dtype):
    w, g, h, x = arguments(shape, dtype, kind, device)
    assert_close(ops.taylor(w, g, h, x=x, kind=kind), w, g, h, x, kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["second", "mix"])
def test_h_defaults_to_squared_gradient(device, kind, dtype):
    w, g, _, _ = arguments((37, 130), dtype, kind, device, own_h=False)
    assert_close(ops.taylor(w, g, kind=kind), w, g, None, None, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_h_in_the_weights_dtype(device, dtype):
    w, g, h, _ = arguments((37, 130), dtype, "mix", device)
    h = h.to(dtype)
    assert_close(ops.taylor(w, g, h, kind="mix"), w, g, h, None, "mix")


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(device, dtype):
    base = torch.randn(3, 200, 300, device=device).to(dtype)
    slices = base[:, 5:150, 7:290]
    transposed = base.transpose(1, 2)
    expanded = base[2, :1].expand(64, 300)
    for w, g in [(slices[0], slices[1]), (transposed[0], transposed[1]), (expanded, base[1, :64])]:
        assert_close(ops.taylor(w, g, kind="first"), w, g, None, None, "first")
    w = base[0, :, 3]
    assert_close(ops.taylor(w, w, kind="first"), w, w, None, None, "first")


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 0)])
def test_empty(device, shape):
    w = torch.zeros(shape, device=device)
    rows, cols = ops.taylor(w, w, kind="first")
    assert rows.tolist() == [0.0] * shape[0]
    assert cols.tolist() == [0.0] * (shape[1] if len(shape) == 2 else 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_row_and_column(device, value):
    w = torch.ones(70, 40, device=device)
    g = torch.ones(70, 40, device=device)
    g[66, 17] = value
    rows, cols = ops.taylor(w, g, kind="first")
    assert rows.isfinite().logical_not().nonzero().tolist() == [[66]]
    assert cols.isfinite().logical_not().nonzero().tolist() == [[17]]


def test_same_storage_twice(device):
    w = torch.randn(111, 65, device=device)
    assert_close(ops.taylor(w, w, kind="first"), w, w, None, None, "first")


def test_zero_dimensions_and_others_are_refused(device):
    for shape in [(), (2, 2, 2)]:
        with pytest.raises(ValueError, match="w must have 1 or 2 dimensions"):
            ops.taylor(torch.ones(shape, device=device), kind="l1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_in_every_way(same_bits, kind, dtype):
    w, g, h, x = arguments((131, 4999), dtype, kind, "cpu")
    same_bits(lambda: ops.taylor(w, g, h, x=x, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_lazy_views(device, kind):
    """Negated, and expanded along rows or columns."""
    w, g, h, x = arguments((40, 30), torch.float32, kind, device)
    views = {
        "w": [torch._neg_view(w), w[:1].expand(40, 30), w[:, :1].expand(40, 30)],
        "g": [] if g is None else [torch._neg_view(g), g[:1].expand(40, 30)],
        "x": [] if x is None else [torch._neg_view(x), x[:1].expand(30)],
    }
    given = {"w": w, "g": g, "h": h, "x": x}
    for name, lazy in views.items():
        for view in lazy:
            plain = given | {name: view.clone().resolve_neg().contiguous()}
            ours = ops.taylor(**given | {name: view}, kind=kind)
            assert all(map(torch.equal, ours, ops.taylor(**plain, kind=kind)))


def test_two_runs_agree(device):
    w, g = torch.randn(2, 300, 5000, device=device)
    first, second = (ops.taylor(w, g, kind="first") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "third"}, "kind is 'third'"),
        ({"g": None}, "needs g"),
        ({"h": torch.ones(4, 5)}, "does not use h"),
        ({"x": torch.ones(5)}, "does not use x"),
        ({"w": torch.ones(4, 5, dtype=torch.float64)}, "w must be float32 or bfloat16 or float16"),
        ({"w": torch.ones(4, 5, dtype=torch.int32)}, "w must be float32"),
        ({"g": torch.ones(4, 5, dtype=torch.float16)}, "g must be float32"),
        ({"g": torch.ones(5, 4)}, r"g has shape \(5, 4\), expected \(4, 5\)"),
        ({"g": torch.ones(4, 5, device="meta")}, "g has no memory"),
        ({"g": torch.ones(4, 5).to_sparse()}, "g must be a dense tensor"),
        ({"w": [1.0]}, "w must be a tensor, not list"),
    ],
)
def test_errors_name_the_culprit(change, message):
    good = {"w": torch.ones(4, 5), "g": torch.ones(4, 5), "kind": "first"}
    with pytest.raises(ValueError, match=message):
        ops.taylor(**(good | change))


def test_fake_tensors_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        w = torch.ones(4, 5)
    with pytest.raises(ValueError, match="w has no memory"):
        ops.taylor(w, kind="l1")


def test_fallback_agrees(monkeypatch):
    w, g = torch.randn(2, 30, 50)
    expected = ops.taylor(w, g, kind="first")
    monkeypatch.setattr(ops, "compiled", lambda device: None)
    for a, b in zip(expected, ops.taylor(w, g, kind="first")):
        torch.testing.assert_close(a, b, rtol=RTOL, atol=0)
