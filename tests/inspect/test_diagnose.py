"""`fastprune diagnose` on tiny checkpoints: sound, broken in every way, and pruned."""

import json
import math

import pytest
import torch
from counting import keeping
from tiny import FAMILIES, TEXT, tiny_checkpoint, tiny_gpt2, tiny_model, tiny_t5, tiny_tokenizer

from fastprune import cli
from fastprune.errors import InputError, NumericalError
from fastprune.inspect.diagnose import DiagnoseConfig, run_diagnose
from fastprune.inspect.health import check_weights
from fastprune.models.families import Geometry
from fastprune.models.load import load_config
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.pipeline import run_prune
from fastprune.pruning.plan import Plan


def saved(folder, change=lambda model: None, family="llama", model=None, **options):
    """A tiny checkpoint whose model was changed before it was saved."""
    model = model or tiny_model(family, **options)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def layer(model, index):
    return model.model.layers[index]


def diagnose(folder, **settings):
    return run_diagnose(DiagnoseConfig(model=str(folder), **settings))


def words(diagnosis, severity):
    return [f.what for f in diagnosis.findings if f.severity == severity]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 20)
    return str(file)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, text):
    """A dense tiny model, and what `prune` made of it."""
    folder = tmp_path_factory.mktemp("pruned")
    dense = tiny_checkpoint(folder / "dense")
    run_prune(
        PruneConfig(
            model=str(dense),
            out=folder / "out",
            ratio=0.3,
            importance="magnitude-l2",
            structures=("attention", "mlp"),
            allocation="uniform",
            compensate="none",
            layers="1:3",
            eval=text,
            eval_seq_len=32,
            eval_windows=4,
        )
    )
    return dense, folder / "out"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_model_of_every_family(tmp_path, family):
    model = saved(tmp_path / family, family=family)
    result = diagnose(model)
    assert result.verdict == "healthy"
    assert result.failure is None
    assert [(x.query_heads, x.kv_heads, x.ratio, x.channels) for x in result.layers] == [
        (8, 4, 2, 96)
    ] * 4
    assert not any(x.dead_heads or x.dead_channels for x in result.layers)
    assert result.forward.shape == (1, 32, 300)
    assert result.forward.min < result.forward.max
    assert len(result.forward.layers) == 4
    expected = tiny_model(family)
    total = result.to_dict()["params"]
    assert total["total"] == sum(p.numel() for p in expected.parameters())
    assert total["block"] == sum(p.numel() for p in expected.model.layers.parameters())


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_t5])
def test_models_that_are_not_pruned_are_looked_at_too(tmp_path, make, text):
    model = make()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "1" in n and p.ndim == 2)[0, 0] = math.nan
    result = diagnose(saved(tmp_path / "sound", model=make()), text=text, seq_len=32, windows=2)
    assert not any(finding.severity == "broken" for finding in result.findings[:-1])
    assert result.perplexity.windows == 2
    assert all(layer.ratio is None and layer.channels is None for layer in result.layers)
    assert len(result.forward.layers) == len(result.layers)
    spoilt = diagnose(saved(tmp_path / "spoilt", model=model))
    assert words(spoilt, "broken")[0].startswith("1 NaN in ")
    assert words(spoilt, "broken")[1].startswith("the output is not finite from ")


def test_weights_in_a_pt_file(tmp_path):
    file = tmp_path / "ckpt.pt"
    model = saved(tmp_path / "model")
    weights = tiny_model("llama").state_dict()
    weights["model.norm.weight"][0] = math.inf
    torch.save({"model": weights}, file)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    result = diagnose(file)
    assert words(result, "broken")[0] == "1 Inf in model.norm.weight"
    assert [layer.ratio for layer in result.layers] == [2] * 4


def test_without_forward_nothing_is_built(tmp_path, monkeypatch):
    model = saved(tmp_path / "model")

    def refuse(*_args, **_kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastprune.inspect.diagnose.load_model", refuse)
    result = diagnose(model, forward=False)
    assert result.forward is None
    assert result.verdict == "healthy"


def test_figures_of_a_tensor(tmp_path):
    model = saved(tmp_path / "model")
    name = "model.layers.2.mlp.up_proj.weight"
    weight = tiny_model("llama").get_parameter(name)
    found = next(t for t in diagnose(model, forward=False).tensors if t.name == name)
    assert (found.shape, found.dtype) == (tuple(weight.shape), "float32")
    assert found.scan.min == weight.min().item()
    assert found.scan.max == weight.max().item()
    # both sum in fp32 or wider, over 6,144 values: 1e-5 is a hundred roundings
    assert found.scan.mean == pytest.approx(weight.mean().item(), abs=1e-5)
    assert found.std == pytest.approx(weight.std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("value", "what"), [(math.nan, "2 NaN"), (math.inf, "2 Inf"), (-math.inf, "2 Inf")]
)
def test_values_that_are_not_finite(tmp_path, value, what):
    def spoil(model):
        layer(model, 1).mlp.down_proj.weight[3, 4] = value
        layer(model, 3).self_attn.q_proj.weight[0, 0] = value

    result = diagnose(saved(tmp_path / "model", spoil))
    assert result.verdict == "unhealthy"
    broken = words(result, "broken")
    places = "model.layers.1.mlp.down_proj.weight, model.layers.3.self_attn.q_proj.weight"
    assert broken[0] == f"{what} in {places}"
    assert broken[1] == "the output is not finite from model.layers.1.mlp.down_proj on"
    assert [x.finite for x in result.layers] == [True, False, True, False]
    assert isinstance(result.failure, NumericalError)


def test_activations_that_overflow(tmp_path):
    """Every weight is finite, and fp16 still overflows inside one layer."""

    def inflate(model):
        layer(model, 2).mlp.up_proj.weight.mul_(3e4)
        layer(model, 2).mlp.gate_proj.weight.mul_(100)
        model.half()

    result = diagnose(saved(tmp_path / "model", inflate))
    assert all(tensor.finite for tensor in result.tensors)
    assert result.verdict == "unhealthy"
    (told,) = words(result, "broken")
    assert told.startswith("it overflows in float16; use --dtype bfloat16 or float32 (in model.lay")
    assert "model.layers.2.mlp." in told


def test_constant_output(tmp_path):
    result = diagnose(saved(tmp_path / "model", lambda m: m.model.norm.weight.zero_()))
    assert "zero throughout: model.norm.weight" in words(result, "warning")
    assert words(result, "broken") == ["logits 1 × 32 × 300: all the same, 0"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dead_heads_and_channels(tmp_path, family):
    def kill(model):
        attention, mlp = layer(model, 1).self_attn, layer(model, 2).mlp
        attention.v_proj.weight[16:32] = 0  # KV head 1: query heads 2 and 3
        attention.o_proj.weight[:, 80:96] = 0  # query head 5
        mlp.gate_proj.weight[7] = 0
        mlp.up_proj.weight[[7, 8]] = 0
        mlp.down_proj.weight[:, 90] = 0
        if family == "qwen2":
            attention.v_proj.bias[16:32] = 0
            attention.v_proj.bias[0] = 0

    result = diagnose(saved(tmp_path / "model", kill, family))
    assert [x.dead_heads for x in result.layers] == [(), (2, 3, 5), (), ()]
    assert [x.dead_channels for x in result.layers] == [0, 0, 3, 0]
    assert result.verdict == "healthy"
    notes = words(result, "note")
    assert "3 dead heads, which add nothing, in model.layers.1" in notes
    assert "3 dead channels, which add nothing, in model.layers.2" in notes
    assert any("prune them away" in advice.text for advice in result.advice)


def test_a_bias_keeps_a_head_alive(tmp_path):
    def zero_rows(model):
        layer(model, 1).self_attn.v_proj.weight[16:32] = 0

    result = diagnose(saved(tmp_path / "model", zero_rows, "qwen2"))
    assert not any(x.dead_heads for x in result.layers)


def test_a_layer_that_is_all_dead(tmp_path):
    result = diagnose(saved(tmp_path / "m", lambda m: layer(m, 0).mlp.down_proj.weight.zero_()))
    assert "all channels are dead in model.layers.0" in words(result, "warning")
    assert "zero throughout: model.layers.0.mlp.down_proj.weight" in words(result, "warning")
    assert result.verdict == "careful"
    assert result.failure is None


def test_masks_large_values_and_outliers(tmp_path):
    def change(model):
        weights = layer(model, 0).mlp.up_proj.weight
        weights[:, :40] = 0
        layer(model, 1).mlp.up_proj.weight[0, 0] = 2e3
        far = layer(model, 3).mlp.up_proj.weight
        far.zero_().add_(1e-6)
        far.view(-1)[::50] = 1.0  # 2 % at 7 sigma of the whole

    warnings = words(diagnose(saved(tmp_path / "model", change), forward=False), "warning")
    assert warnings == [
        "more than half zeros: model.layers.0.mlp.up_proj.weight",
        "unusually large values, up to 2e+03: model.layers.1.mlp.up_proj.weight",
        "over 1.0 % beyond 6 sigma: model.layers.3.mlp.up_proj.weight",
    ]


def rewrite(folder, change):
    """Change the tensors in a checkpoint's file, whatever its config says."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


ATTENTION = "model.layers.2.self_attn"


def fewer_query_heads(tensors):
    tensors[f"{ATTENTION}.q_proj.weight"] = tensors[f"{ATTENTION}.q_proj.weight"][:64].clone()
    tensors[f"{ATTENTION}.o_proj.weight"] = tensors[f"{ATTENTION}.o_proj.weight"][:, :64].clone()


def fewer_kv_heads(tensors):
    for name in ("k_proj", "v_proj"):
        key = f"{ATTENTION}.{name}.weight"
        tensors[key] = tensors[key][:48].clone()


def half_a_head(tensors):
    for name in ("k_proj", "v_proj"):
        key = f"{ATTENTION}.{name}.weight"
        tensors[key] = tensors[key][:40].clone()


def other_values(tensors):
    key = f"{ATTENTION}.v_proj.weight"
    tensors[key] = tensors[key][:48].clone()


def fewer_channels(tensors):
    key = "model.layers.2.mlp.up_proj.weight"
    tensors[key] = tensors[key][:90].clone()


def no_key(tensors):
    del tensors[f"{ATTENTION}.k_proj.weight"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (fewer_query_heads, "1 query heads to a KV head; the model has 2"),
        (fewer_kv_heads, "8 query heads cannot share 3 KV heads evenly"),
        (half_a_head, "128 query and 40 key rows are not whole heads of 16"),
        (other_values, "q, k, v have 128, 64, 48 rows and o 128 columns"),
        (fewer_channels, "gate, up, down have 96, 90, 96 channels"),
        (no_key, "self_attn.k_proj missing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sizes_that_do_not_fit(tmp_path, change, what):
    folder = saved(tmp_path / "model")
    rewrite(folder, change)
    result = diagnose(folder)
    assert result.verdict == "unhealthy"
    first, *others = words(result, "broken")
    assert first.startswith(f"model.layers.2: {what}")
    assert any(other.startswith("it does not load: ") for other in others)
    assert result.forward is None


def test_the_status_is_4_and_the_result_is_there_all_the_same(tmp_path, capsys):
    def spoil(model):
        layer(model, 1).mlp.down_proj.weight.fill_(math.nan)

    model, file = saved(tmp_path / "model", spoil), tmp_path / "result.json"
    capsys.readouterr()
    assert cli.main(["diagnose", str(model), "--json", str(file)]) == 4
    captured = capsys.readouterr()
    assert "✗ 6,144 NaN in model.layers.1.mlp.down_proj.weight" in captured.out
    assert "unhealthy" in captured.out
    assert captured.err.startswith(f"fastprune: error: {model} is not healthy: 6,144 NaN")
    assert captured.err.count("\n") == 1
    result = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN in the JSON
    assert result["verdict"] == "unhealthy"
    assert result["values"]["nan"] == 6144
    assert result["forward"]["broken_at"] == "model.layers.1.mlp.down_proj"
    assert len(result["tensors"]) == 4 * 9 + 2


def test_a_healthy_model_on_the_command_line(tmp_path, capsys, text):
    model, file = saved(tmp_path / "model"), tmp_path / "result.json"
    flags = ["--no-forward", "--json", str(file)]
    assert cli.main(["diagnose", str(model), *flags]) == 0
    out = capsys.readouterr().out
    assert "0–3" in out
    assert "8 : 4" in out
    assert json.loads(file.read_text())["forward"] is None
    refused = ["diagnose", str(model), "--no-forward", "--text", text]
    assert cli.main(refused) == 2
    assert "--text runs the model" in capsys.readouterr().err


def test_perplexity_against_the_record_of_pruning(pruned, text):
    dense, out = pruned
    result = diagnose(out, text=text, seq_len=32, windows=4)
    metrics = json.loads((out / "fastprune" / "metrics.json").read_text())["perplexity"][0]
    # the weights went through a file in fp32: the same bits, measured the same way
    assert result.perplexity.perplexity == pytest.approx(metrics["after"], rel=1e-6)
    assert result.judgement.by.startswith("×")
    other = diagnose(out, text=text, seq_len=16, windows=4)
    assert "absolute bands" in other.judgement.by
    commands = [advice.command for advice in result.advice]
    assert all(str(dense) in c or str(out) in c for c in commands if c)


def test_against_the_dense_model(pruned, text, tmp_path):
    dense, out = pruned
    result = diagnose(out, text=text, dense=str(dense), seq_len=32, windows=4)
    found = result.comparison
    assert [loss.layer for loss in found.layers] == [0, 1, 2, 3]
    # layers 0 and 3 are whole: they alone cost nothing, and before the first cut nothing differs
    assert [loss.kl > 0 for loss in found.layers] == [False, True, True, False]
    assert [loss.error > 0 for loss in found.layers] == [False, True, True, False]
    # the cosine of equal vectors, rounded in fp32
    assert found.layers[0].cosine == pytest.approx(1, abs=1e-6)
    assert found.layers[3].cosine < 0.999
    assert set(found.to_dict()["worst"]) == {1, 2}
    assert found.kl > 0
    assert found.removed == pytest.approx(0.3, abs=0.01)
    metrics = json.loads((out / "fastprune" / "metrics.json").read_text())["perplexity"][0]
    assert found.factor == pytest.approx(metrics["after"] / metrics["before"], rel=1e-6)
    assert result.to_dict()["dense"]["factor"] == found.factor


def test_a_model_against_itself(pruned, text):
    dense, _ = pruned
    result = diagnose(dense, text=text, dense=str(dense), seq_len=32, windows=4)
    assert result.comparison.kl == 0
    assert result.comparison.worst() == []
    assert result.judgement.band == "good"


def test_the_divergence_is_the_logits_own(pruned, text):
    """KL from whole logits of both models; the windows lie within one comparison."""
    from fastprune.inspect.perplexity import text_windows
    from fastprune.models.load import load_model

    dense, out = pruned
    result = diagnose(out, text=text, dense=str(dense), seq_len=32, windows=2)
    (large, tokenizer), (small, _) = load_model(dense), load_model(out)
    ids = text_windows(tokenizer, [TEXT * 20], 32, 2)
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (large, small))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert result.comparison.kl == pytest.approx(expected, rel=1e-4)  # fp32 against fp64


def plan(folder, kept):
    """A plan that keeps so many KV groups and channels of each layer."""
    sizes = Geometry(query_heads=8, kv_heads=4, channels=96, head_dim=16)
    layers = [keeping(i, tuple(range(k)), tuple(range(c))) for i, (k, c) in enumerate(kept)]
    Plan((sizes,) * 4, tuple(layers)).save(folder / "plan.json")
    return folder / "plan.json"


@pytest.mark.parametrize(
    ("kept", "layers"),
    [([(4, 96), (0, 0), (4, 96), (4, 96)], 3), ([(4, 96), (0, 0), (0, 96), (4, 0)], 4)],
    ids=["a layer is gone", "sublayers are gone"],
)
def test_layers_that_are_gone_are_compared_too(tmp_path, text, kept, layers):
    dense = tiny_checkpoint(tmp_path / "dense")
    common = {"eval": text, "eval_seq_len": 32, "eval_windows": 2}
    out = tmp_path / "out"
    run_prune(PruneConfig(model=str(dense), out=out, plan=plan(tmp_path, kept), **common))
    result = diagnose(out, dense=str(dense), text=text, seq_len=32, windows=2)
    assert result.forward.shape == (1, 32, 300)
    assert not any(layer.problem for layer in result.layers)
    found = result.comparison
    cut = [size != (4, 96) for size in kept]
    assert [loss.kl > 0 for loss in found.layers] == cut
    # a layer that adds nothing misses all that the dense one adds
    assert found.layers[1].error == pytest.approx(1, abs=1e-6)
    if sum(cut) == 1:  # then the model is the dense one with just this layer exchanged
        assert found.layers[1].kl == pytest.approx(found.kl, rel=1e-4)  # fp32, in another order
    without = load_config(out).num_hidden_layers
    assert without == layers


def test_layers_that_cannot_be_matched(tmp_path, text):
    dense = tiny_checkpoint(tmp_path / "dense")
    shorter = saved(tmp_path / "shorter", layers=3)
    found = diagnose(shorter, dense=str(dense), text=text, seq_len=32, windows=2)
    assert found.comparison.layers == ()
    assert found.comparison.kl > 0
    assert any("which layers correspond is not known" in note for note in words(found, "note"))


def test_another_models_dense_model(pruned, tmp_path):
    _, out = pruned
    other = saved(tmp_path / "other", hidden_size=32)
    with pytest.raises(InputError, match="hidden_size 32, the model 64"):
        diagnose(out, dense=str(other), seq_len=32)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        diagnose(tmp_path / "nowhere" / "at" / "all")
    folder = saved(tmp_path / "model")
    config = (folder / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(InputError, match="not a model folder"):
        diagnose(folder)
    config.rename(folder / "config.json")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated or corrupt"):
        diagnose(folder)


def test_check_weights():
    model = tiny_model("llama")
    check_weights(model)
    with torch.no_grad():
        for index in range(4):
            layer(model, index).mlp.up_proj.weight[0, index] = math.inf
    places = ", ".join(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3))
    with pytest.raises(NumericalError, match=f"4 Inf in {places} and 1 more"):
        check_weights(model)


def test_check_weights_looks_at_buffers_and_skips_empty_parameters():
    module = torch.nn.BatchNorm1d(3)
    module.register_parameter("later", torch.nn.Parameter(torch.empty(2, device="meta")))
    check_weights(module)
    module.running_mean[1] = math.nan
    with pytest.raises(NumericalError, match="1 NaN in running_mean"):
        check_weights(module)
