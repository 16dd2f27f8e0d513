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
import sys
sys.modules["fastprune"] = None  # importing it fails from here on
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
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


def run(code: str, *arguments: Path, answer: str | None = None) -> str:
    """What `code` prints in a fresh process with `answer` on stdin; AssertionError if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", REMOTE + code, *map(str, arguments)],
        input=answer,
        stdin=subprocess.DEVNULL if answer is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_MODULES_CACHE": str(arguments[0].parent / "modules")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


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


def test_without_fastprune_models_load_by_the_code_beside_them(folder, tmp_path):
    torch.save(token_ids(), tmp_path / "ids.pt")
    code = """
ids = torch.load(sys.argv[2] + "/ids.pt")
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    bare = AutoModel.from_config(model.config, trust_remote_code=True)
    assert type(bare).__name__ == "FastpruneLlamaModel"
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(bare(ids).last_hidden_state, model.model(ids).last_hidden_state)
    torch.save(model(ids).logits, sys.argv[2] + "/logits.pt")
"""
    run(code, folder, tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(load_model(folder)[0]))


@pytest.mark.parametrize("trust", [True, False])
def test_without_fastprune_the_tokenizer_loads_unasked(folder, trust):
    code = f"""
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code={trust})
print(tokenizer({TEXT!r})["input_ids"])
"""
    assert json.loads(run(code, folder)) == tiny_tokenizer()(TEXT)["input_ids"]


def test_with_fastprune_the_tokenizer_loads_unasked(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]


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
