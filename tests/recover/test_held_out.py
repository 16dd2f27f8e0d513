"""Validation and test data of their own, and the perplexity that loggers see while training."""

import json
import math

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from read_data import training_data
from tiny import TEXT

from fastprune.inspect.perplexity import evaluate
from fastprune.models.load import load_model
from fastprune.recover.loggers import perplexity_key

FLAGS = ["--max-steps", "2", "--precision", "fp32"]


def lines_of(out):
    text = (out / "fastprune/train_log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "held.parquet"
    texts = [TEXT[i * 20 : i * 20 + 200] for i in range(6)]
    parquet.write_table(pa.table({"text": texts}), file)
    return file


def test_validation_data_of_its_own(finetune, tmp_path, table):
    flags = [*FLAGS, "--val-data", str(table), "--eval-steps", "1", "--recipe", "instruct"]
    status, _, err = finetune(*flags)
    assert status == 0, err
    metrics = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())
    _, tokenizer = load_model(tmp_path / "out")
    data = training_data(table, tokenizer, seq_len=32, cache=tmp_path / "c").train
    assert metrics["data"]["validation"] == len(data) > 0
    losses = [line["eval_loss"] for line in lines_of(tmp_path / "out") if "eval_loss" in line]
    assert len(losses) == 2


def test_test_data_is_measured_once_at_the_end(finetune, tmp_path, table):
    status, out, err = finetune(*FLAGS, "--test-data", str(table))
    assert status == 0, err
    test = json.loads((tmp_path / "out/fastprune/metrics.json").read_text())["test"]
    model, tokenizer = load_model(tmp_path / "out")
    data = training_data(table, tokenizer, seq_len=32, cache=tmp_path / "c").train
    windows = torch.stack([data[i]["input_ids"] for i in range(len(data))])
    expected = evaluate(model, windows).perplexity
    assert test["items"] == len(data)
    assert test["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert test["loss"] == pytest.approx(math.log(expected), rel=1e-5)
    assert "test  " in out
    page = (tmp_path / "out/fastprune/report.html").read_text()
    row = page.partition("<h2>Test data</h2>")[2].partition("</table>")[0]
    assert str(table) in row and f">{test['loss']:.3f}<" in row
    assert f">{test['perplexity']:.2f}<" in row


def test_two_validation_sets_are_refused(finetune, table):
    status, _, err = finetune(*FLAGS, "--val-data", str(table), "--val-size", "2")
    assert status == 2 and "leave out --val-size" in err
    status, _, err = finetune(*FLAGS, "--test-data", "nowhere.parquet")
    assert status == 2 and "nowhere.parquet" in err


def test_both_figures_are_logged_while_training(finetune, tmp_path):
    status, _, err = finetune(*FLAGS, "--val-size", "2", "--eval-steps", "1")
    assert status == 0, err
    checked = [line for line in lines_of(tmp_path / "out") if "eval_loss" in line]
    assert len(checked) == 2 and all(line["eval_perplexity"] > 1 for line in checked)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("wikitext2", "eval_wikitext2_ppl"),
        ("builtin:wikitext2", "eval_wikitext2_ppl"),
        ("/data/a b.txt", "eval_a_b_ppl"),
        ("hf:org/name:config:test", "eval_name_ppl"),
        ("builtin:c4,x.txt", "eval_c4+x_ppl"),
    ],
)
def test_what_loggers_call_it(text, key):
    assert perplexity_key(text) == key
