"""LoRA on uniform and per-layer models: training, adapters on disk, and their own base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import cut, logits, per_layer_model, saved, settings, trained, training_loss
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, compute_activations_twice, tiny_model, tiny_tokenizer, token_ids

from fastprune.errors import InputError
from fastprune.models.adapter import BASE_FILE, Fingerprint
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.conform import conform
from fastprune.models.families import geometries
from fastprune.models.load import load_model
from fastprune.precision import convert_weights
from fastprune.recover.lora import TARGETS, attach, load_adapter, save_adapter
from fastprune.recover.loss import next_token_loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_trains_on_a_per_layer_model(family, checkpointing):
    model = per_layer_model(family)
    before = logits(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = attach(model, settings()).train()
    if checkpointing:
        compute_activations_twice(adapted)
    assert torch.equal(logits(adapted), before)  # it starts as no change at all
    first = training_loss(adapted)
    first.backward()
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        # B is zero at first, so that A has a gradient of zero
        assert (parameter.grad is not None) == parameter.requires_grad
        if ".lora_B" in name:
            assert parameter.grad.any(), name
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    assert training_loss(adapted) < first
    for name, parameter in adapted.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if ".lora_" not in name:
            assert torch.equal(parameter, frozen[plain])


def test_every_projection_that_is_left_is_adapted():
    adapted = attach(per_layer_model(), settings())
    found = {
        name.split(".lora_A.")[0] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    expected = {
        f"base_model.model.model.layers.{index}.{part}.{name}"
        for index in range(4)
        for part, name in [
            *(("self_attn", t) for t in TARGETS[:4] if index != 1),
            *(("mlp", t) for t in TARGETS[4:] if index != 3),
        ]
    }
    assert found == expected


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_merged_weight(checkpointing):
    """The adapter's gradient follows from that of the full weight: dL/dB = s · dL/dW · Aᵀ."""
    adapted = trained(per_layer_model())
    adapted.zero_grad()
    if checkpointing:
        compute_activations_twice(adapted)
    training_loss(adapted.train()).backward()
    low_rank = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    a = {name: p.detach() for name, p in adapted.named_parameters() if ".lora_A" in name}
    merged = adapted.merge_and_unload().requires_grad_(True)
    ids = token_ids()
    hidden = merged.model(input_ids=ids, use_cache=False).last_hidden_state
    next_token_loss(hidden, merged.lm_head, ids).backward()
    for name, matrix in a.items():
        path = name.removeprefix("base_model.model.").split(".lora_A")[0]
        full = merged.get_submodule(path).weight.grad
        expected = (8 / 4) * full @ matrix.T
        ours = low_rank[name.replace("lora_A", "lora_B")]
        # the same fp32 products in another order
        torch.testing.assert_close(ours, expected, atol=1e-4 * expected.abs().max(), rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_casts_that_change_nothing_are_left_out(checkpointing):
    """Under autocast outputs of attention and MLP are bf16, and stay so on their way to adapters:
    the gradients are those with peft's cast to fp32 between, bit for bit."""
    adapted = trained(per_layer_model()).train()
    layers = [m for m in adapted.modules() if hasattr(m, "cast_input_dtype_enabled")]
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
    if checkpointing:
        compute_activations_twice(adapted)

    def gradients():
        adapted.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            training_loss(adapted).backward()
        return [p.grad.clone() for p in adapted.parameters() if p.requires_grad]

    ours = gradients()
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    assert all(map(torch.equal, ours, gradients()))


@pytest.mark.parametrize(
    ("dtype", "dropout"), [(torch.bfloat16, 0.0), (torch.float32, 0.05)], ids=str
)
def test_casts_that_matter_stay(dtype, dropout):
    model = per_layer_model()
    convert_weights(model, dtype)
    adapted = attach(model, settings(lora_dropout=dropout))
    assert all(m.cast_input_dtype_enabled for m in adapted.modules() if hasattr(m, "lora_A"))
    assert logits(adapted).isfinite().all()


# ---------------------------------------------------------------- adapters on disk


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_adapter_computes_the_same(tmp_path, family):
    base, adapter, expected = saved(tmp_path, per_layer_model(family))
    model, _ = load_model(base)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(load_adapter(model, adapter)), expected)
    by_name, _ = load_model(base, adapter=adapter)
    assert torch.equal(logits(by_name), expected)


def test_plain_peft_reads_it(trained_adapter):
    from peft import PeftModel

    base, adapter, expected = trained_adapter
    with pytest.warns(FutureWarning):  # peft 0.21 reads a property that transformers has renamed
        model = PeftModel.from_pretrained(load_model(base)[0], str(adapter))
    assert torch.equal(logits(model), expected)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert sorted(f.name for f in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        BASE_FILE,
    ]


def wrong_bases():
    finer = per_layer_model()
    finer.model.layers[2].mlp.down_proj.weight.data *= 1 + 1e-6  # a single step of training
    other = per_layer_model(seed=1)
    dense = tiny_model("llama")
    shorter = tiny_model("llama", layers=2)
    thinner = per_layer_model()
    cut(thinner.model.layers[2].mlp, ("gate_proj", "up_proj"), "down_proj", 49)
    conform(thinner, geometries(thinner))
    return {
        "finetuned": (finer, "its weights are not the base's"),
        "other weights": (other, "its weights are not the base's"),
        "dense": (dense, "layer 0 has 96 channels, the base's 32"),
        "shorter": (shorter, "it has 2 layers, the base 4"),
        "thinner": (thinner, "layer 2 has 49 channels, the base's 50"),
        "other vocabulary": (per_layer_model(vocab_size=310), "parameters, the base"),
        "other family": (per_layer_model("qwen2"), "parameters, the base"),
    }


@pytest.fixture(scope="module")
def trained_adapter(tmp_path_factory):
    """As `saved`; not to be changed."""
    return saved(tmp_path_factory.mktemp("trained"))


WRONG = wrong_bases()


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_base_is_refused(trained_adapter, kind):
    base, adapter, _ = trained_adapter
    model, message = WRONG[kind]
    with pytest.raises(InputError, match=message) as error:
        load_adapter(model, adapter)
    assert str(base) in str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_base_is_recognised_at_half_precision(trained_adapter, dtype, caplog):
    base, adapter, expected = trained_adapter
    model, _ = load_model(base, dtype=dtype)
    found = logits(load_adapter(model, adapter))
    # weights and products of 8 (bf16) or 11 (fp16) bits, through four layers
    tolerance = 5e-2 if dtype == "bfloat16" else 5e-3
    assert (found.float() - expected).norm() < tolerance * expected.norm()
    assert not [record for record in caplog.records if record.name == "fastprune"]
    with pytest.raises(InputError, match="not the base's"):
        load_adapter(per_layer_model(seed=1).to(model.dtype), adapter)


def test_a_base_at_the_other_half_precision_cannot_be_proved(tmp_path, caplog):
    base = tmp_path / "base"
    save_checkpoint(per_layer_model(), tiny_tokenizer(), base)
    model, _ = load_model(base, dtype="float16")
    save_adapter(attach(model, settings()), tmp_path / "adapter", str(base))
    load_model(base, dtype="bfloat16", adapter=tmp_path / "adapter")
    assert "only sizes could be compared" in caplog.text


def test_the_fingerprint_is_that_of_the_base_alone():
    model = per_layer_model()
    before = Fingerprint.of(model)
    assert Fingerprint.of(trained(model)) == before
    assert before.layers == [[8, 4, 32], [0, 0, 64], [4, 2, 50], [8, 4, 0]]


# ---------------------------------------------------------------- adapters of plain peft


@pytest.fixture
def plain_adapter(tmp_path, trained_adapter):
    """An adapter as peft alone writes it: no fingerprint."""
    base, whole, expected = trained_adapter
    adapter = Path(shutil.copytree(whole, tmp_path / "adapter"))
    (adapter / BASE_FILE).unlink()
    return base, adapter, expected


def test_without_a_fingerprint_it_is_used_with_a_warning(plain_adapter, caplog):
    base, adapter, expected = plain_adapter
    assert torch.equal(logits(load_adapter(load_model(base)[0], adapter)), expected)
    assert "without a fingerprint" in caplog.text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_model("llama"), "layers.0.mlp.down_proj of 32 inputs; this model's has 96"),
        (
            lambda: tiny_model("llama", layers=1, intermediate_size=32),
            "layers.1.mlp.* does not have",
        ),
    ],
)
def test_without_a_fingerprint_its_tensors_must_fit(plain_adapter, other, message):
    _, adapter, _ = plain_adapter
    with pytest.raises(InputError, match=message):
        load_adapter(other(), adapter)


def test_a_model_that_the_adapter_covers_only_in_part_is_refused(tmp_path):
    _, adapter, _ = saved(tmp_path, tiny_model("llama"))
    (adapter / BASE_FILE).unlink()
    with pytest.raises(InputError, match="does not cover this model"):
        load_adapter(tiny_model("llama", layers=6), adapter)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 0}, "--lora-r"),
        ({"lora_alpha": 0.0}, "--lora-alpha"),
        ({"lora_dropout": 1.0}, "--lora-dropout"),
        ({"lora_target_modules": ("q_proj", "nope")}, "no linear module named nope .*it has down"),
        ({"lora_target_modules": ("lm_head",)}, "lm_head"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(InputError, match=message):
        attach(tiny_model("llama"), settings(**changes))


@pytest.mark.parametrize("names", [("q", "v"), ("q_proj", "v_proj")])
def test_named_modules_alone_are_adapted(names):
    adapted = attach(tiny_model("llama"), settings(lora_target_modules=names))
    found = {
        n.split(".lora_A.")[0].rpartition(".")[2]
        for n, _ in adapted.named_parameters()
        if "lora_A" in n
    }
    assert found == {"q_proj", "v_proj"}


def test_all_linear_leaves_the_output_layer_alone():
    adapted = attach(tiny_model("llama"), settings(lora_target_modules=("all-linear",)))
    training_loss(adapted).backward()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "broken adapter config"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "a IA3 adapter"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "no weights"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"xx"), "cannot be read"),
        (lambda d: (d / BASE_FILE).write_text("[]"), "broken"),
    ],
)
def test_damaged_adapters(tmp_path, trained_adapter, damage, message):
    base, whole, _ = trained_adapter
    adapter = Path(shutil.copytree(whole, tmp_path / "adapter"))
    damage(adapter)
    with pytest.raises(InputError, match=message):
        load_adapter(load_model(base)[0], adapter)


def test_an_adapter_that_lost_a_tensor_is_refused(tmp_path, trained_adapter):
    base, whole, _ = trained_adapter
    adapter = Path(shutil.copytree(whole, tmp_path / "adapter"))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"does not cover this model \(1 tensors"):
        load_adapter(load_model(base)[0], adapter)


def test_a_folder_is_a_model_or_an_adapter(trained_adapter):
    base, adapter, _ = trained_adapter
    with pytest.raises(InputError, match="not an adapter folder"):
        load_model(base, adapter=base)
    with pytest.raises(InputError, match=f"fastprune merge MODEL --adapter {adapter}"):
        load_model(adapter)
