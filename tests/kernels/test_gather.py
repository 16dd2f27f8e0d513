import pytest
import torch

from fastprune.kernels import ops, reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.float64, torch.int64, torch.int8, torch.bool]
SIZES = [1, 3, 111, 576, 1536, 14336]


def filled(shape, dtype, device="cpu"):
    if dtype == torch.bool:
        return torch.rand(shape, device=device) > 0.5
    return (100 * torch.randn(shape, device=device)).to(dtype)


def choose(n, share):
    return torch.randperm(n)[: round(share * n)].sort().values


def check(tensors, indices, dims):
    results = ops.gather(tensors, indices, dims)
    for ours, true in zip(results, reference.gather(tensors, indices, dims)):
        assert ours.is_contiguous()
        assert torch.equal(ours, true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8, 1.0])
def test_rows_and_columns(device, size, dtype, share):
    index = choose(size, share)
    tall, wide = filled((size, 70), dtype, device), filled((19, size), dtype, device)
    check([tall, wide, filled((size,), dtype, device)], [index] * 3, [0, 1, 0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_heads_as_segments(device, dtype):
    heads = torch.tensor([0, 2, 3, 7])
    index = (heads[:, None] * 64 + torch.arange(64)).flatten()
    w = filled((33, 576), dtype, device)
    check([w, w.t().contiguous()], [index, index], [1, 0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_far_apart_columns(device, dtype):
    index = torch.cat([torch.arange(40), torch.arange(3000, 9000, 97), torch.arange(9000, 9051)])
    check([filled((7, 9051), dtype, device)], [index], [1])


def test_views(device):
    base = filled((200, 300), torch.float32, device)
    rows, columns = choose(100, 0.5), choose(150, 0.5)
    check([base[50:150, 9:], base[:, 100:250], base.t()], [rows, columns, columns], [0, 1, 0])
    check([base[:, 7]], [rows], [0])


def test_empty(device):
    none = torch.empty(0, dtype=torch.int64)
    w = filled((4, 5), torch.float32, device)
    empty = w[:, :0]
    check([w, w, empty, empty], [none, none, torch.tensor([1]), none], [0, 1, 0, 1])
    assert ops.gather([], [], []) == []


def test_non_finite_values_are_copied(device):
    w = torch.full((40, 80), float("nan"), device=device)
    w[:, ::2] = float("inf")
    (kept,) = ops.gather([w], [torch.arange(0, 80, 2)], [1])
    assert torch.equal(kept, torch.full((40, 40), float("inf"), device=device))


def test_same_storage_twice(device):
    w = filled((50, 60), torch.float32, device)
    check([w, w, w[10:]], [choose(50, 0.5), choose(60, 0.5), choose(40, 0.5)], [0, 1, 0])


def test_out_is_filled_and_its_version_rises(device):
    w = filled((50, 60), torch.float32, device)
    index = choose(50, 0.5)
    out = torch.empty(25, 60, device=device)
    version = out._version
    (result,) = ops.gather([w], [index], [0], out=[out])
    assert result is out
    assert out._version > version
    assert torch.equal(out, w[index.to(device)])


def test_an_index_may_be_negated_lazily(device):
    w, index = filled((50, 60), torch.float32, device), choose(50, 0.5)
    (result,) = ops.gather([w], [torch._neg_view(-index)], [0])
    assert torch.equal(result, w[index.to(device)])


@pytest.mark.parametrize("compiled", [True, False])
def test_results_lie_apart(monkeypatch, compiled):
    if not compiled:
        monkeypatch.setattr(ops, "compiled", lambda _: None)
    w, other = torch.ones(4, 5), torch.ones(4, 5)
    one = torch.tensor([1, 2])
    for out, message in (
        ([torch.zeros(2, 5), w[:2]], "tensor 0 and result 1 share memory"),
        ([other[2:], torch.zeros(2, 5)], "result 0 and tensor 1 share memory"),
        ([torch.zeros(2, 5)] * 2, "share memory"),
        ([torch.zeros(2, 5), torch._neg_view(torch.zeros(2, 5))], "result 1 is a lazily negated"),
        ([torch.zeros(2, 5), torch.zeros(5).expand(2, 5)], "result 1 must fill one block"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.gather([w, other], [one, one], [0, 0], out=out)
    assert bool((w == 1).all()) and bool((other == 1).all())


def test_parameters_are_accepted(device):
    w = torch.nn.Parameter(filled((50, 60), torch.float32, device))
    (result,) = ops.gather([w], [choose(50, 0.5)], [0])
    assert not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
def test_same_bits_in_every_way(same_bits, dtype):
    tensors = [filled((300, 1111), dtype), filled((1111, 300), dtype), filled((1111,), dtype)]
    index = choose(1111, 0.7)
    same_bits(lambda: ops.gather(tensors, [index] * 3, [1, 0, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(4, 5)], [], []), "1 tensors, 0 indices and 0 dims differ"),
        (([torch.ones(4, 5)], [torch.tensor([1])], [2]), "dim is 2 for tensor 0"),
        (([torch.ones(2, 2, 2)], [torch.tensor([1])], [0]), "dim is 0 for tensor 0"),
        (([torch.ones(4, 5)], [torch.tensor([1.0])], [0]), "index 0 must be int64"),
        (([torch.ones(4, 5)], [torch.tensor([[1]])], [0]), "index 0 must have 1 dimension"),
        (([torch.ones(4, 5)], [torch.tensor([4])], [0]), "index 0 reaches"),
        (([torch.ones(4, 5)], [torch.tensor([-1])], [0]), "index 0"),
        (([torch.ones(4, 5)], [torch.tensor([2, 1])], [0]), "index 0 must be ascending"),
        (([torch.ones(4, 5)], [torch.tensor([1, 1])], [0]), "index 0 must be ascending"),
        (([torch.ones(4, 5).cfloat()], [torch.tensor([1])], [0]), "tensor 0 must be real"),
        (([torch.ones(4, 5, device="meta")], [torch.tensor([1])], [0]), "tensor 0 has no memory"),
        (([torch.ones(4, 5)], [torch.tensor([1])], [0], []), "0 results to fill"),
        (([torch.ones(4, 5)], [torch.tensor([1])], [0], [torch.ones(2, 5)]), "result 0 has shape"),
    ],
)
def test_errors_name_the_culprit(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.gather(*arguments)


@pytest.mark.parametrize("index", [[4], [-1], [2, 1], [1, 1]])
def test_fallback_refuses_the_same_indices(monkeypatch, index):
    monkeypatch.setattr(ops, "compiled", lambda device: None)
    with pytest.raises(ValueError, match="index 0"):
        ops.gather([torch.ones(4, 5)], [torch.tensor(index)], [0])


def test_fallback_agrees(monkeypatch):
    w, index = filled((50, 60), torch.float32), choose(50, 0.5)
    expected = ops.gather([w], [index], [0])
    monkeypatch.setattr(ops, "compiled", lambda device: None)
    out = [torch.empty_like(expected[0])]
    assert torch.equal(ops.gather([w], [index], [0])[0], expected[0])
    assert torch.equal(ops.gather([w], [index], [0], out=out)[0], expected[0])
