"""What the matrix products of a decoder cost: operations, and bytes of device memory they touch.

Everything is a sum of products (m × k)·(k × n): 2·m·k·n floating-point operations, and each operand
and the result once through device memory. Elementwise work (norms, activations, rotary embedding,
softmax inside the attention kernel) is not counted: it is below 1 % of the operations, and a fused
kernel reads it on the way. Attention is counted over the full square, as the kernels' own formulas
do, though causal kernels skip about half. Units: operations, bytes, tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter

from torch import nn

from fastprune.models.families import attention_slices, decoder_layers, geometry, mlp_slices
from fastprune.models.forward import CHUNK_LOGITS

FP32 = 4
"""Bytes of a number in fp32."""


@dataclass(frozen=True)
class Cost:
    """What one process does in a stage."""

    flops: int = 0
    """floating-point operations of matrix products and Cholesky factors"""
    single: int = 0
    """those of them that are in fp32"""
    moved: int = 0
    """bytes of device memory read and written"""
    host: int = 0
    """bytes of hidden states copied between host and device"""
    read: int = 0
    """bytes of weights read from files"""
    reduced: int = 0
    """bytes that the process adds to the sums over all processes"""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_figures(self), _figures(other))))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(a * times for a in _figures(self)))


_figures = attrgetter(*(field.name for field in fields(Cost)))


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of ``costs``."""
    return sum(costs, Cost())


def product(m: int, k: int, n: int, item: int) -> Cost:
    """(m × k)·(k × n) of numbers of ``item`` bytes."""
    flops = 2 * m * k * n
    return Cost(flops, flops if item == FP32 else 0, (m * k + k * n + m * n) * item)


@dataclass(frozen=True)
class LayerShape:
    """The matrices of a decoder layer, (rows, columns) each, and its head counts.

    ``attention`` and ``mlp`` are empty where the sublayer is removed; their last matrix is the one
    whose columns units own (o_proj, down_proj).
    """

    attention: tuple[tuple[int, int], ...]
    mlp: tuple[tuple[int, int], ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    head_norms: bool
    parameters: int

    @staticmethod
    def of(layer: nn.Module) -> LayerShape:
        """The shape of ``layer``, which may be on the meta device."""

        def matrices(slices: list) -> tuple[tuple[int, int], ...]:
            return tuple(
                tuple(layer.get_parameter(s.name).shape) for s in slices if s.parameter == "weight"
            )

        sizes = geometry(layer)
        return LayerShape(
            attention=matrices(attention_slices(layer)),
            mlp=matrices(mlp_slices(layer)),
            query_heads=sizes.query_heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            head_norms=hasattr(layer.self_attn, "q_norm"),
            parameters=sum(p.numel() for p in layer.parameters()),
        )

    @property
    def query(self) -> int:
        """Width of the queries."""
        return self.query_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.mlp[-1][1] if self.mlp else 0

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        return self.attention + self.mlp


@dataclass(frozen=True)
class ModelShape:
    """What a causal language model's costs depend on."""

    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    parameters: int
    item: int
    """bytes of one weight"""
    tied: bool

    @staticmethod
    def of(model: nn.Module) -> ModelShape:
        """The shape of ``model``, which may be on the meta device."""
        head = model.get_output_embeddings().weight
        return ModelShape(
            layers=tuple(LayerShape.of(layer) for layer in decoder_layers(model)),
            hidden=head.shape[1],
            vocabulary=head.shape[0],
            parameters=sum(p.numel() for p in model.parameters()),
            item=head.element_size(),
            tied=bool(model.config.tie_word_embeddings),
        )

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.item

    @property
    def block_bytes(self) -> int:
        """Bytes of the decoder layers."""
        return sum(layer.parameters for layer in self.layers) * self.item

    @property
    def table_bytes(self) -> int:
        """Bytes of the embeddings, and of the head where it is separate."""
        return self.hidden * self.vocabulary * self.item

    def states(self, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens."""
        return tokens * self.hidden * self.item

    def logits(self, tokens: int) -> int:
        """Bytes of logits that stand at a time when so many tokens are predicted."""
        return min(tokens, self.chunk) * self.vocabulary * self.item

    @property
    def chunk(self) -> int:
        """Tokens whose logits are computed at a time."""
        return max(1, CHUNK_LOGITS // self.vocabulary)

    def head(self, tokens: int) -> Cost:
        """Logits of so many tokens, or the gradient of as many hidden states."""
        whole, rest = divmod(tokens, self.chunk)
        cost = product(self.chunk, self.hidden, self.vocabulary, self.item) * whole
        return cost + product(rest, self.hidden, self.vocabulary, self.item) if rest else cost

    def forward(self, layer: LayerShape, n: int, s: int) -> Cost:
        """One pass of ``layer`` over n windows of s tokens at once."""
        return self.to_attention_output(layer, n, s) + self.rest(layer, n, s)

    def to_attention_output(self, layer: LayerShape, n: int, s: int) -> Cost:
        """A pass that ends at the input of o_proj."""
        if not layer.attention:
            return Cost()
        core = Cost(
            *self._floating(4 * n * s * s * layer.query),
            moved=n * s * (2 * layer.query + 2 * layer.keys) * self.item
            + n * s * layer.query_heads * FP32,  # the normaliser of each row
        )
        return core + total(self._linear(m, n * s) for m in layer.attention[:-1])

    def rest(self, layer: LayerShape, n: int, s: int, *, down: bool = True) -> Cost:
        """A pass from there to the end, or to the input of down_proj."""
        matrices = layer.attention[-1:] + (layer.mlp if down else layer.mlp[:-1])
        return total(self._linear(m, n * s) for m in matrices)

    def backward(self, layer: LayerShape, s: int, *, first: bool) -> Cost:
        """Gradients of all weights and of the input for one window of s tokens.

        The ``first`` layer's input are embeddings, which need no gradient, so the matrices that
        read them give none either. The attention kernel
        computes its scores again, which makes five products of two.
        """
        cost = total(product(rows, s, columns, self.item) for rows, columns in layer.matrices)
        reached = len(layer.attention or layer.mlp) - 1 if first else 0
        inputs = layer.matrices[reached:]
        cost += total(product(s, rows, columns, self.item) for rows, columns in inputs)
        if layer.attention:
            cost += Cost(
                *self._floating(10 * s * s * layer.query),
                moved=s * (4 * layer.query + 4 * layer.keys) * self.item
                + s * layer.query_heads * FP32,
            )
        return cost

    def reduction(self, layer: LayerShape) -> Cost:
        """The `taylor` kernel over every weight and its gradient."""
        return Cost(moved=2 * self.item * sum(math.prod(m) for m in layer.matrices))

    def saved(self, layer: LayerShape, s: int) -> int:
        """Bytes that autograd keeps of one window of s tokens for the backward pass of ``layer``.

        The inputs of q, k, v and of gate, up; queries, keys, values, the output of attention and
        its normaliser; gate before and after the activation, up, their product; and in fp32 what
        each norm has read.
        """
        half = self.item * (self.hidden + 2 * layer.query + 2 * layer.keys)
        norm = FP32 * (self.hidden + 1)
        attention = half + norm + FP32 * layer.query_heads if layer.attention else 0
        if layer.head_norms and layer.attention:
            heads = layer.query_heads + layer.kv_heads
            attention += FP32 * heads * (layer.head_dim + 1)
        mlp = self.item * (self.hidden + 4 * layer.channels) + norm if layer.mlp else 0
        return s * (attention + mlp)

    def _floating(self, flops: int) -> tuple[int, int]:
        return flops, flops if self.item == FP32 else 0

    def _linear(self, matrix: tuple[int, int], tokens: int) -> Cost:
        rows, columns = matrix
        return product(tokens, columns, rows, self.item)
