"""The tensors the kernel benchmarks run on."""

import torch
from torch import Tensor

# (out, in) of q, k, v, o, gate, up, down in one of SmolLM2-135M's 30 layers
SMOLLM2_LAYER = [
    (576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536),
]  # fmt: skip
SHAPES = {
    "4096x14336": [(4096, 14336)],
    "smollm2": SMOLLM2_LAYER * 30,
    "64M": [(8192, 8192)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def matrices(shape: str, dtype: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(DTYPES[dtype]) for s in SHAPES[shape]]


def size(tensors: list[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def read(tensors: list[Tensor]) -> None:
    """The limit of what only reads: BLAS's dot product, two streams of loads and nothing else."""
    for t in tensors:
        halves = t.view(-1).view(torch.float32).chunk(2)
        torch.dot(*halves)


def copy(tensors: list[Tensor], into: list[Tensor]) -> None:
    """The limit of what reads and writes, as a C library does it."""
    for t, result in zip(tensors, into):
        result.copy_(t)
