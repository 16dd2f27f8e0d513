"""`--vocab`: which tokens stay, what is measured then, and what further commands make of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from composite import IMAGE, multimodal_checkpoint
from sentencepiece_words import sentencepiece_tokenizer
from tiny import TEXT, saved, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import fastprune
from fastprune import cli, progress
from fastprune.errors import InputError
from fastprune.inspect.perplexity import EvalConfig, evaluate, run_eval, text_windows
from fastprune.inspect.record import Origin
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.trimming import Trimmer
from fastprune.pruning.pipeline import run_prune

SOME = TEXT.splitlines()[0]
KEPT_ROWS = {"before": 300, "after": 280, "params": 20 * 64}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    text, some = tmp_path / "text.txt", tmp_path / "some.txt"
    text.write_text(TEXT * 40)
    some.write_text(SOME)
    return {
        "calib": str(text),
        "calib_samples": 4,
        "calib_seq_len": 32,
        "eval": str(text),
        "eval_seq_len": 32,
        "eval_windows": 2,
    }


def trimmed(vocab: str, settings: dict, family: str = "llama", **options):
    model = tiny_model(family, **options.pop("model", {}))
    config = fastprune.PruneConfig(vocab=vocab, **settings, **options)
    return fastprune.prune(model, tiny_tokenizer(), config)


@pytest.mark.parametrize("tied", [True, False])
def test_the_tokens_of_a_text_stay(settings, tmp_path, tied):
    result = trimmed(f"keep:{tmp_path / 'some.txt'}", settings, model={"tied": tied})
    whole, small = tiny_tokenizer(), result.tokenizer
    assert small.tokenize(SOME) == whole.tokenize(SOME)
    assert small.decode(small(TEXT)["input_ids"]) == TEXT
    assert len(small(TEXT)["input_ids"]) > len(whole(TEXT)["input_ids"])
    assert len(small) % 8 == 0

    metrics = result.metrics
    rows = metrics["vocabulary"]
    assert rows["after"] == len(small) == result.model.config.vocab_size < rows["before"] == 300
    assert rows["params"] == (300 - len(small)) * 64 * (1 if tied else 2)
    params = metrics["params"]
    assert params["before"] - params["after"] == rows["params"]
    assert params["after"] == sum(p.numel() for p in result.model.parameters())
    assert params["block_before"] == params["block_after"]
    assert metrics["bytes"]["before"] - metrics["bytes"]["after"] > 4 * rows["params"] - 1000
    assert metrics["ratio"] == {"requested": None, "achieved": 0.0}


def test_a_number_is_the_size_of_the_result_and_takes_the_most_frequent(settings):
    result = trimmed("270", settings)
    small, whole = result.tokenizer, tiny_tokenizer()
    assert len(small) == 270
    counts = torch.bincount(torch.tensor(whole(TEXT)["input_ids"]), minlength=300)
    gone = [number for token, number in whole.get_vocab().items() if token not in small.get_vocab()]
    trimmer = Trimmer(whole)
    room = 270 - len(trimmer.lasting)
    most = counts.argsort(descending=True, stable=True).tolist()
    first = [token for token in most if token not in trimmer.lasting][: room // 4]
    assert not set(first) & set(gone)
    assert trimmed("90%", settings).tokenizer.get_vocab() == small.get_vocab()


def test_what_a_chat_template_and_the_settings_name_stays(settings):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %} miller {{ m.content }}{% endfor %}"
    model = tiny_model("llama", eos_token_id=[0, 299])
    words = {*tokenizer(" miller")["input_ids"], 299}
    closed = len(Trimmer(tokenizer).closed(words))
    config = fastprune.PruneConfig(vocab=str(closed), **settings)
    result = fastprune.prune(model, tokenizer, config)
    assert result.tokenizer.tokenize(" miller") == tokenizer.tokenize(" miller")
    last = result.tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(299))
    assert model.config.eos_token_id == [0, last]
    with pytest.raises(InputError, match=f"at least {closed} must stay"):
        trimmed = fastprune.PruneConfig(vocab=str(closed - 1), **settings)
        fastprune.prune(tiny_model("llama", eos_token_id=[0, 299]), tokenizer, trimmed)


def test_figures_of_other_tokens_compare_by_bytes(settings, tmp_path):
    result = trimmed(f"keep:{tmp_path / 'some.txt'}", settings)
    (p,) = result.metrics["perplexity"]
    windows = text_windows(tiny_tokenizer(), [TEXT * 40], 32, 2)
    own = evaluate(tiny_model("llama"), windows).perplexity
    assert p["before_own_tokens"] == pytest.approx(own, rel=1e-5)
    ratio = p["bits_per_byte_after"] / p["bits_per_byte_before"]
    assert math.log(p["after"]) / math.log(p["before"]) == pytest.approx(ratio)
    longer = math.log(p["before_own_tokens"]) / math.log(p["before"])
    tokens = [len(t(TEXT)["input_ids"]) for t in (tiny_tokenizer(), result.tokenizer)]
    assert longer == pytest.approx(tokens[1] / tokens[0], rel=0.15)  # of another part of the text
    assert result.metrics["origin"]["perplexity"][0]["dense"] == p["before"]


def test_a_text_of_kept_tokens_alone_reads_the_same(settings):
    result = trimmed(f"keep:{settings['eval']}", settings, model={"vocab_size": 320})
    assert result.metrics["vocabulary"]["before"] == 320  # rows beyond the tokenizer go
    (p,) = result.metrics["perplexity"]
    assert p["before"] == pytest.approx(p["before_own_tokens"])
    assert p["after"] <= p["before"]  # no probability is left for what is gone


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_share_of_the_layers_goes_beside_it(settings, family, tmp_path):
    options = {"ratio": 0.3, "layout": "uniform", "effort": "fast"}
    result = trimmed("280", settings, family, **options)
    assert result.metrics["vocabulary"] == KEPT_ROWS
    assert result.metrics["ratio"]["achieved"] == pytest.approx(0.3, abs=0.01)
    alone = fastprune.PruneConfig(**options, **settings)
    plain = fastprune.prune(tiny_model(family), tiny_tokenizer(), alone)
    params = [r.metrics["params"] for r in (result, plain)]
    assert params[0]["block_after"] == params[1]["block_after"]

    save_checkpoint(result.model, result.tokenizer, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not stock.config.model_type.startswith("fastprune")
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(SOME, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        difference = stock(ids).logits - result.model(ids).logits
    assert difference.abs().max() < 1e-4


def test_a_total_of_parameters_counts_the_rows_that_go(settings):
    model = tiny_model("llama")
    total = sum(p.numel() for p in model.parameters()) - 30_000
    result = trimmed("280", settings, target_params=total, effort="fast")
    assert result.metrics["params"]["after"] == pytest.approx(total, abs=200)
    assert result.metrics["vocabulary"] == KEPT_ROWS


def test_a_dry_run_leaves_model_and_tokenizer_alone(settings):
    model, tokenizer = tiny_model("llama", tied=False), tiny_tokenizer()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    config = fastprune.PruneConfig(vocab="280", ratio=0.2, dry_run=True, **settings)
    result = fastprune.prune(model, tokenizer, config)
    assert (result.model, result.tokenizer) == (model, tokenizer)
    assert result.metrics["vocabulary"] == {**KEPT_ROWS, "params": 2 * 20 * 64}
    params = result.metrics["params"]
    assert params["before"] - params["after"] > 2 * 20 * 64
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.config.vocab_size == 300


def test_a_dry_run_needs_a_config_and_a_tokenizer_alone(settings, tmp_path):
    tiny_config("llama").save_pretrained(tmp_path / "bare")
    config = fastprune.PruneConfig(
        model=str(tmp_path / "bare"), vocab="280", dry_run=True, **settings
    )
    with pytest.raises(InputError, match="no tokenizer in this folder"):
        run_prune(config)
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    metrics = run_prune(config).metrics
    assert metrics["vocabulary"] == KEPT_ROWS
    params = metrics["params"]
    assert params["before"] - params["after"] == KEPT_ROWS["params"]
    stages = {stage["name"]: stage["runs"] for stage in metrics["costs"]["memory"]}
    assert stages["evaluate after"] and not stages["score"] and not stages["compensate"]


def test_figures_of_an_earlier_pruning_follow_the_new_tokens():
    windows, now = ("text", 32, 2), ("text", 32, 3)
    earlier = Origin.of_pruning(
        {
            "model": "dense",
            "params": {"before": 10, "after": 9, "block_before": 8, "block_after": 7},
            "perplexity": [{"text": "text", "seq_len": 32, "windows": 2, "before": 4, "after": 9}],
        },
        None,
    )
    found = earlier.in_other_tokens(windows, now, 0.5)
    assert (found.figures(now).dense, found.figures(now).pruned) == (2.0, 3.0)
    assert found.figures(windows).dense is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": "20.5"}, "give keep:TEXT, a number of tokens, or a share"),
        ({"vocab": "most"}, "give keep:TEXT"),
        ({"vocab": "keep:"}, "name a text"),
        ({"vocab": "100"}, "100 of the tokenizer's 300 tokens cannot be kept; at least 257"),
        ({"vocab": "301"}, "301 of the tokenizer's 300"),
        ({"vocab": "0%"}, "at least 257"),
        ({"vocab": "280", "calib": "self"}, "which is self here"),
        ({"vocab": "keep:no-such.txt"}, "no such file"),
        ({"vocab": "280", "stream": True}, "--stream reads the embedding"),
        ({"vocab": None, "ratio": 0.0}, "--ratio 0 removes nothing"),
        ({"vocab": "280", "ratio": 0.0, "target_params": 5}, "exactly one"),
    ],
)
def test_what_cannot_be_is_refused(settings, options, message):
    config = fastprune.PruneConfig(**settings | options)
    with pytest.raises(InputError, match=message):
        fastprune.prune(tiny_model("llama"), tiny_tokenizer(), config)


def test_token_ids_of_the_whole_tokenizer_are_refused(settings, tmp_path):
    import numpy as np

    np.save(tmp_path / "ids.npy", np.arange(2000) % 300)
    with pytest.raises(InputError, match="holds token ids"):
        trimmed("280", settings | {"calib": str(tmp_path / "ids.npy")})


@pytest.fixture
def command(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 3600)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [f for k, v in settings.items() for f in (f"--{k.replace('_', '-')}", str(v))]

    def run(name: str, *args: object) -> str:
        shared = flags if name in ("prune", "compress") else []
        status = cli.main([name, *map(str, args), *shared])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    return run


def test_further_commands_go_on_with_the_result(command, tmp_path):
    model = tiny_model("llama", vocab_size=340, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path / "dense")
    sentencepiece_tokenizer().save_pretrained(tmp_path / "dense")
    dense, small, text = tmp_path / "dense", tmp_path / "small", tmp_path / "text.txt"
    shown = command("prune", dense, "--out", small, "--vocab", f"keep:{tmp_path / 'some.txt'}",
                    "--format", "gguf")  # fmt: skip
    metrics = json.loads((small / "fastprune/metrics.json").read_text())
    rows, (p,) = metrics["vocabulary"], metrics["perplexity"]
    assert f"vocabulary: 340 -> {rows['after']} tokens" in shown
    assert f"{p['bits_per_byte_before']:.4f} -> {p['bits_per_byte_after']:.4f}" in shown
    assert f"{p['bits_per_byte_after']:.4f}" in (small / "fastprune/report.html").read_text()

    found = run_eval(EvalConfig(model=str(small), text=str(text), seq_len=32, windows=2))
    assert found.perplexity == pytest.approx(p["after"])
    assert found.bits_per_byte == pytest.approx(p["bits_per_byte_after"])

    options = ["--max-steps", "2", "--seq-len", "32", "--lr", "1e-3", "--eval-windows", "0"]
    command("finetune", small, "--out", tmp_path / "taught", "--data", text, *options,
            "--teacher", dense)  # fmt: skip
    command("diagnose", small, "--dense", dense, "--text", text, "--seq-len", "32",
            "--windows", "2")  # fmt: skip
    (exported,) = small.rglob("*.gguf")
    found = run_eval(EvalConfig(model=str(exported), text=str(text), seq_len=32, windows=2))
    assert found.perplexity == pytest.approx(p["after"], rel=0.02)  # its weights are in f16

    again = tmp_path / "again"
    command("prune", small, "--out", again, "--vocab", rows["after"] - 8, "--ratio", "0.1",
            "--effort", "fast")  # fmt: skip
    origin = Origin.of(again)
    assert origin is not None and origin.dense == str(dense)
    (q,) = json.loads((again / "fastprune/metrics.json").read_text())["perplexity"]
    known = origin.figures((q["text"], 32, 2))
    assert known.pruned == q["after"]
    longer = math.log(q["before"]) / math.log(q["before_own_tokens"])
    assert math.log(known.dense) / math.log(p["before"]) == pytest.approx(longer)


def test_the_decoder_of_a_multimodal_model_is_trimmed_in_its_place(command, tmp_path):
    dense, out = multimodal_checkpoint(tmp_path / "dense", "gemma3"), tmp_path / "out"
    command("prune", dense, "--out", out, "--vocab", "280")
    config = AutoModelForImageTextToText.from_pretrained(out).config
    whole, small = tiny_tokenizer(), AutoTokenizer.from_pretrained(out)
    assert len(small) == config.text_config.vocab_size == 280
    image = small.convert_tokens_to_ids(whole.convert_ids_to_tokens(IMAGE))
    assert config.image_token_id == image


def test_compress_trims_in_the_first_round_and_compares_alike(command, tmp_path):
    dense, out, text = saved(tmp_path / "dense", tiny_model("llama")), tmp_path / "out", tmp_path
    flags = ["--max-steps", "2", "--seq-len", "32", "--lr", "1e-3", "--lora-r", "2", "--no-speed"]
    flags += ["--eval-also", "none", "--data", text / "text.txt", "--effort", "fast"]
    flags += ["--ratio", "0.2", "--rounds", "2", "--vocab", f"keep:{text / 'some.txt'}"]
    shown = command("compress", dense, "--out", out, *flags)
    metrics = json.loads((out / "fastprune/metrics.json").read_text())
    after = metrics["vocabulary"]["after"]
    assert f"tokens of the vocabulary 300 {after} {after}" in " ".join(shown.split())
    assert len(AutoTokenizer.from_pretrained(out)) == after
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == after
    dense_figures, small = (metrics[name]["perplexity"][0] for name in ("dense", "recovered"))
    assert dense_figures["text_bytes"] == small["text_bytes"]
    (last,) = metrics["prune"]["perplexity"]
    assert last["before"] == pytest.approx(dense_figures["perplexity"], rel=0.01)
    windows = text_windows(tiny_tokenizer(), [TEXT * 40], 32, 2)
    own = evaluate(tiny_model("llama"), windows).perplexity
    assert dense_figures["perplexity_own_tokens"] == pytest.approx(own, rel=1e-5)
    assert own > dense_figures["perplexity"]  # of longer tokens
