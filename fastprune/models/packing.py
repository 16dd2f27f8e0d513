"""What the numbers of quantised checkpoints stand for: integers and scales to float32.

Each function takes the tensors of one weight as they are stored and gives the weight (out, in);
every product is of float32 factors and rounded once. Formats as their libraries document them:

- GPTQ (https://github.com/ModelCloud/GPTQModel), AWQ (https://github.com/casper-hansen/AutoAWQ):
  scale · (integer − zero point), one of each for a group of inputs and an output;
- compressed-tensors (https://github.com/vllm-project/compressed-tensors), FP8: scale · number, a
  scale for the tensor, a row, a group in a row, or a block;
- bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes): a table's entry times the
  largest absolute value of a block of 4-bit numbers, or row · integer / 127.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 32
"""Bits of the integers that others are packed in."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""At which place in its word of eight numbers AWQ puts each of eight neighbouring columns."""
INT8 = 1 / 127
"""Of bitsandbytes, which stores the largest absolute value of a row as 127."""


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The unsigned numbers of `bits` bits in int32 `words` (r, w), the lowest bits first.

    Returns int32 (r, w · 32 / bits).
    """
    places = torch.arange(0, WORD, bits, dtype=torch.int32)
    return ((words[:, :, None] >> places) & (2**bits - 1)).flatten(1)


def gptq(
    words: Tensor,
    zeros: Tensor,
    scales: Tensor,
    groups: Tensor | None = None,
    *,
    bits: int,
    less_one: bool,
) -> Tensor:
    """Of GPTQ: `words` (in · bits / 32, out), `zeros` (g, out · bits / 32), `scales` (g, out).

    `groups` (in,) says of which group each input is; without it neighbours share one. `less_one`:
    zero points are stored less one, modulo 2^bits, as in GPTQ's first format.
    """
    values = unpacked(words.T.contiguous(), bits)
    zero = unpacked(zeros, bits)[:, : scales.shape[1]]
    zero = (zero + 1) & (2**bits - 1) if less_one else zero
    return scaled(values, scales.T, zero=zero.T, groups=groups)


def awq(words: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """Of AWQ in 4 bits: `words` (in, out / 8), `zeros` (g, out / 8), `scales` (g, out)."""
    order = torch.tensor(AWQ_ORDER)
    values, zero = (
        unpacked(packed, 4).unflatten(1, (-1, 8))[:, :, order].flatten(1)
        for packed in (words, zeros)
    )
    return scaled(values.T, scales.T, zero=zero.T)


def pack_quantised(
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    bits: int,
    columns: int,
) -> Tensor:
    """Of compressed-tensors: `words` (out, in · bits / 32), `scale` (out, g) or (out, 1).

    `zero` (out · bits / 32, g) is packed along the other dimension; `columns` is how many inputs
    there are. Integers are stored with 2^(bits − 1) added, which `zero` has too.
    """
    values, offset = unpacked(words, bits)[:, :columns], torch.tensor(2 ** (bits - 1))
    if zero is not None:
        offset = unpacked(zero.T.contiguous(), bits).T[: len(words)]
    return scaled(values, scale, zero=offset, groups=groups)


def scaled(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    block: Sequence[int] | None = None,
) -> Tensor:
    """`values` (out, in) less `zero`, times `scale`, both of one of these shapes.

    One number; (out,) or (out, 1); (out, g) for g groups of equally many neighbouring inputs, or of
    those that `groups` (in,) names; or one number for each `block` (rows, columns), where the last
    ones may be cut off. Raises ValueError for any other shape.
    """

    def spread(each: Tensor) -> Tensor:
        return _spread(each.float(), values.shape, block, groups)

    result = values.float()
    if zero is not None:
        result = result - spread(zero)
    return result * spread(scale)


def _spread(
    scale: Tensor, shape: Sequence[int], block: Sequence[int] | None, groups: Tensor | None
) -> Tensor:
    """`scale` as something that goes with values of `shape` number by number."""
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1 and len(scale) == rows:
        return scale[:, None]
    if scale.ndim == 2 and len(scale) == rows:
        if groups is not None:
            return scale[:, groups.long()]
        if columns % scale.shape[1] == 0:
            return scale.repeat_interleave(columns // scale.shape[1], 1)
    if scale.ndim == 2 and block and scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
        high = scale.repeat_interleave(block[0], 0)[:rows]
        return high.repeat_interleave(block[1], 1)[:, :columns]
    raise ValueError(
        f"scales of the shape {tuple(scale.shape)} do not go with a weight of {tuple(shape)}"
    )


def four_bits(
    codes: Tensor,
    table: Tensor,
    largest: Tensor,
    outer_table: Tensor | None = None,
    outer_largest: Tensor | None = None,
    *,
    sizes: Sequence[int],
    offset: float,
    shape: Sequence[int],
) -> Tensor:
    """Of bitsandbytes in 4 bits: entries of `table` times the `largest` value of their block.

    Two numbers lie in a byte of `codes`, the upper half first; `largest` plus `offset` is what
    counts. With an outer table it is stored as 8-bit numbers of blocks itself. `sizes` are numbers
    in a block, and blocks in an outer one.
    """
    codes = codes.flatten().view(torch.uint8)
    codes = torch.stack((codes >> 4, codes & 15), dim=1).flatten()
    if outer_table is not None and outer_largest is not None:
        largest = _blockwise(largest, outer_table, outer_largest, sizes[1])
    count = torch.Size(shape).numel()
    return _blockwise(codes[:count], table, largest.float() + offset, sizes[0]).reshape(*shape)


def _blockwise(codes: Tensor, table: Tensor, largest: Tensor, size: int) -> Tensor:
    """Entries of `table` by `codes` (n,), times the `largest` of their block of `size` numbers."""
    factors = largest.float().repeat_interleave(size)[: len(codes)]
    return table.float()[codes.int()] * factors


def rowwise(values: Tensor, largest: Tensor) -> Tensor:
    """Of bitsandbytes in 8 bits: int8 `values` (out, in) that reach the `largest` (out,) at 127."""
    return values.float() * largest.float()[:, None] * INT8
