"""What a run teaches is what its checkpoint asks, ends, and has room for."""

import copy
import json

import pytest
import torch
from tiny import tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from fastprune import cli
from fastprune.data.encode import Encoder
from fastprune.models.load import load_model
from fastprune.models.vocabulary import embedding_rows

RECORDS = [{"instruction": f"Say {n}.", "output": f"{n}."} for n in range(8)]
FLAGS = ["--max-steps", "2", "--seq-len", "256", "--threads", "1"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    return path


@pytest.fixture
def larger(tmp_path):
    """A model whose tokenizer has a padding token and an end of turn that its embedding lacks."""
    folder = tiny_checkpoint(tmp_path / "larger", layers=2, vocab_size=len(tiny_tokenizer()))
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def test_the_default_wording_is_saved_as_the_chat_template(finetune, data, tmp_path, capsys):
    status, _, stderr = finetune(*FLAGS, data=data)
    assert status == 0, stderr
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    taught = Encoder(tiny_tokenizer(), seq2seq=False).prompt("Say it.", "instructions")
    asked = [{"role": "user", "content": "Say it."}]
    assert saved.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == taught
    assert Encoder(saved, seq2seq=False).prompt("Say it.", "chat") == taught
    status, _, stderr = finetune(*FLAGS, data=data, source=tmp_path / "out", out="again")
    assert status == 0, stderr
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.chat_template == saved.chat_template


def test_plain_text_teaches_no_wording(finetune, tmp_path):
    assert finetune("--max-steps", "1")[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


def test_the_end_of_a_turn_is_saved_as_an_end_token(finetune, data, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    folder = tmp_path / "turns"
    tiny_model("llama", layers=2, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    status, _, stderr = finetune(*FLAGS, data=data, source=folder)
    assert status == 0, stderr
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends == [0, tokenizer.convert_tokens_to_ids("<|eot|>")]
    assert "⟦0.<|eot|>⟧" in stderr


def test_a_merged_adapter_asks_as_it_was_taught(finetune, model, data, tmp_path, capsys):
    status, _, stderr = finetune(*FLAGS, "--method", "lora", data=data)
    assert status == 0, stderr
    merge = ["merge", str(model), "--adapter", str(tmp_path / "out"), "--threads", "1"]
    assert cli.main([*merge, "--out", str(tmp_path / "merged")]) == 0
    templates = [
        AutoTokenizer.from_pretrained(tmp_path / name).chat_template for name in ("out", "merged")
    ]
    assert templates[0] == templates[1] is not None
    ask = ["generate", str(tmp_path / "merged"), "--chat", "--prompt", "Say it.", "--threads", "1"]
    capsys.readouterr()
    assert cli.main([*ask, "--max-new-tokens", "4", "--json", str(tmp_path / "said.json")]) == 0
    said = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    assert said["prompt"].endswith("### Instruction:\nSay it.\n\n### Response:\n")


def test_the_console_says_what_the_data_was_taken_for(finetune, data):
    status, _, stderr = finetune(*FLAGS, data=data)
    assert status == 0
    assert f"data: {data}: taken for instructions, 8 records\n" in stderr
    assert r"### Response:\n⟦0.<|end|>⟧" in stderr
    status, _, stderr = finetune(*FLAGS, "--quiet", data=data, out="quiet")
    assert (status, stderr) == (0, "")


def test_columns_by_name(finetune, tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"Say {n}.", "a": f"{n}."}) for n in range(8)))
    status, _, stderr = finetune(*FLAGS, data=path)
    assert status == 2 and "--columns prompt=FIELD,answer=FIELD" in stderr
    flags = ["--columns", "prompt=q,answer=a"]
    status, _, stderr = finetune(*FLAGS, *flags, data=path)
    assert status == 0 and r"Say 0.\n\n### Response:\n⟦0.<|end|>⟧" in stderr
    status, _, stderr = finetune(*FLAGS, *flags, "--kind", "chat", data=path, out="both")
    assert status == 2 and "leave out --kind" in stderr
    assert not (tmp_path / "both").exists()


def test_a_padding_token_beyond_the_embedding_does_no_harm(finetune, larger, data, tmp_path):
    status, _, stderr = finetune(*FLAGS, data=data, source=larger)
    assert status == 0, stderr
    model, _ = load_model(tmp_path / "out")
    assert embedding_rows(model) == len(tiny_tokenizer())


@pytest.mark.parametrize("untied", [False, True])
def test_a_token_beyond_the_embedding_is_refused_or_gets_a_row(
    finetune, larger, tmp_path, capsys, untied
):
    if untied:
        model = tiny_model("llama", layers=2, tied=False, vocab_size=len(tiny_tokenizer()))
        model.save_pretrained(larger)
    data = tmp_path / "turns.jsonl"
    data.write_text(json.dumps({"prompt": "Say <|eot|> it.", "response": "It."}))
    status, _, stderr = finetune(*FLAGS, data=data, source=larger)
    assert status == 2
    assert f"{data}: needs the token '<|eot|>' (id " in stderr and "--resize-embeddings" in stderr
    assert not (tmp_path / "out" / "config.json").exists()
    status, _, stderr = finetune(
        *FLAGS, "--resize-embeddings", "--freeze", "most", data=data, source=larger, out="grown"
    )
    assert status == 0, stderr
    model, tokenizer = load_model(tmp_path / "grown")
    assert embedding_rows(model) == model.config.vocab_size == len(tokenizer)
    old, _ = load_model(larger)
    rows = embedding_rows(old)
    for grown, before in (
        (model.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, old.get_output_embeddings().weight),
    ):
        assert torch.equal(grown[:rows], before)
        assert torch.allclose(grown[rows:], before.mean(0).expand_as(grown[rows:]), atol=0.02)
    text = tmp_path / "text.txt"
    text.write_text("The river <|eot|> runs. " * 40)
    args = ["--text", str(text), "--seq-len", "32", "--windows", "1", "--threads", "1"]
    assert cli.main(["eval", str(tmp_path / "grown"), *args]) == 0
    assert cli.main(["eval", str(larger), *args]) == 2
    assert f"{text}: needs the token '<|eot|>'" in capsys.readouterr().err
    prune = ["prune", str(larger), "--ratio", "0.2", "--out", str(tmp_path / "pruned")]
    prune += ["--calib", str(text), "--calib-samples", "2", "--calib-seq-len", "16"]
    prune += ["--eval-seq-len", "16", "--eval-windows", "1", "--threads", "1"]
    assert cli.main(prune) == 2
    assert f"{text}: needs the token '<|eot|>'" in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists()


def test_an_adapter_has_no_embedding_to_grow(finetune, larger, data):
    flags = [*FLAGS, "--method", "lora", "--resize-embeddings"]
    status, _, stderr = finetune(*flags, data=data, source=larger)
    assert status == 2 and "which an adapter is not" in stderr


def test_a_default_window_is_no_longer_than_the_model_allows(
    finetune, text, held_out, tmp_path, capsys
):
    folder = tiny_checkpoint(tmp_path / "short", layers=2, max_position_embeddings=24)
    common = ["finetune", str(folder), "--data", str(text), "--out", str(tmp_path / "out")]
    common += ["--eval", str(held_out), "--eval-windows", "1", "--threads", "1"]
    assert cli.main([*common, "--max-steps", "1"]) == 0
    metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text(encoding="utf-8"))
    assert metrics["perplexity"][0]["seq_len"] == 24
    log = (tmp_path / "out/fastprune/run.log").read_text(encoding="utf-8")
    assert "--seq-len: 24, the model's maximum, instead of 512" in log
    for flag in ("--seq-len", "--eval-seq-len"):
        assert cli.main([*common, flag, "25", "--overwrite"]) == 2
        assert f"{flag} 25: the model has 24 positions" in capsys.readouterr().err
    prune = ["prune", str(folder), "--ratio", "0.2", "--calib-samples", "2", "--eval-windows", "1"]
    prune += ["--threads", "1", "--dry-run"]
    assert cli.main([*prune, "--json", str(tmp_path / "dry.json")]) == 0
    assert json.loads((tmp_path / "dry.json").read_text())["settings"]["calib_seq_len"] == 24
    assert cli.main([*prune, "--calib-seq-len", "25"]) == 2
    assert "--calib-seq-len 25: the model has 24" in capsys.readouterr().err
    assert cli.main(["eval", str(folder), "--text", str(held_out), "--windows", "1"]) == 0
    assert "1 × 24 tokens" in capsys.readouterr().out
    diagnose = ["diagnose", str(folder), "--text", str(held_out), "--windows", "1"]
    assert cli.main([*diagnose, "--seq-len", "25"]) == 2
