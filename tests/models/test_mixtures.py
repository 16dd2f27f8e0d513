"""Mixtures of experts go through every command on tiny random models."""

from __future__ import annotations

import pytest
import torch
from tiny import MIXTURES, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.families import decoder_layers, geometries, sublayers
from fastprune.models.layers import Layers
from fastprune.pruning.masking import mask, preserved
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.surgery import apply_plan

IDS = token_ids(2, 24)
EVERY_CHANNEL = tuple(range(0, 32, 2)), tuple(range(1, 32, 2)), tuple(range(8, 24))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def walked(layers: Layers) -> torch.Tensor:
    """The logits of a model as its walk sees it, with experts that are absent on trial."""
    (final,) = layers.final([IDS], "logits")
    with torch.no_grad(), layers.headed() as head:
        return head(final)


def plan_for(model: torch.nn.Module, name: str) -> Plan:
    """A plan by which all layers lose the same of one kind, or each something else."""
    layers = []
    for index, size in enumerate(geometries(model)):
        groups, experts = (0, 1), tuple(range(size.experts))
        channels = () if size.experts else tuple(range(96))
        inside: tuple[tuple[int, ...], ...] = ()
        if name == "experts" and size.experts:
            experts = (0, 2, 3, 5)
        if name == "channels" and size.experts:
            inside = (*EVERY_CHANNEL, *EVERY_CHANNEL)
        if name == "groups":
            groups = (1,)
        if name == "mixed":
            groups = [(0, 1), (1,), (), (0,)][index]
            experts = experts and [(0, 2, 3), (), (1, 2, 4, 5), ()][index]
            channels = channels and tuple(range(40))
            inside = EVERY_CHANNEL if experts and index == 0 else ()
        kept = {"attention": groups, "experts": experts, "mlp": channels}
        layers.append(LayerPlan(index, kept, inside))
    return Plan(tuple(geometries(model)), tuple(layers))


@pytest.mark.parametrize("family", MIXTURES)
def test_every_parameter_of_a_layer_is_owned_shared_or_a_norm(family):
    for layer in decoder_layers(tiny_model(family)):
        parts = sublayers(layer)
        owned = {name for s in parts for name in s.owned}
        free = {name for name, _ in layer.named_parameters()} - owned
        assert all("norm" in n or n.endswith("bias") or "shared_expert" in n for n in free), free
        inside = sum(s.unit_cost(layer) * s.units for s in parts)
        assert inside == sum(layer.get_parameter(name).numel() for name in owned)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("name", ["experts", "channels", "mixed"])
def test_surgery_computes_what_masking_does(family, name):
    dense, cut = tiny_model(family), tiny_model(family)
    plan, layers, before = plan_for(dense, name), Layers(dense), logits(dense)
    if family == "olmoe":  # norms over all heads change with the heads that go
        kept = [{**own.kept, "attention": (0, 1)} for own in plan.layers]
        own = (LayerPlan(p.index, k, p.inside) for p, k in zip(plan.layers, kept, strict=True))
        plan = Plan(plan.geometries, tuple(own))
    with preserved(layers):
        mask(layers, plan, None)
        masked = walked(layers)
    apply_plan(cut, plan)
    assert [g.units for g in geometries(cut)] == [g.units for g in plan.result()]
    torch.testing.assert_close(logits(cut), masked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(masked, before, atol=1e-2)
    assert torch.equal(logits(dense), before)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("name", ["experts", "channels", "groups", "mixed"])
def test_a_cut_model_is_read_again_by_transformers(family, name, tmp_path):
    model = tiny_model(family)
    apply_plan(model, plan_for(model, name))
    save_checkpoint(model, None, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    per_layer = name == "mixed" or (family, name) == ("olmoe", "groups")
    assert ("fastprune" in type(again).__name__.lower()) is per_layer
    assert geometries(again) == geometries(model)
    torch.testing.assert_close(logits(again), logits(model))
    cached = again.generate(IDS, max_new_tokens=6, do_sample=False)
    plain = again.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
