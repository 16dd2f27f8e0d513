"""Quantised checkpoints: each format against a formula written out number by number."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from adapters import settings
from gguf_files import gguf_tensors, write_gguf
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint, tiny_model
from torch import Tensor

from fastprune import cli
from fastprune.errors import InputError
from fastprune.models.load import load_model
from fastprune.models.streamed import StreamedModel
from fastprune.recover.lora import attach, save_adapter

FP8 = torch.float8_e4m3fn
NF4 = [
    -1.0,
    -0.7,
    -0.53,
    -0.39,
    -0.28,
    -0.18,
    -0.09,
    0,
    0.08,
    0.16,
    0.25,
    0.34,
    0.44,
    0.56,
    0.72,
    1,
]
"""About the table of NF4: the files bring their own."""

Parts = dict[str, Tensor]
Made = tuple[Parts, list[list[float]]]
"""The tensors of a module by their ends, and the weight (out, in) that they stand for."""


def words(numbers: list[int], bits: int, order: list[int] | None = None) -> list[int]:
    """`numbers` packed in int32, the first in the lowest bits, or each at its place in `order`."""
    count = 32 // bits
    packed = []
    for start in range(0, len(numbers), count):
        word = 0
        for index, number in enumerate(numbers[start : start + count]):
            place = order.index(index) if order else index
            word |= number << (place * bits)
        packed.append(word - 2**32 if word >= 2**31 else word)
    return packed


def ints(*shape: int, below: int, seed: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def scales(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.01


def gptq(rows: int, columns: int, bits: int = 4, first: bool = True, shuffled: bool = True) -> Made:
    size, groups = 32, columns // 32
    numbers, zeros = (
        ints(columns, rows, below=2**bits, seed=1),
        ints(groups, rows, below=2**bits, seed=2),
    )
    scale = scales(groups, rows, seed=3).half()
    group = torch.arange(columns) // size
    if shuffled:
        group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(4))]
    stored = (zeros - 1) % 2**bits if first else zeros
    parts = {
        "qweight": torch.tensor([words(column, bits) for column in numbers.T.tolist()]).T,
        "qzeros": torch.tensor([words(row, bits) for row in stored.tolist()]),
        "scales": scale,
        "g_idx": group,
    }
    if not shuffled:
        del parts["g_idx"]
    weight = [
        [
            float(scale[group[i], o]) * (int(numbers[i, o]) - int(zeros[group[i], o]))
            for i in range(columns)
        ]
        for o in range(rows)
    ]
    return {k: v.int().contiguous() if k != "scales" else v for k, v in parts.items()}, weight


def awq(rows: int, columns: int) -> Made:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # place p of a word holds column order[p]
    groups = columns // 32
    numbers, zeros = ints(columns, rows, below=16, seed=1), ints(groups, rows, below=16, seed=2)
    scale = scales(groups, rows, seed=3).half()
    parts = {
        "qweight": torch.tensor([words(row, 4, order) for row in numbers.tolist()]).int(),
        "qzeros": torch.tensor([words(row, 4, order) for row in zeros.tolist()]).int(),
        "scales": scale,
    }
    weight = [
        [
            float(scale[i // 32, o]) * (int(numbers[i, o]) - int(zeros[i // 32, o]))
            for i in range(columns)
        ]
        for o in range(rows)
    ]
    return parts, weight


def float8(rows: int, columns: int, kind: str = "block", end: str = "weight_scale_inv") -> Made:
    values = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))).to(FP8)
    shape, place = {
        "tensor": ((1,), lambda o, i: (0,)),
        "number": ((), lambda o, i: ()),
        "channel": ((rows, 1), lambda o, i: (o, 0)),
        "block": ((-(-rows // 24), -(-columns // 40)), lambda o, i: (o // 24, i // 40)),
    }[kind]
    scale = scales(*shape, seed=2)
    weight = [
        [float(values[o, i]) * float(scale[place(o, i)]) for i in range(columns)]
        for o in range(rows)
    ]
    return {"weight": values, end: scale, "input_scale": torch.ones(1)}, weight


def eight_bits(rows: int, columns: int, asymmetric: bool = False) -> Made:
    values = ints(rows, columns, below=256, seed=1) - 128
    scale, zero = scales(rows, 1, seed=2).bfloat16(), ints(rows, 1, below=20, seed=3) - 10
    zero *= asymmetric
    weight = [
        [float(scale[o]) * (int(values[o, i]) - int(zero[o])) for i in range(columns)]
        for o in range(rows)
    ]
    parts = {"weight": values.to(torch.int8), "weight_scale": scale}
    return parts | ({"weight_zero_point": zero.to(torch.int8)} if asymmetric else {}), weight


def packed(rows: int, columns: int, bits: int = 4, asymmetric: bool = False) -> Made:
    groups, half = columns // 32, 2 ** (bits - 1)
    numbers, zeros = (
        ints(rows, columns, below=2**bits, seed=1),
        ints(rows, groups, below=2**bits, seed=2),
    )
    scale = scales(rows, groups, seed=3)
    parts = {
        "weight_packed": torch.tensor([words(row, bits) for row in numbers.tolist()]).int(),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if asymmetric:
        parts["weight_zero_point"] = (
            torch.tensor([words(column, bits) for column in zeros.T.tolist()]).T.int().contiguous()
        )
    else:
        zeros = torch.full_like(zeros, half)
    weight = [
        [
            float(scale[o, i // 32]) * (int(numbers[o, i]) - int(zeros[o, i // 32]))
            for i in range(columns)
        ]
        for o in range(rows)
    ]
    return parts, weight


def four_bits(rows: int, columns: int, nested: bool = False) -> Made:
    size, outer = 48, 16  # the last block is not full
    count = rows * columns
    numbers = ints(count, below=16, seed=1).tolist()
    table = torch.tensor(NF4)
    blocks = -(-count // size)
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": [rows, columns]}
    pairs = zip(numbers[::2], numbers[1::2])
    parts = {
        "weight": torch.tensor([[high * 16 + low] for high, low in pairs], dtype=torch.uint8),
        "weight.quant_map": table,
    }
    if nested:
        codes = ints(blocks, below=256, seed=2)
        tables = {"nested_quant_map": scales(256, seed=3), "nested_absmax": scales(99, seed=4)}
        tables["nested_absmax"] = tables["nested_absmax"][: -(-blocks // outer)]
        state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": 0.25}
        parts |= {f"weight.{key}": value for key, value in tables.items()}
        parts["weight.absmax"] = codes.to(torch.uint8)
        largest = [
            float(tables["nested_quant_map"][code] * tables["nested_absmax"][block // outer]) + 0.25
            for block, code in enumerate(codes.tolist())
        ]
    else:
        parts["weight.absmax"] = scales(blocks, seed=2)
        largest = parts["weight.absmax"].tolist()
    text = json.dumps(state).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    values = [float(table[number]) * largest[k // size] for k, number in enumerate(numbers)]
    return parts, [values[row * columns : (row + 1) * columns] for row in range(rows)]


def rowwise(rows: int, columns: int) -> Made:
    values, largest = ints(rows, columns, below=255, seed=1) - 127, scales(rows, seed=2)
    parts = {"weight": values.to(torch.int8), "SCB": largest}
    parts["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    weight = [[int(v) * float(m) / 127 for v in row] for row, m in zip(values, largest)]
    return parts, weight


def compressed(format: str, weights: dict) -> dict:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}


BLOCK = {"weight_block_size": [24, 40]}
FORMATS: dict[str, tuple[dict, Callable[[int, int], Made]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq),
    "gptq 8 bits, second format": (
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
        lambda r, c: gptq(r, c, 8, first=False, shuffled=False),
    ),
    "gptq 2 bits": ({"quant_method": "gptq", "bits": 2}, lambda r, c: gptq(r, c, 2)),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm", "group_size": 32}, awq),
    "fp8 blocks": ({"quant_method": "fp8", **BLOCK}, float8),
    "fp8 tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        lambda r, c: float8(r, c, "number", "weight_scale"),
    ),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8"},
        lambda r, c: float8(r, c, "channel", "weight_scale"),
    ),
    "compressed fp8 channel": (
        compressed("float-quantized", {"type": "float"}),
        lambda r, c: float8(r, c, "channel", "weight_scale"),
    ),
    "compressed fp8 tensor": (
        compressed("float-quantized", {"type": "float"}),
        lambda r, c: float8(r, c, "tensor", "weight_scale"),
    ),
    "compressed fp8 blocks": (
        compressed("float-quantized", {"type": "float", "block_structure": [24, 40]}),
        lambda r, c: float8(r, c, "block", "weight_scale"),
    ),
    "compressed int8": (compressed("int-quantized", {"type": "int"}), eight_bits),
    "compressed int8, asymmetric": (
        compressed("int-quantized", {"type": "int", "symmetric": False}),
        lambda r, c: eight_bits(r, c, asymmetric=True),
    ),
    "packed 4 bits": (compressed("pack-quantized", {"num_bits": 4}), packed),
    "packed 4 bits, asymmetric": (
        compressed("pack-quantized", {"num_bits": 4, "symmetric": False}),
        lambda r, c: packed(r, c, asymmetric=True),
    ),
    "packed 8 bits": (compressed("pack-quantized", {}), lambda r, c: packed(r, c, bits=8)),
    "nf4": ({"load_in_4bit": True}, four_bits),
    "nf4, nested": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        lambda r, c: four_bits(r, c, nested=True),
    ),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, rowwise),
}
MODULES = ("self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def quantise(folder, format: str) -> dict[str, Tensor]:
    """Store MODULES of the layers in `folder` in `format`; returns all weights in float32."""
    settings, make = FORMATS[format]
    tensors = load_file(folder / "model.safetensors")
    plain, made = dict(tensors), {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            shape = tuple(tensor.shape)
            made[shape] = made.get(shape) or make(*shape)
            parts, weight = made[shape]
            del tensors[name]
            tensors |= {f"{module}.{end}": part.clone() for end, part in parts.items()}
            plain[name] = torch.tensor(weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    configure(folder, quantization_config=settings, dtype="float16")
    return plain


def configure(folder, **settings) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """To the last bit of float32, or of bf16, to which they were rounded."""
    tolerance = 1e-6 if found.dtype == torch.float32 else 2**-8
    assert torch.allclose(found.float(), expected, rtol=tolerance, atol=1e-9)


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint(tmp_path / "model", layers=2)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_what_the_formula_says(format, folder):
    expected = quantise(folder, format)
    model, _ = load_model(folder, dtype="float32")
    state = model.state_dict()
    streamed = StreamedModel(folder, dtype="float32")
    for name, weight in expected.items():
        assert_equal(state[name], weight)
        assert torch.equal(streamed.fetch(name), state[name])
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(streamed.model.config, "quantization_config")


def test_a_quantised_model_is_pruned_to_an_unquantised_one(folder, tmp_path):
    quantise(folder, "gptq")
    out = tmp_path / "out"
    call = ["prune", str(folder), "--out", str(out), "--stream", "--ratio", "0.2", "--quiet"]
    call += ["--importance", "magnitude-l1", "--allocation", "uniform", "--compensate", "none"]
    assert cli.main([*call, "--eval-seq-len", "32", "--eval-windows", "1"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    pruned, dense = load_file(out / "model.safetensors"), load_model(folder)[0].state_dict()
    for tensors in (pruned, dense):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.gate_proj.weight"
    rows = {tuple(row) for row in dense[name].tolist()}
    assert len(pruned[name]) < len(rows)
    assert {tuple(row) for row in pruned[name].tolist()} < rows


def test_a_quantised_model_is_diagnosed_by_what_its_numbers_stand_for(folder, tmp_path):
    weights = quantise(folder, "compressed fp8 blocks")
    report = tmp_path / "found.json"
    assert cli.main(["diagnose", str(folder), "--json", str(report), "--quiet"]) == 0
    tensors = {one["name"]: one for one in json.loads(report.read_text())["tensors"]}
    assert tensors.keys() == weights.keys()
    for name, weight in weights.items():
        assert tensors[name]["dtype"] in ("bfloat16", "float32")
        assert tensors[name]["absmax"] == pytest.approx(float(weight.abs().max()), rel=2**-7)


def test_zero_biases_that_the_model_has_not_are_left_out(folder):
    expected = quantise(folder, "gptq")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    biases = {f"model.layers.0.{module}.bias": torch.zeros(96) for module in MODULES}
    save_file(tensors | biases, file, metadata={"format": "pt"})
    for model in (load_model(folder)[0], StreamedModel(folder).model):
        assert model.state_dict().keys() - {"lm_head.weight"} == expected.keys()
    biases["model.layers.0.mlp.gate_proj.bias"][3] = 1.0
    save_file(tensors | biases, file, metadata={"format": "pt"})
    for load in (load_model, StreamedModel):
        with pytest.raises(InputError, match=r"not used, first .*gate_proj\.bias"):
            load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, r"quantised with hqq: it is not read; .* with hqq \(dequantize"),
        ({"quant_method": "new"}, "with the library that quantised it"),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "marlin is not read; .*GPTQModel",
        ),
        ({"quant_method": "gptq", "is_marlin_format": True}, "marlin is not read"),
        ({"quant_method": "awq", "version": "gemv"}, "the format gemv is not read"),
        ({"quant_method": "awq", "bits": 8}, "8 bits are not read"),
        ({"quant_method": "compressed-tensors"}, "its config has no 'config_groups'"),
        (compressed("nvfp4-pack-quantized", {}), "nvfp4-pack-quantized is not read"),
        (
            compressed("dense", {}) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask is not read",
        ),
        (compressed("dense", {}) | {"transform_config": {"a": 1}}, "transformed"),
    ],
)
def test_formats_that_are_not_read_name_a_tool(settings, message, folder):
    configure(folder, quantization_config=settings)
    for load in (load_model, StreamedModel):
        with pytest.raises(InputError, match=message) as error:
            load(folder)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("format", "lost", "message"),
    [
        ("gptq", "qzeros", r"qzeros is missing"),
        ("awq", "scales", r"scales is missing"),
        ("fp8 blocks", "weight_scale_inv", r"k_proj\.weight is stored as F8_E4M3, and what"),
        ("compressed int8", "weight_scale", r"k_proj\.weight is stored as I8, and what"),
        ("packed 4 bits", "weight_shape", r"weight_shape is missing"),
        ("nf4", "weight.absmax", r"weight\.absmax is missing"),
        ("nf4, nested", "weight.nested_absmax", r"nested_absmax is missing"),
        ("int8", "SCB", r"k_proj\.weight is stored as I8, and what"),
    ],
)
def test_a_part_that_is_lost_is_named(format, lost, message, folder):
    quantise(folder, format)
    file = folder / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.endswith(f"k_proj.{lost}")}
    save_file(kept, file, metadata={"format": "pt"})
    for load in (load_model, StreamedModel):
        with pytest.raises(InputError, match=message):
            load(folder)


def test_scales_that_do_not_fit_are_refused(folder):
    quantise(folder, "fp8 blocks")
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    for load in (
        load_model,
        lambda path: StreamedModel(path).fetch("model.layers.0.mlp.down_proj.weight"),
    ):
        with pytest.raises(InputError, match=r"is damaged .scales of the shape .* do not go with"):
            load(folder)


def test_groups_beyond_the_scales_are_refused(folder):
    quantise(folder, "gptq")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.gate_proj.g_idx"][0] = 7
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.gate_proj\.weight is damaged"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_numbers_without_a_scale_are_refused_wherever_they_lie(dtype, folder, capsys):
    name = "model.layers.1.mlp.up_proj.weight"
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    for command in (["eval"], ["diagnose"], ["diagnose", "--no-forward"]):
        assert cli.main([command[0], str(folder), *command[1:], "--quiet"]) == 2
        assert f"{name} is stored as" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"up_proj\.weight is stored as"):
        StreamedModel(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: .*up_proj\.weight is stored as"):
        load_model(folder)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: .*up_proj\.weight is stored as"):
        load_model(folder / "pytorch_model.bin")


def test_an_adapter_in_numbers_without_a_scale_is_refused(folder, tmp_path):
    adapter = tmp_path / "adapter"
    save_adapter(attach(load_model(folder)[0], settings()), adapter, str(folder))
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor.to(FP8) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"--adapter .*lora_.* is stored as float8_e4m3fn"):
        load_model(folder, adapter=adapter)


def test_tensors_of_integers_in_a_gguf_are_refused(tmp_path):
    model = tiny_model("llama", layers=1)
    tensors = gguf_tensors(model)
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype("int8")
    path = write_gguf(tmp_path / "m.gguf", model, tensors=tensors)
    with pytest.raises(InputError, match=r"cannot be read: .*I8"):
        load_model(path)
