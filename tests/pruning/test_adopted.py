"""Model types that are not declared and whose layers are like those of a family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cutting import every_second
from tiny import TEXT, saved, tiny_checkpoint, tiny_tokenizer, token_ids
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from fastprune import ExportConfig, PruneConfig, cli, export, prune
from fastprune.errors import InputError
from fastprune.models.adopted import adopt, check_known
from fastprune.models.families import geometries
from fastprune.models.load import load_model
from fastprune.models.streamed import StreamedModel
from fastprune.pruning.plan import Plan
from fastprune.pruning.trial import check_surgery

SETTINGS = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
ALIKE = ("ernie4_5", "olmo", "seed_oss", "hunyuan_v1_dense", "internlm3", "ministral")


def undeclared(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SETTINGS)).float().eval()


class CentredMLP(LlamaMLP):
    """Reads like an MLP of Llama, but each of its channels depends on all others."""

    def forward(self, x):
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner - inner.mean(-1, keepdim=True))


class CentredConfig(LlamaConfig):
    model_type = "centred"


class CentredForCausalLM(LlamaForCausalLM):
    config_class = CentredConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = CentredMLP(config)


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 40)
    return str(file)


def options(text: str) -> list[str]:
    return ["--calib", text, "--calib-samples", "8", "--calib-seq-len", "32", "--eval", text,
            "--eval-seq-len", "32", "--eval-windows", "2", "--keep-worse", "--align", "1",
            "--layout", "uniform", "--structures", "attention,mlp", "--quiet"]  # fmt: skip


@pytest.mark.parametrize("kind", ALIKE)
def test_cutting_equals_zeroing_where_layers_compute_alike(kind):
    model = undeclared(kind)
    adopt(model, "llama")
    check_surgery(model, ("attention", "mlp"))


def test_every_command_takes_an_adopted_type(text, tmp_path, capsys):
    dense = saved(tmp_path / "dense", undeclared("ernie4_5"))
    small, full, again = (tmp_path / name for name in ("small", "full", "again"))
    capsys.readouterr()
    words = ["--ratio", "0.3", *options(text)]
    assert cli.main(["prune", str(dense), "--out", str(small), *words]) == 2
    assert "its layers look like those of llama: try --family llama" in capsys.readouterr().err
    assert cli.main(["prune", str(dense), "--out", str(small), "--family", "llama", *words]) == 0
    config = json.loads((small / "config.json").read_text())
    assert config["fastprune_family"] == "llama" and config["architectures"] == [
        "Ernie4_5ForCausalLM"
    ]
    model, _ = load_model(small)
    assert type(model).__module__.startswith("transformers.")
    assert geometries(model)[0].kv_heads < 2 or geometries(model)[0].channels < 96
    measured = ["--eval", text, "--eval-seq-len", "32", "--eval-windows", "2", "--quiet"]
    learnt = ["--data", text, "--seq-len", "32", "--batch-size", "2", "--max-steps", "1"]
    assert cli.main(["finetune", str(small), "--out", str(full), *learnt, *measured,
                     "--keep-worse"]) == 0  # fmt: skip
    assert cli.main(["prune", str(full), "--out", str(again), "--ratio", "0.1", "--stream",
                     *options(text)]) == 0  # fmt: skip
    assert json.loads((again / "config.json").read_text())["fastprune_family"] == "llama"
    assert len(StreamedModel(again)) == 3


def test_a_model_in_memory_keeps_its_class_and_is_written_as_stock(text, tmp_path):
    model = undeclared("seed_oss")
    settings = PruneConfig(
        ratio=0.3, family="llama", layout="uniform", structures=("attention", "mlp"), align=1,
        calib=text, calib_samples=8, calib_seq_len=32, eval=text, eval_seq_len=32, eval_windows=2,
        keep_worse=True,
    )  # fmt: skip
    result = prune(model, tiny_tokenizer(), settings)
    assert result.model is model and type(model).__name__ == "SeedOssForCausalLM"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("form", ["hf", "hf-uniform", "gguf", "nemotron-nas"])
def test_forms_are_written_as_stock_or_refused_by_type(form, tmp_path):
    model = undeclared("ernie4_5")
    adopt(model, "llama")
    settings = ExportConfig(model="", format=(form,), out=tmp_path / "out", quiet=True)
    if form.startswith("hf"):
        export(model, tiny_tokenizer(), settings)  # reads it again and compares the logits
        return
    with pytest.raises(InputError, match="ernie4_5"):
        export(model, tiny_tokenizer(), settings)


def test_heads_that_the_stock_class_cannot_have_stay():
    model = undeclared("helium")  # its output projection has as many columns as the hidden size
    check_known(model, "llama")
    with pytest.raises(InputError, match=r"KV groups of a 'helium'.*use --structures mlp"):
        check_surgery(model, ("attention", "mlp"))
    check_surgery(model, ("mlp",))


def test_layers_that_only_look_alike_are_refused_by_what_they_compute():
    model = CentredForCausalLM(CentredConfig(**SETTINGS)).eval()
    check_known(model, "llama")
    with pytest.raises(InputError, match=r"channels of a 'centred'.*differs from zeroing them"):
        check_surgery(model, ("mlp",))


def test_the_check_stands_before_the_work(text, tmp_path, capsys):
    AutoConfig.register("centred", CentredConfig, exist_ok=True)
    AutoModelForCausalLM.register(CentredConfig, CentredForCausalLM, exist_ok=True)
    dense = saved(tmp_path / "dense", CentredForCausalLM(CentredConfig(**SETTINGS)))
    capsys.readouterr()
    words = ["--family", "llama", "--ratio", "0.2", *options(text)]
    assert cli.main(["prune", str(dense), "--out", str(tmp_path / "out"), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot be removed as those of its family" in line
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(("kind", "family", "message"), [
    ("ernie4_5", "bert", "--family bert: not one of"),
    ("ernie4_5", "phi3", "differ from it: a layer has no module self_attn.qkv_proj"),
    ("diffllama", "llama", "differ from it: a layer has the parameter self_attn.lambda_q1"),
    ("llama", "qwen2", "have a declaration of their own; leave --family out"),
])  # fmt: skip
def test_families_that_do_not_fit_are_refused(kind, family, message):
    with pytest.raises(InputError, match=message):
        adopt(undeclared(kind), family)


def test_a_type_that_looks_like_none_is_refused_without_advice():
    with pytest.raises(InputError, match=r"not supported; fastprune prunes [^;]*$"):
        check_known(undeclared("diffllama"))


def test_layers_of_different_sizes_are_refused(text, tmp_path, capsys):
    dense = saved(tmp_path / "dense", undeclared("ernie4_5"))
    model, _ = load_model(dense)
    adopt(model, "llama")
    plan: Plan = every_second(model, "mlp", layers=(1,))
    plan.save(tmp_path / "plan.json")
    out = ["--out", str(tmp_path / "out"), "--family", "llama", "--quiet"]
    for words in (["--ratio", "0.2"], ["--plan", str(tmp_path / "plan.json")]):
        capsys.readouterr()
        assert cli.main(["prune", str(dense), *words, *out]) == 2
        assert "use --layout uniform" in capsys.readouterr().err


def test_a_dry_run_knows_it_by_its_config_alone(tmp_path, capsys):
    undeclared("ernie4_5").config.save_pretrained(tmp_path)
    found = tmp_path / "found.json"
    words = ["--family", "llama", "--ratio", "0.2", "--layout", "uniform", "--dry-run", "--quiet"]
    assert cli.main(["prune", str(tmp_path), *words, "--json", str(found)]) == 0
    layout = json.loads(found.read_text())["layout"]
    assert layout == {"kind": "uniform", "model_type": "ernie4_5",
                      "architecture": "Ernie4_5ForCausalLM"}  # fmt: skip


def test_a_declared_model_needs_no_family(tmp_path):
    model, _ = load_model(tiny_checkpoint(tmp_path))
    check_known(model)
    check_known(model, "llama")
    assert not hasattr(model.config, "fastprune_family")
