"""`fastprune finetune` end to end on a tiny model: what it writes, and how it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_checkpoint, tiny_model
from transformers import AutoModelForCausalLM

import fastprune
from fastprune.models.load import load_model
from fastprune.recover.objective import autocast_dtype


def metrics_of(out):
    return json.loads((out / "fastprune" / "metrics.json").read_text())


def test_it_writes_a_checkpoint_and_its_records(finetune, tmp_path):
    status, stdout, stderr = finetune("--max-steps", "8", "--prompt", "The river")
    assert status == 0, stderr
    out = tmp_path / "out"
    metrics = metrics_of(out)
    p = metrics["perplexity"][0]
    assert p["after"] < p["before"]  # it learnt something
    assert f"{p['after']:.2f}" in stdout
    assert metrics["stages"][0]["steps"] == 8
    assert metrics["samples"][0]["prompt"] == "The river"
    lines = [json.loads(x) for x in (out / "fastprune/train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert lines[-1]["tokens"] == 8 * 2 * 2 * 32  # steps, passes, samples, tokens
    assert {"loss", "lr", "grad_norm", "skipped", "seconds"} <= lines[0].keys()
    assert "polyline" in (out / "fastprune/report.html").read_text()
    assert "100 %" in (out / "fastprune/run.log").read_text()
    assert (out / "tokenizer.json").is_file()
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "-1"], "--lr must be positive"),
        (["--recipe", "nonsense"], "no recipe 'nonsense'"),
        (["--recipe", "distill"], "needs --teacher"),
        (["--early-stop", "2"], "give --eval-steps"),
        (["--eval-windows", "0", "--gate-ppl-ratio", "1"], "needs a perplexity"),
        (["--layer-lrs", "1e-5,1e-6", "--find-lr"], "--layer-lrs gives every rate"),
        (["--resume", "nowhere"], "no checkpoint lies there either"),
        (["--seq-len", "100000"], "512 positions"),
    ],
)
def test_it_refuses(finetune, tmp_path, flags, words):
    status, stdout, stderr = finetune(*flags)
    assert (status, stdout) == (2, "")
    assert words in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_refused_when_the_stage_begins_leaves_nothing(finetune, tmp_path):
    status, _, stderr = finetune("--method", "lora", "--lora-target-modules", "x_proj")
    assert status == 2
    assert "no linear module named x_proj" in stderr
    assert not (tmp_path / "out").exists()


def test_broken_weights_are_named(finetune, tmp_path):
    model = tiny_checkpoint(tmp_path / "broken", layers=2)
    broken = tiny_model("llama", layers=2)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    broken.save_pretrained(model)
    status, _, stderr = finetune("--max-steps", "2", source=model)
    assert status == 4
    assert "model.layers.1.mlp.up_proj.weight" in stderr
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == [tmp_path / "out/fastprune/run.log"]
    assert "model.layers.1.mlp.up_proj.weight" in files[0].read_text()


def test_a_gate_that_is_not_met_writes_no_checkpoint(finetune, tmp_path):
    status, _, stderr = finetune("--max-steps", "2", "--gate-ppl-ratio", "0.01")
    assert status == 3
    assert "the gate is 0.01" in stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_existing_checkpoint_stays_until_the_new_one_is_complete(finetune, tmp_path):
    assert finetune("--max-steps", "2")[0] == 0
    before = load_file(tmp_path / "out/model.safetensors")
    status, _, stderr = finetune("--max-steps", "2")
    assert status == 2
    assert "--overwrite" in stderr
    assert finetune("--max-steps", "3", "--overwrite", "--gate-ppl-ratio", "0.01")[0] == 3
    after = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert finetune("--max-steps", "3", "--overwrite")[0] == 0
    assert metrics_of(tmp_path / "out")["stages"][0]["steps"] == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_keep_their_dtype(finetune, tmp_path, dtype):
    precision = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    status, _, stderr = finetune("--max-steps", "4", "--dtype", dtype, "--precision", precision)
    assert status == 0, stderr
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {w.dtype for w in weights.values()} == {getattr(torch, dtype)}
    assert all(w.isfinite().all() for w in weights.values())
    p = metrics_of(tmp_path / "out")["perplexity"][0]
    assert p["after"] < p["before"]


@pytest.mark.parametrize(
    ("features", "precision", "warned"),
    [
        ({"avx2": True}, "bf16", True),
        ({"avx2": True, "avx512_fp16": True}, "bf16", True),
        ({"avx2": True, "avx512_bf16": True}, "bf16", False),
        ({"neon": True, "bf16": True}, "fp16", True),
        ({"avx2": True}, "fp32", False),
        ({"avx2": True}, "auto", False),
        ({}, "bf16", False),
    ],
)
def test_products_without_units_are_warned_of(finetune, monkeypatch, features, precision, warned):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    flags = ["--max-steps", "1", "--precision", precision, "--device", "cpu"]
    status, _, stderr = finetune(*flags)
    assert status == 0, stderr
    line = f"--precision {precision}: this processor has no units for {precision} products"
    assert stderr.count(line) == int(warned)
    assert stderr.count("no units") == int(warned)


@pytest.mark.parametrize(
    ("features", "fast"),
    [
        ({"avx2": True, "amx_bf16": True}, True),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"neon": True, "bf16": True}, False),  # not measured
        ({}, False),
    ],
)
def test_bf16_where_it_is_fast(monkeypatch, features, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert autocast_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if fast else None)
    assert autocast_dtype("fp32", torch.device("cpu")) is None


def test_lora_leaves_an_adapter(finetune, tmp_path):
    status, _, stderr = finetune("--max-steps", "4", "--method", "lora", "--save-steps", "2")
    assert status == 0, stderr
    out = tmp_path / "out"
    assert (out / "adapter_config.json").is_file()
    assert not (out / "model.safetensors").exists()
    p = metrics_of(out)["perplexity"][0]
    assert p["after"] < p["before"]


def test_distillation(finetune, model, tmp_path):
    status, _, stderr = finetune("--max-steps", "3", "--teacher", str(model))
    assert status == 0, stderr


def test_python_face(model, text, held_out):
    net, tokenizer = load_model(model)
    config = fastprune.FinetuneConfig(
        data=str(text), eval=str(held_out), eval_seq_len=32, eval_windows=2, seq_len=32,
        batch_size=2, grad_accum=1, lr=1e-3, max_steps=4,
    )  # fmt: skip
    result = fastprune.finetune(net, tokenizer, config)
    assert isinstance(result, fastprune.FinetuneResult)
    assert result.model is net
    p = result.metrics["perplexity"][0]
    assert p["after"] < p["before"]
