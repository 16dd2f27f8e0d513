"""Which layer of a teacher each layer of a pruned student came from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.sharding import whole


def align_layers(student: nn.Module, teacher: nn.Module) -> list[int]:
    """For each layer of the decoder `student`, in order, the layer of `teacher` it answers to.

    Layers that have lost sublayers still stand in their place, so equal numbers align one to one.
    Where whole layers are gone, the kept ones are recognised by their norms, which surgery leaves
    alone and recovery barely moves: of all ascending assignments, the one in which the norms differ
    least. Raises InputError when hidden sizes differ, or the student has more layers.
    """
    sizes = student.config.hidden_size, teacher.config.hidden_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"hidden states of {sizes[0]} and {sizes[1]} numbers cannot be compared; choose a "
            "teacher of the student's hidden size, or leave --distill-hidden-weight out"
        )
    ours, theirs = _layers(student), _layers(teacher)
    if len(ours) == len(theirs):
        return list(range(len(ours)))
    if len(ours) > len(theirs):
        raise InputError(
            f"the student has {len(ours)} layers, the teacher only {len(theirs)}; choose a teacher "
            "of at least as many layers, or leave --distill-hidden-weight out"
        )
    return _cheapest([[_distance(a, b) for b in theirs] for a in ours])


def _layers(decoder: nn.Module) -> list[dict[str, Tensor]]:
    """Per layer its vectors of hidden size (norms, biases) by name."""
    size = decoder.config.hidden_size
    stack = next((m for m in decoder.children() if isinstance(m, nn.ModuleList)), None)
    if stack is None:
        raise InputError(
            f"models of type '{decoder.config.model_type}' have no list of layers to compare; "
            "leave --distill-hidden-weight out"
        )
    return [
        {
            name: whole(p.detach()).float().cpu()
            for name, p in layer.named_parameters()
            if p.shape == (size,)
        }
        for layer in stack
    ]


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Mean relative distance of the vectors both layers have; 0 where they share none."""
    shared = [name for name in a if name in b]
    distances = [(a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12) for n in shared]
    return torch.stack(distances).mean().item() if distances else 0.0


def _cheapest(costs: list[list[float]]) -> list[int]:
    """Ascending columns, one for each row of `costs`, of least total cost; the first such."""
    rows, columns = len(costs), len(costs[0])
    # best[i][j]: the least cost of rows i.. in columns j..
    best = [[float("inf")] * (columns + 1) for _ in range(rows)] + [[0.0] * (columns + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            best[i][j] = min(costs[i][j] + best[i + 1][j + 1], best[i][j + 1])
    chosen, j = [], 0
    for i in range(rows):
        while costs[i][j] + best[i + 1][j + 1] > best[i][j]:
            j += 1
        chosen.append(j)
        j += 1
    return chosen
