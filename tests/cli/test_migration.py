"""The commands of docs/guides/migration.md, run on tiny models: what the page promises is done.

Under the names of the page's models and data lie tiny ones, and sizes are replaced by smaller ones
(SMALLER); everything else is the page's own.
"""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tiny import TEXT, saved, tiny_gpt2, tiny_model, tiny_t5, tiny_tokenizer
from transformers import LlamaConfig

from fastprune import AdamW, cli, progress

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "migration.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
SMALLER = {
    "prune": {"calib-samples": 4, "calib-seq-len": 32, "sensitivity-samples": 2, "layers": "1:8"},
    "finetune": {"seq-len": 48, "batch-size": 2, "grad-accum": 1, "warmup-steps": 1},
    "eval": {"seq-len": 32, "windows": 2},
    "diagnose": {"seq-len": 32, "windows": 2},
    "generate": {"max-new-tokens": 4},
}
SMALLER["prune"] |= {"eval-seq-len": 32, "eval-windows": 2}
SMALLER["finetune"] |= {"eval-seq-len": 32, "eval-windows": 2, "max-steps": 6, "val-size": 4}
ONLY_IF_GIVEN = {"layers", "val-size", "warmup-steps", "eval-steps", "generate-steps"}
ONLY_IF_GIVEN |= {"save-steps", "bleu-samples", "samples", "log-steps"}
SMALLER["finetune"] |= {"eval-steps": 3, "generate-steps": 3, "save-steps": 2, "bleu-samples": 3}
SMALLER["finetune"] |= {"samples": 24, "log-steps": 1}
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")
RIVER = {"instruction": "Where does the river run?", "input": "", "output": "Past the old mill."}
DOLLY = {"instruction": "What turns the wheel?", "context": TEXT, "response": "The river."}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with everything that the page's commands name."""
    folder = tmp_path_factory.mktemp("migration")
    saved(folder / "Llama-3-8B", taught())
    saved(folder / "chat-t5", tiny_t5())
    state = {f"_orig_mod.{name}": value for name, value in tiny_gpt2().state_dict().items()}
    content = {"model": state, "step": 19072, "val_loss": 3.1, "config": {"n_head": 4}}
    torch.save(content, folder / "model_19072.pt")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "wikitext2").write_text(TEXT * 12)  # a path goes before a name
    for name, record in (("alpaca-cleaned", RIVER), ("dolly-15k", DOLLY)):
        records = [record | {"instruction": f"{record['instruction']} ({i})"} for i in range(40)]
        (folder / name).mkdir()
        (folder / name / "train.json").write_text(json.dumps(records))
    pairs = {"prompt": [f"第{i}条河流向哪里？" for i in range(40)], "response": ["流过磨坊。"] * 40}
    parquet.write_table(pyarrow.table(pairs), folder / "sft.parquet")
    (folder / "prompts.txt").write_text("河流向哪里？\nThe mill\n")
    return folder


def taught():
    """A tiny Llama of 8 layers that has learnt a text: removing a layer hurts it, as it must."""
    model = tiny_model("llama", layers=8)
    ids = tiny_tokenizer()(TEXT, return_tensors="pt").input_ids
    optimizer = AdamW(model.parameters(), lr=2e-3)
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def run(workshop, monkeypatch, capsys):
    """Run the commands of a section in the workshop, those before it first; what each printed."""
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop / "cache"))
    monkeypatch.setattr(progress, "DELAY", 3600)  # no progress lines on a slow machine

    def section(name):
        for earlier in SECTIONS:
            if (workshop / f"{earlier} done").exists():
                continue
            for command in commands(SECTIONS[earlier]):
                execute(command, capsys)
            (workshop / f"{earlier} done").touch()
            if earlier == name:
                break

    return section


def commands(text):
    """The command lines of the code blocks in `text`; loops written out."""
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        block = block.replace("\\\n", " ")
        loop = re.compile(r"^for (\w+) in (.*?); do\n(.*?)^done\n", re.M | re.S)

        def repeat(match):
            name, words, body = match.groups()
            return "".join(body.replace(f"${name}", word) for word in words.split())

        yield from (shlex.split(line) for line in loop.sub(repeat, block).splitlines() if line)


def execute(command, capsys):
    program, *args = command
    if program == "grep":
        pattern, file = args
        assert pattern in Path(file).read_text(), f"{file} has no line with {pattern!r}"
        return
    assert program == "fastprune"
    capsys.readouterr()
    status = cli.main(smaller(args))
    captured = capsys.readouterr()
    if args[0] == "diagnose" and "is not healthy" in captured.err:
        assert status == 4  # of a pruned tiny model that is the truth
        return
    if args[0] == "finetune" and "made the model worse" in captured.err:
        assert status == 3  # of a few steps on two sentences that is the truth, too
        status = cli.main([*smaller(args), "--keep-worse"])
    assert status == 0, f"{shlex.join(args)}\n{captured.err}"


def smaller(args):
    """`args` with small sizes, and without the logger that is not installed here."""
    args = ["none" if arg == "wandb" else arg for arg in args]
    for flag, value in SMALLER.get(args[0], {}).items():
        if f"--{flag}" in args:
            args[args.index(f"--{flag}") + 1] = str(value)
        elif flag not in ONLY_IF_GIVEN:
            args += [f"--{flag}", str(value)]
    return args


def metrics(run):
    return json.loads(Path("runs", run, "fastprune", "metrics.json").read_text())


@pytest.mark.parametrize("name", SECTIONS)
def test_flags_of_the_tables_exist(name):
    text = SECTIONS[name]
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|$", text, re.M)
    flags = {flag for row in rows for flag in FLAG.findall(row)}
    used = {command[1] for command in commands(text) if command[0] == "fastprune"}
    fields = {
        field.name
        for command in used
        for field in dataclasses.fields(cli._load(cli.COMMANDS[command].config))
    }
    unknown = {flag for flag in flags if flag.removeprefix("no-").replace("-", "_") not in fields}
    assert used
    assert not unknown


@pytest.mark.parametrize("name", SECTIONS)
def test_commands(name, run):
    run(name)


def test_pruning_commands_fit_a_llama_3_8b(tmp_path, monkeypatch, capsys):
    """Sizes as they are, planned from the config alone."""
    shape = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    shape.architectures = ["LlamaForCausalLM"]
    shape.save_pretrained(tmp_path / "Llama-3-8B")
    monkeypatch.chdir(tmp_path)
    pruning = [
        args[1:]
        for section in SECTIONS.values()
        for args in commands(section)
        if args[:2] == ["fastprune", "prune"]
    ]
    assert len(pruning) == 4
    for args in pruning:
        at = args.index("--out")
        planned = [*args[:at], *args[at + 2 :], "--dry-run", "--json", "plan.json"]
        assert cli.main(planned) == 0, f"{shlex.join(planned)}\n{capsys.readouterr().err}"
        found = json.loads(Path("plan.json").read_text())["ratio"]
        assert found["achieved"] == pytest.approx(found["requested"], abs=1e-3)


def test_pruning_does_what_the_script_did(run):
    run("llama3_unbalanced_pruning_gqa_aware.py")
    found = metrics("pruned-25")
    assert found["ratio"]["achieved"] == pytest.approx(
        0.25, abs=0.01
    )  # half a KV group of 8 layers
    ends = [layer for layer in found["layers"] if layer["index"] == 0]
    assert all(layer["channels"] == layer["channels_before"] for layer in ends)
    one, two = (
        json.loads(Path("runs", name, "fastprune", "layer_importance.json").read_text())
        for name in ("pruned-25", "pruned-0.20")
    )
    assert one["layer_importance"] == two["layer_importance"]


def test_finetuning_gpt2_keeps_what_the_script_kept(run):
    run("finetune_dolly.py")
    found = metrics("dolly")
    assert {sample["step"] for sample in found["samples"]} == {3, 6, None}
    assert found["stages"][0]["best"]["step"] in (3, 6)
    kept = {path.name for path in Path("runs/dolly/fastprune/state/stage-0").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_finetuning_t5_measures_bleu(run):
    run("ChatLM-mini train.py")
    stage = metrics("chat")["stages"][0]
    assert (stage["bleu"]["tokenizer"], stage["bleu"]["pairs"]) == ("zh", 3)
    log = Path("runs/chat/fastprune/train_log.jsonl").read_text().splitlines()
    evaluations = [line for line in map(json.loads, log) if "eval_bleu" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    best = max(evaluations, key=lambda line: line["eval_bleu"])
    assert stage["best"] == {"step": best["step"], "figure": best["eval_bleu"], "by": "bleu"}
