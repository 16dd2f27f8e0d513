"""Every family goes through every command on a tiny random model."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from every_command import ABOUT, PAGE, header, row, take_through
from tiny import (
    EVERY_FAMILY,
    EVERY_KIND,
    MIXTURES,
    tiny_model,
    tiny_tokenizer,
    token_ids,
)
from tiny import FAMILIES as FAMILIES_OF_ENGINES
from transformers import AutoModelForCausalLM

from fastprune import ExportConfig, export
from fastprune.errors import InputError
from fastprune.models import modeling
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.families import (
    FAMILIES,
    block_parameters,
    decoder_layers,
    geometries,
    shared_norms,
    sublayers,
)
from fastprune.models.layers import Layers
from fastprune.models.load import load_model
from fastprune.pruning.masking import mask
from fastprune.pruning.plan import LayerPlan, Plan
from fastprune.pruning.planning import parameters_removed
from fastprune.pruning.sublayers import without
from fastprune.pruning.surgery import apply_plan
from fastprune.recover.lora import attach

IDS = token_ids(2, 24)
SMALL_ADAPTER = SimpleNamespace(lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_target_modules=())
SCALED = ("olmo2",)
"""Families whose query and key norms run over all heads: they change with the heads that go."""
FULL = ("stablelm",)
"""Families whose stock attention has heads that fill the hidden size."""


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def uneven(model: torch.nn.Module, *, groups: bool = True) -> Plan:
    """A plan by which layers differ, and one loses its attention, another its MLP."""
    kept = [((0, 2, 3), range(96)), ((1, 3), range(0, 96, 2)), ((), range(32)), ((0, 1, 2, 3), ())]
    if not groups:
        kept = [((0, 1, 2, 3) if heads else (), channels) for heads, channels in kept]
    layers = (
        LayerPlan(i, {"attention": heads, "mlp": tuple(channels)})
        for i, (heads, channels) in enumerate(kept)
    )
    return Plan(tuple(geometries(model)), tuple(layers))


def test_declarations_and_shipped_code_agree():
    assert FAMILIES.keys() == modeling.STOCK.keys() == {*EVERY_FAMILY, *MIXTURES}
    for name, family in FAMILIES.items():
        assert modeling.STOCK[name].norms == tuple(s.norms for s in family.sublayers)
        assert modeling.STOCK[name].layer == family.layer_class


@pytest.mark.parametrize("family", EVERY_KIND)
def test_every_parameter_of_a_layer_is_owned_shared_or_a_norm(family):
    model = tiny_model(family)
    layer = decoder_layers(model)[0]
    owned = {name for s in sublayers(layer) for name in s.owned}
    free = {name for name, _ in layer.named_parameters()} - owned
    assert all("norm" in name or name.endswith("bias") for name in free), free
    inside = sum(s.unit_cost(layer) * s.units for s in sublayers(layer))
    assert inside == sum(layer.get_parameter(name).numel() for name in owned)


@pytest.mark.parametrize("family", EVERY_KIND)
def test_adapters_are_beside_every_projection(family):
    adapted = attach(tiny_model(family), SMALL_ADAPTER)
    layer = adapted.get_base_model().model.layers[0]
    expected = {s.module for sublayer in sublayers(tiny_model(family).model.layers[0])
                for s in sublayer.slices}  # fmt: skip
    found = {
        name.partition(".lora_A")[0] for name, _ in layer.named_modules() if "lora_A.d" in name
    }
    assert found == expected


@pytest.mark.parametrize("family", EVERY_KIND)
def test_surgery_computes_what_masking_does(family):
    masked, cut = tiny_model(family), tiny_model(family)
    plan = uneven(cut, groups=family not in SCALED)
    mask(Layers(masked), plan, None)
    apply_plan(cut, plan)
    torch.testing.assert_close(logits(cut), logits(masked), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EVERY_KIND)
def test_sublayers_leave_with_their_norms(family):
    """A norm that both read goes with the second of them."""
    masked, cut = tiny_model(family), tiny_model(family)
    every = tuple(range(4)), tuple(range(96))
    kept = [every, ((), ()), ((), every[1]), (every[0], ())]
    layers = (LayerPlan(i, {"attention": a, "mlp": m}) for i, (a, m) in enumerate(kept))
    plan = Plan(tuple(geometries(cut)), tuple(layers))
    removed, before = parameters_removed(cut, plan), block_parameters(cut)
    mask(Layers(masked), plan, None)
    with ExitStack() as stack:
        dense = tiny_model(family)
        for layer, own in zip(decoder_layers(dense), plan.layers, strict=True):
            for sublayer in sublayers(layer):
                if not own.kept[sublayer.kind]:
                    stack.enter_context(without(layer, sublayer))
        torch.testing.assert_close(logits(dense), logits(masked), rtol=1e-4, atol=1e-4)
    apply_plan(cut, plan)
    torch.testing.assert_close(logits(cut), logits(masked), rtol=1e-4, atol=1e-4)
    assert before - block_parameters(cut) == removed
    assert not list(decoder_layers(cut)[1].parameters())
    whole = decoder_layers(cut)[0]
    assert not {name for s in sublayers(whole) for name in s.norms} & {*shared_norms(whole)}
    cut(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in cut.parameters())


@pytest.mark.parametrize("family", SCALED)
def test_norms_over_all_heads_are_cut_and_keep_their_scale(family):
    dense, cut = tiny_model(family), tiny_model(family)
    kept = tuple(LayerPlan(i, {"attention": (0, 1, 3), "mlp": tuple(range(96))}) for i in range(4))
    apply_plan(cut, Plan(tuple(geometries(cut)), kept))
    attention = cut.model.layers[0].self_attn
    assert len(attention.q_norm.weight) == 6 * 16 and len(attention.k_norm.weight) == 3 * 16
    x = torch.randn(200, 64)
    before, after = (m.model.layers[0].self_attn for m in (dense, cut))
    heads = torch.cat([torch.arange(0, 64), torch.arange(96, 128)])
    ratio = after.q_norm(after.q_proj(x)) / before.q_norm(before.q_proj(x))[:, heads]
    assert abs(ratio.median().item() - 1) < 0.1


@pytest.mark.parametrize("family", EVERY_KIND)
@pytest.mark.parametrize("alike", [True, False], ids=["uniform", "per-layer"])
def test_a_cut_model_is_read_again_by_transformers(family, alike, tmp_path):
    model = tiny_model(family)
    groups = (0, 1, 2, 3) if family.startswith(FULL) else (0, 2)
    same = (LayerPlan(i, {"attention": groups, "mlp": tuple(range(64))}) for i in range(4))
    plan = Plan(tuple(geometries(model)), tuple(same)) if alike else uneven(model)
    apply_plan(model, plan)
    save_checkpoint(model, None, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert ("fastprune" in type(again).__name__.lower()) is not alike
    torch.testing.assert_close(logits(again), logits(model))
    cached = again.generate(IDS, max_new_tokens=6, do_sample=False)
    plain = again.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", EVERY_KIND)
def test_zeros_fill_up_layers_or_the_form_is_refused(family, tmp_path):
    model = tiny_model(family)
    expected = uneven(model)
    apply_plan(model, expected)
    settings = ExportConfig(model="", format=("hf-uniform",), out=tmp_path / "out", quiet=True)
    if family in ("olmo2", "phi3"):
        with pytest.raises(InputError, match="cannot be filled up with zeros"):
            export(model, tiny_tokenizer(), settings)
        return
    export(model, tiny_tokenizer(), settings)  # reads it again and compares the logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "setting"), [("cohere", "use_qk_norm"), ("stablelm", "qk_layernorm")]
)
def test_settings_that_cannot_be_pruned_are_refused_and_yet_saved(family, setting, tmp_path):
    model = tiny_model(family, **{setting: True})
    with pytest.raises(InputError, match=f"{family} models with {setting} cannot be pruned"):
        geometries(model)
    save_checkpoint(model, None, tmp_path)  # as finetuning does
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("family", [f for f in EVERY_FAMILY if f not in FAMILIES_OF_ENGINES])
def test_the_form_of_llamas_alone_is_refused_by_family(family, tmp_path):
    settings = ExportConfig(model="", format=("nemotron-nas",), out=tmp_path / "out", quiet=True)
    with pytest.raises(InputError, match=family):
        export(tiny_model(family), tiny_tokenizer(), settings)


@pytest.mark.parametrize("family", [*EVERY_KIND, *MIXTURES])
def test_every_command_takes_the_family_as_the_page_says(family, tmp_path):
    statuses = take_through(family, tmp_path)
    refused = [title for title, status in statuses.items() if status == InputError.exit_status]
    without = ("export", "prune --stream") if family in MIXTURES else ("export",)
    assert all(title.startswith(without) for title in refused)
    assert set(statuses.values()) <= {0, InputError.exit_status}
    if family in FAMILIES:
        assert row(family, statuses) in PAGE.read_text(encoding="utf-8").splitlines()
    model, _ = load_model(str(tmp_path / ("merged" if family in MIXTURES else "streamed")))
    assert torch.isfinite(logits(model)).all()


def test_the_page_lists_all_families_and_commands():
    lines = PAGE.read_text(encoding="utf-8").removeprefix(ABOUT).lstrip().splitlines()
    assert "\n".join(lines[:2]) == header()
    assert [line.split("|")[1].strip(" `") for line in lines[2:]] == list(FAMILIES)
