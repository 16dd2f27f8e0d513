"""What other tools do with a per-layer checkpoint: load it, continue text, train and merge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cutting import cut
from tiny import TEXT, tiny_model, tiny_tokenizer, token_ids
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from fastprune.models import modeling
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.load import load_model

SIZES = [(0, 0, 96), (6, 3, 50), (8, 4, 0), (2, 1, 32)]
REMOTE = """
import json, sys
sys.modules["fastprune"] = None  # importing it fails from here on
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder, work, text = sys.argv[1:]
ids = torch.load(work + "/ids.pt")
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    bare = AutoModel.from_config(model.config, trust_remote_code=True)
    assert type(bare).__name__ == "FastpruneLlamaModel"
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)
    torch.save(model(ids).logits, work + "/logits.pt")
tokens = [
    AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)(text)["input_ids"]
    for trust in (True, False)
]
json.dump(tokens, open(work + "/tokens.json", "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A per-layer checkpoint: no attention in layer 0, no MLP in layer 2."""
    path = tmp_path_factory.mktemp("pruned")
    save_checkpoint(cut(tiny_model("llama"), SIZES), tiny_tokenizer(), path)
    modeling.register()
    return path


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


def test_the_config_is_what_transformers_describes(folder):
    """Sparse overrides, `skip` for what is removed, the dense sizes as global ones."""
    config = json.loads((folder / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"skip": ["attention"]},
        "1": {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 50},
        "2": {"skip": ["mlp"]},
        "3": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
    }
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (8, 4)
    assert config["auto_map"] == {
        "AutoConfig": "modeling_fastprune.FastpruneLlamaConfig",
        "AutoModel": "modeling_fastprune.FastpruneLlamaModel",
        "AutoModelForCausalLM": "modeling_fastprune.FastpruneLlamaForCausalLM",
    }


def test_an_older_folder_loads(folder, tmp_path):
    """Zeros instead of `skip`, every size of every layer, no AutoModel."""
    model, _ = load_model(folder)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    config["per_layer_config"] = {
        str(index): dict(zip(names, sizes)) for index, sizes in enumerate(SIZES)
    }
    del config["auto_map"]["AutoModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read, _ = load_model(tmp_path)
    assert torch.equal(logits(read), logits(model))


def test_the_bare_model_from_the_folder(folder):
    bare = AutoModel.from_pretrained(folder)
    whole, _ = load_model(folder)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(bare(ids).last_hidden_state, whole.model(ids).last_hidden_state)


def test_features_and_text_by_pipelines(folder):
    text = "The river runs"
    written = pipeline("text-generation", model=str(folder))
    found = written(text, max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert found.startswith(text) and len(found) > len(text)
    features = pipeline("feature-extraction", model=str(folder))(text)
    assert torch.tensor(features).shape == (1, len(tiny_tokenizer()(text).input_ids), 64)


def test_without_fastprune_the_code_beside_the_model_is_used(folder, tmp_path):
    """Told to run that code or not to, the tokenizer loads either way, and nobody is asked."""
    torch.save(token_ids(), tmp_path / "ids.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    code = [sys.executable, "-c", REMOTE, str(folder), str(tmp_path), TEXT]
    subprocess.run(code, check=True, stdin=subprocess.DEVNULL, env=environment)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(load_model(folder)[0]))
    for tokens in json.loads((tmp_path / "tokens.json").read_text()):
        assert tokens == tiny_tokenizer()(TEXT).input_ids


def test_with_fastprune_the_tokenizer_loads_unasked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_lora_adapter_by_peft(folder, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # the first step moves B alone: A has no gradient while B is zero
        model(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    expected = logits(model.eval())
    dense = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (expected - dense).abs().max() > 0.01
    base = AutoModelForCausalLM.from_pretrained(folder)
    read = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(read), expected)
    # W + BA rounds differently from W x + B(A x); logits are of size 1
    torch.testing.assert_close(logits(read.merge_and_unload()), expected, atol=1e-3, rtol=0)


def test_a_compiled_model(folder):
    """The graph breaks nowhere it would not break in the stock model; values are the same."""
    model, _ = load_model(folder)
    expected = logits(model)
    torch.testing.assert_close(
        logits(torch.compile(model, backend="aot_eager")), expected, atol=1e-4, rtol=0
    )


@pytest.mark.filterwarnings("ignore")  # the harness's own
@pytest.mark.parametrize("by", ["path", "object"])
def test_lm_evaluation_harness(folder, by):
    """Its `hf` model, of the folder and of a model in memory, finds the model's likelihoods."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model, tokenizer = load_model(folder)
    if by == "path":
        options = {"trust_remote_code": True, "device": "cpu", "dtype": "float32"}
        harness = huggingface.HFLM(pretrained=str(folder), **options)
    else:
        harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer)
    context, continuation = "The river runs past the old", " mill turns its wheel"
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    [(found, _)] = harness.loglikelihood([request], disable_tqdm=True)
    start = len(tokenizer(context).input_ids)
    ids = torch.tensor([tokenizer(context + continuation).input_ids])
    scores = logits(model, ids)[0, start - 1 : -1].log_softmax(-1)
    expected = scores.gather(1, ids[0, start:, None]).sum().item()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_eight_bits_by_torchao(folder):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    expected = logits(load_model(folder)[0])
    difference = (logits(model) - expected).norm() / expected.norm()
    assert 0 < difference < 0.05
