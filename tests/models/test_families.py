"""Families as declarations: those of today, and one from outside of another structure."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from calibrated import calibrated
from counting import keeping
from tiny import FAMILIES, VOCABULARY, tiny_model, token_ids
from torch import Tensor, nn

from fastprune.models import families
from fastprune.models.families import (
    Declaration,
    Family,
    Geometry,
    block_parameters,
    decoder_layers,
    geometries,
    geometry,
    register_family,
    sublayers,
)
from fastprune.models.units import Slice
from fastprune.pruning.allocation import allocate
from fastprune.pruning.budget import layer_size
from fastprune.pruning.importance import score
from fastprune.pruning.plan import Plan, keep_all
from fastprune.pruning.planning import parameters_removed, plan_of
from fastprune.pruning.ranking import allocate_global
from fastprune.pruning.sizes import Limits, Removal, removed_parameters
from fastprune.pruning.surgery import apply_plan, cut_parameter, cut_units, kept_entries

HIDDEN, HEAD, GROUPS, QUERIES, CHANNELS = 24, 4, 3, 2, 20
FUSED = Family(
    "FusedLayer",
    (
        Declaration(
            "attention",
            "self_attn",
            norms=("post_attention_layernorm",),
            inputs=tuple(("self_attn.qkv_proj", w) for w in ("queries", "head", "head")),
            output=("self_attn.o_proj", "queries"),
            scales=(("self_attn.q_norm", "queries"), ("self_attn.k_norm", "head")),
        ),
        Declaration(
            "mlp",
            "mlp",
            norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
            inputs=tuple(("mlp.gate_up_proj", "channel") for _ in range(2)),
            output=("mlp.down_proj", "channel"),
        ),
    ),
    layers="decoder.blocks",
    embeddings="decoder.embed_tokens",
    norm="decoder.norm",
)
"""All projections fused, norms behind the sublayers, and norms over all heads."""
SHAPE = Geometry(GROUPS * QUERIES, GROUPS, CHANNELS, HEAD)


class Scale(nn.Module):
    """A learnt factor for each entry, where a norm over all heads has its weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class FusedAttention(nn.Module):
    head_dim = HEAD

    def __init__(self) -> None:
        super().__init__()
        queries, keys = GROUPS * QUERIES * HEAD, GROUPS * HEAD
        self.qkv_proj = nn.Linear(HIDDEN, queries + 2 * keys)
        self.q_norm, self.k_norm = Scale(queries), Scale(keys)
        self.o_proj = nn.Linear(queries, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        keys = len(self.k_norm.weight)
        q, k, v = self.qkv_proj(x).split([len(self.q_norm.weight), keys, keys], -1)
        q, k, v = (
            t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class FusedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(HIDDEN, 2 * CHANNELS, bias=False)
        self.down_proj = nn.Linear(CHANNELS, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(nn.functional.silu(gate) * up)


class FusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = FusedAttention(), FusedMLP()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN)
        self.pre_feedforward_layernorm = nn.RMSNorm(HIDDEN)
        self.post_feedforward_layernorm = nn.RMSNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class FusedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(FusedLayer() for _ in range(3))
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.embed_tokens(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(last_hidden_state=self.norm(hidden))


class FusedModel(nn.Module):
    """A causal language model as the library's are, as far as scores need one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="fused")
        self.decoder = self.base_model = FusedDecoder()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


@pytest.fixture
def model(monkeypatch) -> FusedModel:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setattr(families, "SUPPORTED", families.FAMILIES.keys())
    register_family("fused", FUSED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = FusedModel()
        for p in made.parameters():
            nn.init.normal_(p, mean=float(p.dim() == 1), std=0.5)
    return made.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.lm_head(model.decoder(token_ids(2, 9)).last_hidden_state)


def masked(model: FusedModel, plan: Plan) -> FusedModel:
    """The dense model with the output columns of removed units zeroed, by numbers of their own."""
    copied = copy.deepcopy(model)
    for block, kept in zip(copied.decoder.blocks, plan.layers, strict=True):
        for head in range(GROUPS * QUERIES):
            if head // QUERIES not in kept.kept["attention"]:
                block.self_attn.o_proj.weight.data[:, head * HEAD : (head + 1) * HEAD] = 0
        for channel in set(range(CHANNELS)) - {*kept.kept["mlp"]}:
            block.mlp.down_proj.weight.data[:, channel] = 0
    return copied


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("method", ["magnitude-l2", "taylor-first", "activation", "activation-maw"])
def test_a_family_from_outside_is_scored_planned_and_cut(model, method, allocation) -> None:
    scores = score(calibrated(model, token_ids(4, 9)), method)
    sizes = [layer_size(layer, ("attention", "mlp")) for layer in decoder_layers(model)]
    target = round(0.4 * sum(size.prunable for size in sizes))
    limits = Limits()
    if allocation == "uniform":
        removals = allocate(sizes, [1.0, 2.0, 1.0], target, limits)
    else:
        lists = [{kind: s.tolist() for kind, s in layer.items()} for layer in scores.layers]
        removals = allocate_global(sizes, lists, target, limits)
    removed = removed_parameters(sizes, removals)
    assert abs(removed - target) <= sizes[0].finest.cost / 2
    plan = plan_of(model, scores, removals)
    expected, before = logits(masked(model, plan)), block_parameters(model)
    cut_units(model, plan)
    # only the order of summation differs; logits are of order 10, fp32 has 1e-7 of that
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert geometries(model) == plan.result()
    assert before - block_parameters(model) == removed > 0


def test_what_a_unit_of_fused_projections_owns(model) -> None:
    layer = decoder_layers(model)[0]
    assert geometries(model) == [SHAPE] * 3
    attention, mlp = sublayers(layer)
    queries, keys = GROUPS * QUERIES * HEAD, GROUPS * HEAD
    weights = [s for s in attention.inputs if s.parameter == "weight"]
    assert [(s.offset, s.width) for s in weights] == [
        (0, QUERIES * HEAD),
        (queries, HEAD),
        (queries + keys, HEAD),
    ]
    assert [s.offset for s in mlp.inputs] == [0, CHANNELS]
    assert kept_entries(weights[2], (2,)).tolist() == [queries + keys + 8 + i for i in range(4)]
    rows = (QUERIES + 2) * HEAD
    assert attention.unit_cost(layer) == rows * (HIDDEN + 1) + 12 + QUERIES * HEAD * HIDDEN
    assert mlp.unit_cost(layer) == 3 * HIDDEN
    assert mlp.parameters(layer) == 3 * HIDDEN * CHANNELS + 2 * HIDDEN


def test_scores_of_fused_projections_are_those_of_their_parts(model) -> None:
    layer = decoder_layers(model)[1]
    found = score(calibrated(model, token_ids(2, 9)), "magnitude-l1").layers[1]
    attention, mlp = layer.double().self_attn, layer.mlp
    qkv = torch.cat([attention.qkv_proj.weight, attention.qkv_proj.bias[:, None]], 1).abs().sum(1)
    q, k, v = qkv.split([GROUPS * QUERIES * HEAD, GROUPS * HEAD, GROUPS * HEAD])
    expected = sum(t.view(GROUPS, -1).sum(1) for t in (q, k, v))
    expected = expected + attention.o_proj.weight.abs().sum(0).view(GROUPS, -1).sum(1)
    # the kernel adds up a row or a column in fp32, which has 1e-7
    torch.testing.assert_close(found["attention"], expected, rtol=1e-6, atol=0)
    rows = mlp.gate_up_proj.weight.abs().sum(1).view(2, -1).sum(0)
    columns = mlp.down_proj.weight.abs().sum(0)
    torch.testing.assert_close(found["mlp"], rows + columns, rtol=1e-6, atol=0)


def test_what_lies_outside_of_the_units_stays() -> None:
    """Here two rows in front of the units and one behind them."""
    s = Slice("x", "weight", 0, width=2, offset=2, units=3)
    parameter = torch.arange(9.0)[:, None]
    kept = cut_parameter(parameter, [s], (0, 2))
    assert kept.flatten().tolist() == [0, 1, 2, 3, 6, 7, 8]


def test_norms_over_all_heads_are_cut(model) -> None:
    before = decoder_layers(model)[0].self_attn.q_norm.weight.clone()
    plan = keep_all([SHAPE] * 3)
    plan = Plan(plan.geometries, (keeping(0, (2,), range(CHANNELS)), *plan.layers[1:]))
    layer = decoder_layers(model)[0]
    assert parameters_removed(model, plan) == 2 * sublayers(layer)[0].unit_cost(layer)
    cut_units(model, plan)
    attention = layer.self_attn
    assert torch.equal(attention.q_norm.weight, before[2 * QUERIES * HEAD :])
    assert len(attention.k_norm.weight) == HEAD


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_the_families_are_their_weights(family: str) -> None:
    """A layer loses with all units of a sublayer and with the sublayer what its parameters say."""
    model = tiny_model(family, layers=1)
    (layer,) = decoder_layers(model)
    parts = {s.kind: s for s in sublayers(layer)}
    assert [s.units for s in parts.values()] == [4, 96]
    for kind, module, norm in (
        ("attention", layer.self_attn, layer.input_layernorm),
        ("mlp", layer.mlp, layer.post_attention_layernorm),
    ):
        own = dict(module.named_parameters())
        stays = sum(p.numel() for name, p in own.items() if "norm" in name or name == "o_proj.bias")
        total = sum(p.numel() for p in own.values())
        assert parts[kind].units * parts[kind].unit_cost(layer) == total - stays
        assert parts[kind].parameters(layer) == total + norm.weight.numel()
    size = layer_size(layer, ("mlp", "sublayer"))
    assert size.sublayers["attention"].units == 0 and size.sublayers["attention"].whole > 0


def test_a_removed_sublayer_is_none() -> None:
    llama = tiny_model("llama")
    plan = keep_all(geometries(llama))
    cut = Plan(plan.geometries, (keeping(0, (), (1, 2)), *plan.layers[1:]))
    apply_plan(llama, cut)
    (left,) = sublayers(decoder_layers(llama)[0])
    assert (left.kind, left.units) == ("mlp", 2)
    size = layer_size(decoder_layers(llama)[0], ("attention", "mlp", "sublayer"))
    assert size.sublayers["attention"].units == size.sublayers["attention"].whole == 0
    assert removed_parameters([size], [Removal()]) == 0


def test_what_cannot_be_registered(model) -> None:
    with pytest.raises(ValueError, match="registered already"):
        register_family("llama", FUSED)
    with pytest.raises(ValueError, match="declares the sublayers"):
        register_family("half", Family("HalfLayer", FUSED.sublayers[:1]))


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        ({}, (0, 0, 0)),
        ({"self_attn.qkv_proj": (40, 24), "self_attn.o_proj": (24, 24)}, (6, 2, 0)),
        ({"self_attn.o_proj": (24, 24), "mlp.down_proj": (24, 20)}, (6, 0, 20)),
        ({"mlp.gate_up_proj": (40, 24), "mlp.down_proj": (24, 20)}, (0, 0, 20)),
    ],
)
def test_sizes_by_the_shapes_of_fused_weights(shapes, sizes) -> None:
    found = FUSED.geometry(lambda path: shapes.get(path, (0, 0)), HEAD)
    assert (found.query_heads, found.kv_heads, found.channels) == sizes


def test_an_mlp_without_a_gate_has_one_input() -> None:
    mlp = Declaration("mlp", "mlp", ("norm",), (("fc1", "channel"),), ("fc2", "channel"))
    assert mlp.entries(lambda path: {"fc1": (20, 24), "fc2": (24, 20)}[path]) == {"channel": 20}


class OtherLayer(nn.Module):
    """A decoder layer that no family declares."""

    def __init__(self, *projections: str) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.head_dim = HEAD
        for name in projections:
            module = self.mlp if name == "down_proj" else self.self_attn
            heads = 3 if name in ("k_proj", "v_proj") else 6
            rows = {"down_proj": 8, "o_proj": 8}.get(name, heads * HEAD)
            module.add_module(name, nn.Linear(24 if rows == 8 else 8, rows))


def test_an_undeclared_layer_is_read_by_the_names_of_llama() -> None:
    """The fingerprints of bases of adapters hold such sizes, of any family."""
    layer = OtherLayer("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    assert geometry(layer) == Geometry(6, 3, 24, HEAD)
    assert geometry(OtherLayer("qkv_proj", "o_proj", "down_proj")) == Geometry(0, 0, 24, HEAD)
