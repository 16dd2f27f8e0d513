"""The decoder of a multimodal model is cut, trained and written with what is around it."""

from __future__ import annotations

import json

import pytest
import torch
from composite import MULTIMODAL, multimodal_checkpoint, tiny_multimodal, with_image
from cutting import every_second
from tiny import TEXT, tiny_checkpoint, tiny_tokenizer, token_ids
from transformers import AutoModelForImageTextToText

from fastprune import PruneConfig, cli, prune
from fastprune.errors import InputError
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.layers import Layers
from fastprune.models.load import load_model
from fastprune.models.multimodal import outside, text_part
from fastprune.pruning.masking import mask
from fastprune.pruning.surgery import apply_plan
from fastprune.pruning.trial import check_decoder

WHOLE_HEADS = ("gemma3", "llava")
"""Those whose stock class takes fewer heads of the same size."""


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 40)
    return str(file)


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_decoder_computes_what_the_model_does_of_a_text(kind):
    whole = tiny_multimodal(kind)
    decoder, ids = text_part(whole), token_ids(2, 12).clamp(max=250)
    with torch.no_grad():
        torch.testing.assert_close(decoder(input_ids=ids).logits, whole(input_ids=ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(decoder.generate(ids, **options), whole.generate(ids, **options))
    total = sum(p.numel() for p in whole.parameters())
    own = sum(p.numel() for p in decoder.parameters())
    assert own + sum(p.numel() for p in outside(decoder)) == total


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_an_image_is_seen_as_by_the_masked_model(kind, tmp_path):
    source = multimodal_checkpoint(tmp_path / "dense", kind)
    masked = tiny_multimodal(kind)
    cut, tokenizer = load_model(source)
    plan = every_second(cut, "attention" if kind in WHOLE_HEADS else "mlp")
    mask(Layers(text_part(masked)), plan, None)
    apply_plan(cut, plan)
    save_checkpoint(cut, tokenizer, tmp_path / "cut")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut").eval()
    assert "fastprune" not in type(again).__name__.lower()
    inputs = with_image(kind)
    with torch.no_grad():
        found, expected = again(**inputs).logits, masked(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    dense = dict(tiny_multimodal(kind).named_parameters())
    around = [name for name, _ in again.named_parameters() if "language_model" not in name]
    assert len(around) > 5
    assert all(torch.equal(again.get_parameter(name), dense[name]) for name in around)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (source / name).read_bytes()


def test_a_model_in_memory_is_pruned_with_what_is_around_it(text, tmp_path):
    whole = tiny_multimodal("gemma3")
    settings = PruneConfig(
        ratio=0.3, layout="uniform", structures=("attention", "mlp"), align=1, keep_worse=True,
        calib=text, calib_samples=8, calib_seq_len=32, eval=text, eval_seq_len=32, eval_windows=2,
    )  # fmt: skip
    result = prune(whole, tiny_tokenizer(), settings)
    assert result.model is whole
    total = sum(p.numel() for p in whole.parameters())
    assert result.metrics["params"]["after"] == total
    whole.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = with_image("gemma3")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, whole(**inputs).logits)


def test_every_command_takes_it(text, tmp_path):
    dense = str(multimodal_checkpoint(tmp_path / "dense", "qwen2_vl"))
    small, adapter, merged, full = (str(tmp_path / n) for n in ("small", "lora", "merged", "full"))
    measured = ["--eval", text, "--eval-seq-len", "32", "--eval-windows", "2", "--quiet"]
    learnt = ["--data", text, "--seq-len", "32", "--batch-size", "2", "--max-steps", "2"]
    windows = ["--calib", text, "--calib-samples", "8", "--calib-seq-len", "32", "--align", "1"]
    uniform = [*windows, *measured, "--keep-worse", "--layout", "uniform", "--structures", "mlp"]

    def run(*words: str) -> None:
        assert cli.main([*words, "--device", "cpu"]) == 0

    run("prune", dense, "--out", small, "--ratio", "0.2", *uniform)
    run("eval", small, "--text", text, "--seq-len", "32", "--windows", "2", "--quiet")
    run("finetune", small, "--out", adapter, "--method", "lora", *learnt, *measured,
        "--keep-worse")  # fmt: skip
    run("merge", small, "--adapter", adapter, "--out", merged, "--quiet")
    run("finetune", merged, "--out", full, *learnt, *measured, "--keep-worse")
    run("diagnose", full, "--dense", dense, "--text", text, "--quiet")
    run("prune", full, "--out", str(tmp_path / "again"), "--ratio", "0.1", *uniform)
    sizes = [len((tmp_path / n / "model.safetensors").read_bytes()) for n in ("full", "again")]
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize(("words", "message"), [
    (["--ratio", "0.2"], "use --layout uniform"),
    (["--ratio", "0.2", "--layout", "uniform", "--stream"], "leave --stream out"),
    (["--ratio", "0.2", "--layout", "uniform", "--family", "qwen2"], "leave --family out"),
    (["--ratio", "0.2", "--layout", "uniform", "--format", "gguf"], "only --format hf"),
])  # fmt: skip
def test_what_it_cannot_have_is_refused_in_one_line(words, message, text, tmp_path, capsys):
    dense = multimodal_checkpoint(tmp_path / "dense", "llava")
    out = tmp_path / "out"
    capsys.readouterr()
    windows = ["--calib", text, "--calib-samples", "8", "--calib-seq-len", "32", "--eval", text,
               "--eval-seq-len", "32", "--eval-windows", "2", "--keep-worse"]  # fmt: skip
    assert cli.main(["prune", str(dense), "--out", str(out), *words, *windows, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (out / "config.json").exists()


def test_the_layout_is_refused_before_weights_are_read(text, tmp_path, capsys):
    dense = multimodal_checkpoint(tmp_path / "dense", "llava")
    weights = dense / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    words = ["prune", str(dense), "--out", str(tmp_path / "out"), "--ratio", "0.2", "--quiet"]
    assert cli.main(words) == 2
    assert "--layout uniform" in capsys.readouterr().err


def test_a_dry_run_without_weights_counts_all_of_it(tmp_path, capsys):
    dense = multimodal_checkpoint(tmp_path / "dense", "gemma3")
    (dense / "model.safetensors").unlink()
    found = tmp_path / "found.json"
    words = ["prune", str(dense), "--ratio", "0.2", "--layout", "uniform", "--dry-run", "--quiet"]
    assert cli.main([*words, "--json", str(found)]) == 0
    metrics = json.loads(found.read_text())
    total = sum(p.numel() for p in tiny_multimodal("gemma3").parameters())
    assert metrics["params"]["before"] == total
    assert metrics["layout"]["architecture"] == "Gemma3ForConditionalGeneration"


def test_a_model_that_reads_texts_otherwise_than_its_decoder_is_refused():
    whole = tiny_multimodal("llava")
    decoder = text_part(whole)
    check_decoder(decoder, token_ids(1, 16).clamp(max=250))
    whole.lm_head = torch.nn.Linear(64, 300)
    with pytest.raises(InputError, match="computes something else of a text"):
        check_decoder(decoder, token_ids(1, 16).clamp(max=250))


def test_layers_of_different_sizes_have_no_place_in_it(tmp_path):
    cut, _ = load_model(multimodal_checkpoint(tmp_path / "dense", "llava"))
    apply_plan(cut, every_second(cut, "mlp", layers=(0, 2)))
    with pytest.raises(InputError, match="--layout uniform"):
        save_checkpoint(cut, None, tmp_path)


def test_a_language_model_is_its_own_decoder(tmp_path):
    model, _ = load_model(tiny_checkpoint(tmp_path))
    assert text_part(model) is model and not list(outside(model))
