"""`fastprune merge`: merged equals unmerged, and what does not is not written."""

import copy
import json

import pytest
import torch
from adapters import logits, per_layer_model, saved, settings, trained
from safetensors.torch import load_file, save_file
from tiny import saved as saved_model
from tiny import tiny_gpt2, tiny_model, tiny_t5, token_ids

from fastprune.errors import InputError, NumericalError
from fastprune.models.adapter import BASE_FILE, fold
from fastprune.models.families import geometries
from fastprune.models.load import load_model
from fastprune.recover import merge
from fastprune.recover.lora import attach, save_adapter
from fastprune.recover.merge import TOLERANCES, MergeConfig, merge_adapter, run_merge


def config(base, adapter, out, **changes):
    return MergeConfig(model=str(base), adapter=adapter, out=out, **changes)


@pytest.mark.parametrize("model", [per_layer_model, lambda: tiny_model("qwen3")])
def test_the_merged_checkpoint_computes_what_the_adapter_did(tmp_path, model):
    base, adapter, expected = saved(tmp_path, model())
    metrics = run_merge(config(base, adapter, tmp_path / "out"))
    merged, _ = load_model(tmp_path / "out")
    assert geometries(merged) == geometries(load_model(base)[0])
    # the same fp32 terms in another order; logits are of order 10
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(merged), logits(load_model(base)[0]), atol=1e-2)
    (agreement,) = metrics["agreement"]
    assert agreement["dtype"] == metrics["dtype"] == "float32"
    assert 0 < agreement["relative_error"] < agreement["tolerance"]
    assert agreement["tokens"] == 2 * 128
    assert metrics["base_proven"]
    written = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())
    assert written["agreement"] == metrics["agreement"]
    assert {"load", "merge", "verify", "save", "total"} <= written["seconds"].keys()
    assert "merged in float32" in (tmp_path / "out/fastprune/run.log").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_added_in_fp32(tmp_path, dtype):
    half = getattr(torch, dtype)
    base, adapter, _ = saved(tmp_path, per_layer_model().to(half))
    metrics = run_merge(config(base, adapter, tmp_path / "out"))
    merged, _ = load_model(tmp_path / "out")
    assert merged.dtype == half
    exact, rounded = metrics["agreement"]
    assert (exact["dtype"], rounded["dtype"]) == ("float32", dtype)
    assert exact["relative_error"] < rounded["relative_error"] < rounded["tolerance"]
    adapted, _ = load_model(base, adapter=adapter)
    whole = adapted.float().merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name).to(half)), name


@pytest.mark.parametrize("strength", [0.5, 1.5])
def test_a_part_of_the_adapter(tmp_path, strength):
    base, adapter, _ = saved(tmp_path)
    metrics = run_merge(config(base, adapter, tmp_path / "out", strength=strength))
    assert metrics["settings"]["strength"] == strength
    ends = [dict(load_model(base)[0].named_parameters())]
    ends.append(dict(load_model(base, adapter=adapter)[0].merge_and_unload().named_parameters()))
    moved = 0
    for name, parameter in load_model(tmp_path / "out")[0].named_parameters():
        before, after = (end[name] for end in ends)
        moved += not torch.equal(before, after)
        torch.testing.assert_close(parameter, before.lerp(after, strength), atol=1e-6, rtol=1e-5)
    assert moved


@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf")])
def test_a_strength_out_of_range_is_refused(tmp_path, strength):
    with pytest.raises(InputError, match="--strength"):
        run_merge(config(tmp_path, tmp_path, tmp_path / "out", strength=strength))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_plain_peft_is_merged_with_a_warning(tmp_path, caplog):
    base, adapter, expected = saved(tmp_path)
    (adapter / BASE_FILE).unlink()
    metrics = run_merge(config(base, adapter, tmp_path / "out"))
    assert not metrics["base_proven"]
    assert "without a fingerprint" in caplog.text
    torch.testing.assert_close(
        logits(load_model(tmp_path / "out")[0]), expected, atol=1e-4, rtol=1e-4
    )


def test_a_wrong_merge_is_noticed(tmp_path, monkeypatch):
    """One merged weight matrix that is off by a hundredth is more than rounding explains."""
    base, adapter, _ = saved(tmp_path)

    def off(adapted):
        model = fold(adapted)
        model.model.layers[2].mlp.down_proj.weight.data *= 1.01
        return model

    monkeypatch.setattr(merge, "fold", off)
    with pytest.raises(NumericalError, match="more than rounding"):
        run_merge(config(base, adapter, tmp_path / "out"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_merged(tmp_path, value):
    base, adapter, _ = saved(tmp_path)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        run_merge(config(base, adapter, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory():
    model = per_layer_model()
    before = logits(model)
    adapted = trained(model)
    expected = logits(adapted)
    merged, (agreement,) = merge_adapter(adapted, token_ids())
    assert merged is model
    assert not any(".lora_" in name for name, _ in merged.named_parameters())
    assert agreement.relative_error < TOLERANCES[torch.float32]
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(merged), before, atol=1e-2)


def test_folding_half_precision_weights_loses_no_more_than_their_rounding():
    model = per_layer_model().to(torch.bfloat16)
    adapted = trained(model)
    exact = copy.deepcopy(adapted).float().merge_and_unload()
    assert fold(adapted) is model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).to(torch.bfloat16)), name


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_t5])
def test_other_families(tmp_path, make):
    """GPT-2 keeps its weights transposed, T5 has an encoder; every linear layer is adapted."""
    base = saved_model(tmp_path / "base", make())
    adapted = attach(load_model(base)[0], settings()).train()
    ids = token_ids()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    adapted.eval()
    save_adapter(adapted, tmp_path / "adapter", str(base))
    metrics = run_merge(config(base, tmp_path / "adapter", tmp_path / "out"))
    assert metrics["base_proven"]
    merged, _ = load_model(tmp_path / "out")
    with torch.no_grad():
        ours, expected = (m(input_ids=ids, labels=ids).logits for m in (merged, adapted))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="was trained on"):
        load_model(saved_model(tmp_path / "other", make(seed=1)), adapter=tmp_path / "adapter")


def test_an_existing_folder_is_left_alone(tmp_path):
    base, adapter, _ = saved(tmp_path)
    with pytest.raises(InputError, match="is what the run reads"):
        run_merge(config(base, adapter, base))
