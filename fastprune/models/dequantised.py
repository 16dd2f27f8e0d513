"""Quantised checkpoints, read as the weights that their numbers stand for, one at a time.

A quantised weight is several tensors in the files: packed integers, scales, zero points. A reader
of shards that knows how they belong together shows each such weight as one tensor, so that all that
reads weights reads these too. What activations are quantised by is left out: the model that is
built is not quantised. `fastprune.models.packing` holds the arithmetic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprune.errors import InputError
from fastprune.models import packing
from fastprune.models.checks import quantisation, quantisation_method, reason
from fastprune.models.packing import WORD
from fastprune.models.shards import DTYPES, PACKED, Entry, ShardReader, whole

WRITTEN = "BF16"
"""The dtype that dequantised weights are given."""
BITS = (2, 4, 8)
"""Sizes of packed integers that are read."""
BLOCK = (128, 128)
"""Rows and columns of a weight in FP8 that share a scale, where a config does not say."""
FLOAT8 = ("F8_E4M3", "F8_E5M2")
ACTIVATIONS = tuple(
    f".{kind}"
    for kind in (
        *("input_scale", "input_zero_point", "input_global_scale", "input_scale_ub"),
        *("output_scale", "output_zero_point", "activation_scale"),
        *("q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point"),
    )
)
"""How the names of tensors end that say how activations and caches are quantised."""
TOOLS = {
    "gptq": "GPTQModel, or what else made it",
    "awq": "AutoAWQ, or what else made it",
    "compressed-tensors": "transformers (CompressedTensorsConfig(dequantize=True))",
    "mxfp4": "transformers (quantization_config=Mxfp4Config(dequantize=True))",
    "higgs": "transformers (model.dequantize())",
    "torchao": "torchao (dequantize() of each weight)",
    "quanto": "optimum-quanto (dequantize() of each weight)",
    "hqq": "hqq (dequantize() of each layer)",
    "modelopt": "NVIDIA Model Optimizer, which made it",
    "auto-round": "auto-round, which made it",
}
"""What makes an unquantised model of those that are not read here, by method."""


@dataclass(frozen=True)
class Packed:
    """A weight made of other tensors of the files: `parts` are their names, by the arguments of
    `weight`, which gives it in float32. `known` are tensors that were read already."""

    shape: tuple[int, ...]
    parts: Mapping[str, str]
    weight: Callable[..., Tensor]
    known: tuple[str, ...] = ()


class DequantisedShards(ShardReader):
    """The weights of a quantised folder, whose config describes them by ``settings``.

    They read as any others. Raises InputError for a format that is not read, and where the files
    do not hold what it needs.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(folder)
        self._stored = dict(self.entries)
        method = quantisation_method(settings)
        try:
            if method not in METHODS:
                raise ValueError("it is not read")
            self._packed = dict(METHODS[method](self, settings))
            for packed in self._packed.values():
                for part in packed.parts.values():
                    self.shape(part)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"{folder}: quantised with {method}: {_why(error)}; make an unquantised model of "
                f"it with {TOOLS.get(method, 'the library that quantised it')}, or give the model "
                "that it was made from"
            ) from error
        for packed in self._packed.values():
            for part in (*packed.parts.values(), *packed.known):
                self.entries.pop(part, None)
        for name in [name for name in self.entries if name.endswith(ACTIVATIONS)]:
            del self.entries[name]
        for name, packed in self._packed.items():
            file = self._stored[next(iter(packed.parts.values()))].file
            size = math.prod(packed.shape) * DTYPES[WRITTEN].itemsize
            self.entries[name] = Entry(file, WRITTEN, packed.shape, 0, size)
        self.check_floats()

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        packed = self._packed.get(name)
        if packed is None:
            return super().read(name, dtype, device)
        try:
            parts = {role: self.stored(part) for role, part in packed.parts.items()}
            weight = packed.weight(**parts)
            if weight.shape != packed.shape:
                raise ValueError(f"its parts make one of {tuple(weight.shape)}")
        except (ValueError, LookupError, RuntimeError, TypeError) as error:
            raise InputError(
                f"{self.folder}: the quantised weight {name} is damaged ({reason(error)}); copy or "
                "download the model again"
            ) from error
        return weight.to(device, dtype)

    def pieces(self, name: str, max_bytes: int) -> Iterator[Tensor]:
        if name not in self._packed:
            yield from super().pieces(name, max_bytes)
            return
        weight = self.read(name, DTYPES[WRITTEN], torch.device("cpu"))
        row = weight[:1].numel() * weight.element_size()
        yield from weight.split(max(1, max_bytes // max(1, row)))

    def leave_zero_biases(self, names: Iterable[str]) -> None:
        """Leave out biases of quantised weights that are zero and not in ``names``, the model's.

        Early releases of AutoGPTQ gave one to every module.
        """
        cpu = torch.device("cpu")
        for weight in self._packed:
            bias = weight.removesuffix("weight") + "bias"
            stray = bias in self.entries and bias not in names
            if stray and not self.read(bias, torch.float32, cpu).any():
                del self.entries[bias]

    def stored(self, name: str) -> Tensor:
        """The tensor ``name`` of the files as it is stored, on the CPU. ValueError as `shape`."""
        self.shape(name)
        return whole(self._stored[name])

    def shape(self, name: str, *kinds: str) -> tuple[int, ...]:
        """The shape of ``name`` in the files.

        ValueError unless it is there and of one of ``kinds``, or of any dtype of `shards`.
        """
        entry = self._stored.get(name)
        if entry is None:
            raise ValueError(f"{name} is missing")
        if entry.dtype not in (kinds or (*DTYPES, *PACKED)):
            raise ValueError(f"{name} is stored as {entry.dtype}")
        return entry.shape

    def modules(self, *ends: str) -> list[str]:
        """The modules that have a tensor of which the name ends so, without that end."""
        return [
            name.removesuffix(end) for end in ends for name in self._stored if name.endswith(end)
        ]

    def optional(self, **parts: str) -> dict[str, str]:
        """Those of ``parts`` that are in the files."""
        return {role: name for role, name in parts.items() if name in self._stored}


def open_shards(folder: Path, settings: Mapping[str, Any] | None) -> ShardReader:
    """The weights of ``folder``; ``settings`` are those of its quantisation, if it has one.

    Raises InputError where a weight cannot be read as a floating-point one.
    """
    if settings:
        return DequantisedShards(folder, settings)
    shards = ShardReader(folder)
    shards.check_floats()
    return shards


def unquantised(config: Any) -> Any:
    """``config``, changed to that of the weights `DequantisedShards` reads if it is quantised."""
    if quantisation(config):
        vars(config).pop("quantization_config")
        config.dtype = DTYPES[WRITTEN]
    return config


def _why(error: Exception) -> str:
    return f"its config has no {error}" if isinstance(error, KeyError) else str(error)


def _check_format(settings: Mapping[str, Any], keys: Iterable[str], known: Iterable[str]) -> str:
    """The format that one of ``keys`` names, the first of ``known`` if none does; ValueError."""
    known = tuple(known)
    named = next((str(settings[key]).lower() for key in keys if settings.get(key)), known[0])
    if named not in known:
        raise ValueError(f"the format {named} is not read")
    return named


def _gptq(shards: DequantisedShards, settings: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    kind = _check_format(settings, ("checkpoint_format", "format"), ("gptq", "gptq_v2"))
    if settings.get("is_marlin_format"):
        raise ValueError("the format marlin is not read")
    for module in shards.modules(".qweight"):
        rows, _ = shards.shape(f"{module}.qweight", "I32")
        _, words = shards.shape(f"{module}.qzeros", "I32")
        _, outputs = shards.shape(f"{module}.scales", *DTYPES)
        bits = WORD * words // outputs
        if bits not in BITS:
            raise ValueError(f"{bits} bits are not read")
        parts = _parts(module, words="qweight", zeros="qzeros", scales="scales")
        parts |= shards.optional(groups=f"{module}.g_idx")
        weight = partial(packing.gptq, bits=bits, less_one=kind == "gptq")
        yield f"{module}.weight", Packed((outputs, rows * WORD // bits), parts, weight)


def _awq(shards: DequantisedShards, settings: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    _check_format(settings, ("version", "format", "checkpoint_format"), ("gemm",))
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise ValueError(f"{bits} bits are not read")
    for module in shards.modules(".qweight"):
        inputs, _ = shards.shape(f"{module}.qweight", "I32")
        _, outputs = shards.shape(f"{module}.scales", *DTYPES)
        parts = _parts(module, words="qweight", zeros="qzeros", scales="scales")
        yield f"{module}.weight", Packed((outputs, inputs), parts, packing.awq)


def _float8(shards: DequantisedShards, settings: Mapping[str, Any]) -> Iterator[tuple[str, Packed]]:
    yield from _scaled(shards, settings.get("weight_block_size") or BLOCK, FLOAT8)


def _scaled(
    shards: DequantisedShards, block: Any, kinds: Iterable[str]
) -> Iterator[tuple[str, Packed]]:
    """Weights that are numbers of ``kinds`` with a scale beside them."""
    for module in shards.modules(".weight_scale", ".weight_scale_inv"):
        weight = f"{module}.weight"
        if not shards.optional(weight=weight):
            continue
        shape = shards.shape(weight, *kinds)
        scale = shards.optional(scale=f"{weight}_scale") or {"scale": f"{weight}_scale_inv"}
        shards.shape(scale["scale"], *DTYPES, "F8_E8M0")
        parts = {"values": weight, **scale, **shards.optional(zero=f"{weight}_zero_point")}
        parts |= shards.optional(groups=f"{weight}_g_idx")
        yield weight, Packed(shape, parts, partial(packing.scaled, block=block))


def _compressed(
    shards: DequantisedShards, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Packed]]:
    known = ("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    groups = settings["config_groups"].values()
    for each in (settings, *groups):
        _check_format(each, ("format",), (*known, "mixed-precision"))
    _check_format(settings.get("sparsity_config") or {}, ("format",), ("dense",))
    if settings.get("transform_config"):
        raise ValueError("weights that are transformed are not read")
    weights = [group["weights"] for group in groups if group.get("weights")]
    blocks = {tuple(each["block_structure"]) for each in weights if each.get("block_structure")}
    if len(blocks) > 1:
        raise ValueError("blocks of several sizes are not read")
    yield from _scaled(shards, next(iter(blocks), None), (*FLOAT8, "I8"))
    for module in shards.modules(".weight_packed"):
        rows, columns = (int(size) for size in shards.stored(f"{module}.weight_shape"))
        _, words = shards.shape(f"{module}.weight_packed", "I32")
        sizes = {each["num_bits"] for each in weights} & set(BITS)
        bits = next((size for size in sizes if -(-columns * size // WORD) == words), None)
        if bits is None:
            raise ValueError(f"the packing of {module} is not read")
        shards.shape(f"{module}.weight_scale", *DTYPES)
        parts = _parts(module, words="weight_packed", scale="weight_scale")
        parts |= shards.optional(
            zero=f"{module}.weight_zero_point", groups=f"{module}.weight_g_idx"
        )
        weight = partial(packing.pack_quantised, bits=bits, columns=columns)
        shape = (f"{module}.weight_shape",)
        yield f"{module}.weight", Packed((rows, columns), parts, weight, shape)


def _bitsandbytes(
    shards: DequantisedShards, settings: Mapping[str, Any]
) -> Iterator[tuple[str, Packed]]:
    for module in shards.modules(".SCB"):
        weight, layout = f"{module}.weight", f"{module}.weight_format"
        known = tuple(shards.optional(layout=layout).values())
        if any(shards.stored(name).any() for name in known):
            raise ValueError(f"the layout of {weight} is not read")
        parts = {"values": weight, "largest": f"{module}.SCB"}
        yield weight, Packed(shards.shape(weight, "I8"), parts, packing.rowwise, known)
    for end in (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"):
        for weight in shards.modules(end):
            yield weight, _four_bits(shards, weight, f"{weight}{end}")


def _four_bits(shards: DequantisedShards, weight: str, state: str) -> Packed:
    """The ``weight`` whose sizes lie in the tensor ``state``, as JSON."""
    described = json.loads(bytes(shards.stored(state).tolist()))
    parts = {"codes": weight, **_parts(weight, table="quant_map", largest="absmax")}
    nested = "nested_blocksize" in described
    if nested:
        parts |= _parts(weight, outer_table="nested_quant_map", outer_largest="nested_absmax")
    shape = tuple(described["shape"])
    make = partial(
        packing.four_bits,
        sizes=(described["blocksize"], described.get("nested_blocksize", 1)),
        offset=described["nested_offset"] if nested else 0.0,
        shape=shape,
    )
    return Packed(shape, parts, make, (state,))


def _parts(module: str, **names: str) -> dict[str, str]:
    return {role: f"{module}.{name}" for role, name in names.items()}


METHODS: dict[
    str, Callable[[DequantisedShards, Mapping[str, Any]], Iterator[tuple[str, Packed]]]
] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _float8,
    "fbgemm_fp8": _float8,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
}
"""What finds the quantised weights among the tensors of a folder, by the method's name."""
