"""The border between torch and the kernels: what crosses it, and what is turned away."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def scan(module, tensors):
    out = torch.empty(len(tensors), 10, dtype=torch.float64)
    module.scan(tensors, out, torch.empty(1 << 16, dtype=torch.uint8))
    return out


def test_views_are_borrowed_not_copied(module):
    base = torch.zeros(10, 4)
    dst = base[2:4]
    module.gather([torch.ones(3, 4)], [torch.tensor([0, 2])], [0], False, [dst], None)
    assert base.sum() == 8
    assert base[2:4].sum() == 8


def test_storage_offset_is_honoured(module):
    x = torch.arange(10.0)[3:6]
    assert scan(module, [x])[0, 4:6].tolist() == [3.0, 5.0]


def test_subclasses_of_tensor_are_accepted(module):
    assert scan(module, [torch.nn.Parameter(torch.ones(3))])[0, 9] == 3


@pytest.mark.parametrize("thing", [1.0, "x", [1.0], object()])
def test_what_is_no_tensor_is_a_type_error(module, thing):
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
        scan(module, [thing])


def test_lists_must_be_lists(module):
    with pytest.raises(TypeError, match="incompatible"):
        module.scan((torch.ones(3),), torch.ones(10).double(), torch.ones(9, dtype=torch.uint8))


def test_fake_tensors_are_turned_away(module):
    with FakeTensorMode():
        x = torch.ones(3)
    with pytest.raises(ValueError, match="has no memory"):
        scan(module, [x])


def test_other_devices_are_turned_away(module):
    with pytest.raises((ValueError, BufferError, RuntimeError)):
        scan(module, [torch.ones(3, device="meta")])


def test_sparse_tensors_are_turned_away(module):
    with pytest.raises((ValueError, BufferError, RuntimeError)):
        scan(module, [torch.eye(3).to_sparse()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64])
def test_dtypes_are_checked_below_python_too(module, dtype):
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16"):
        scan(module, [torch.ones(3).to(dtype)])


def test_workspaces_are_checked(module):
    small = torch.empty(1, dtype=torch.uint8)
    x = torch.ones(100_000)
    out = torch.empty(1, 10, dtype=torch.float64)
    with pytest.raises(ValueError, match="scan: workspace is too small"):
        module.scan([x], out, small)
    w = torch.ones(200, 30)
    with pytest.raises(ValueError, match="taylor: workspace is too small"):
        module.taylor(w, None, None, None, "l1", torch.empty(200), torch.empty(30), small)


def test_reading_does_not_bump_versions_or_keep_references(module):
    x = torch.ones(3)
    version = x._version
    scan(module, [x])
    assert x._version == version
    assert x.untyped_storage().nbytes() == 12
