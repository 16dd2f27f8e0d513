"""Blocks of quantised numbers to float32, by torch: bit for bit what gguf's own `dequantize` gives.

A block of 32 or 256 values holds one or two float16 numbers and small integers; what the integers
stand for is computed in float32, in gguf's order of operations. Types that are not here are rare,
and left to gguf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SCALES = 12
"""Bytes of the scales and minima of a block of 256 values in 4 or 5 bits."""


def q4_0(blocks: Tensor) -> Tensor:
    scale, packed = blocks.split((2, 16), dim=1)
    return _signed(_nibbles(packed), 8) * _half(scale)


def q4_1(blocks: Tensor) -> Tensor:
    scale, least, packed = blocks.split((2, 2, 16), dim=1)
    return (_nibbles(packed).float() * _half(scale)).add_(_half(least))


def q5_0(blocks: Tensor) -> Tensor:
    scale, fifth, packed = blocks.split((2, 4, 16), dim=1)
    return _signed(_nibbles(packed).add_(_fifth(fifth)), 16) * _half(scale)


def q5_1(blocks: Tensor) -> Tensor:
    scale, least, fifth, packed = blocks.split((2, 2, 4, 16), dim=1)
    values = _nibbles(packed).add_(_fifth(fifth)).float()
    return (values * _half(scale)).add_(_half(least))


def q8_0(blocks: Tensor) -> Tensor:
    scale, values = blocks.split((2, 32), dim=1)
    return values.view(torch.int8).float() * _half(scale)


def q4_k(blocks: Tensor) -> Tensor:
    head, packed = blocks.split((4 + SCALES, 128), dim=1)
    return _scaled(head, _shifted(packed, 32, (0, 4), 15))


def q5_k(blocks: Tensor) -> Tensor:
    head, fifth, packed = blocks.split((4 + SCALES, 32, 128), dim=1)
    high = _shifted(fifth, 32, range(8), 1).mul_(16)
    return _scaled(head, _shifted(packed, 32, (0, 4), 15).add_(high))


def q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, scale = blocks.split((128, 64, 16, 2), dim=1)
    values = _shifted(low, 64, (0, 4), 15).add_(_shifted(high, 32, (0, 2, 4, 6), 3).mul_(16))
    factors = scales.view(torch.int8).float() * _half(scale)
    return (_signed(values, 32).view(-1, 16, 16) * factors[:, :, None]).flatten(1)


BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    kind.__name__.upper(): kind for kind in (q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k)
}
"""By gguf's names of types: blocks (n, bytes) of uint8 to their values (n, 32 or 256)."""


def _half(two: Tensor) -> Tensor:
    return two.contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """The lower halves of the bytes (n, b), then the upper ones, (n, 2 b)."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _signed(values: Tensor, offset: int) -> Tensor:
    return values.view(torch.int8).sub_(offset).float()


def _shifted(packed: Tensor, run: int, shifts: range | tuple[int, ...], mask: int) -> Tensor:
    """Bits of the bytes (n, b): of each run of bytes the ones at each of `shifts` in turn."""
    runs = packed.unflatten(1, (-1, 1, run))
    places = torch.tensor(shifts, dtype=torch.uint8).view(-1, 1)
    return ((runs >> places) & mask).flatten(1)


def _fifth(bits: Tensor) -> Tensor:
    """The 32 bits in four bytes (n, 4), the lowest first, each as 0 or 16."""
    bytes_ = torch.arange(256, dtype=torch.uint8)[:, None]
    table = ((bytes_ >> torch.arange(8, dtype=torch.uint8)) & 1).mul_(16)
    return table.index_select(0, bits.flatten().int()).view(-1, 32)


def _scaled(head: Tensor, values: Tensor) -> Tensor:
    """`values` (n, 256) in runs of 32, each by a scale and a minimum of 6 bits in `head`."""
    scale, least, packed = head.split((2, 2, SCALES), dim=1)
    first, second, third = packed.split(4, dim=1)
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), dim=1)
    factors = scales.float() * _half(scale)
    offsets = minima.float() * _half(least)
    runs = values.view(-1, 8, 32).float().mul_(factors[:, :, None])
    return runs.sub_(offsets[:, :, None]).flatten(1)
