"""Safetensors files tensor by tensor, against the safetensors library."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastprune.errors import InputError
from fastprune.models.shards import FILE, INDEX, ShardReader, ShardWriter

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
}


def test_the_library_reads_what_is_written_in_any_order(tmp_path):
    with ShardWriter(tmp_path, {n: t.to("meta") for n, t in TENSORS.items()}) as out:
        for name in reversed(TENSORS):
            out.write(name, TENSORS[name])
    loaded = load_file(tmp_path / FILE)
    assert list(tmp_path.iterdir()) == [tmp_path / FILE]
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_what_the_library_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / FILE)
    reader = ShardReader(tmp_path)
    assert reader.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name, tensor.dtype, torch.device("cpu")), tensor)
    assert reader.read("b", torch.float64, torch.device("cpu")).dtype == torch.float64


def test_several_files(tmp_path):
    with ShardWriter(tmp_path, TENSORS, max_bytes=50) as out:
        for name, tensor in TENSORS.items():
            out.write(name, tensor)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "empty": "model-00002-of-00002.safetensors",
        "scalar": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 48 + 6 + 2
    reader = ShardReader(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name, tensor.dtype, torch.device("cpu")), tensor)


def test_a_tensor_that_does_not_fit_the_layout(tmp_path):
    out = ShardWriter(tmp_path, TENSORS)
    with pytest.raises(ValueError, match="a is"):
        out.write("a", TENSORS["a"].half())
    with pytest.raises(ValueError, match="a is"):
        out.write("a", TENSORS["a"].T)


def test_a_tensor_that_is_forgotten(tmp_path):
    complaint = pytest.raises(ValueError, match="3 tensors were not written: b")
    with complaint, ShardWriter(tmp_path, TENSORS) as out:
        out.write("a", TENSORS["a"])


def change(data: bytes, **tensor) -> bytes:
    """The file ``data`` with other facts about tensor a in its header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["a"] |= tensor
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) - 1],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: b"\xff" * 64 + data[64:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: change(data, shape=[5, 4]),
        lambda data: change(data, data_offsets=[-48, 0]),
        lambda data: change(data, data_offsets=[10**6, 10**6 + 48]),
    ],
    ids=["short", "no data", "empty", "noise", "not json", "shape", "before", "beyond"],
)
def test_damage(tmp_path, damage):
    save_file(TENSORS, tmp_path / FILE)
    (tmp_path / FILE).write_bytes(damage((tmp_path / FILE).read_bytes()))
    with pytest.raises(InputError, match="truncated or corrupt"):
        ShardReader(tmp_path)


def test_a_dtype_that_is_not_read(tmp_path):
    save_file({"a": torch.arange(3)}, tmp_path / FILE)
    with pytest.raises(InputError, match="I64"):
        ShardReader(tmp_path).read("a", torch.float32, torch.device("cpu"))


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="no weights in safetensors"):
        ShardReader(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        ShardReader(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(InputError, match="broken index"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("max_bytes", [1, 16, 33, 47, 48, 1000])
def test_pieces_are_the_tensor(tmp_path, max_bytes):
    save_file(TENSORS, tmp_path / FILE)
    reader = ShardReader(tmp_path)
    for name, tensor in TENSORS.items():
        pieces = list(reader.pieces(name, max_bytes))
        if tensor.ndim and tensor.numel():
            row = tensor[0].numel() * tensor.element_size()
            size = max(max_bytes, row)
            assert all(p.numel() * p.element_size() <= size for p in pieces)
            assert len(pieces) == -(-len(tensor) // (size // row))
            assert torch.equal(torch.cat(pieces), tensor)
        else:
            assert torch.equal(*pieces, tensor)
