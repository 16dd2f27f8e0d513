"""A tiny model of a family goes through the commands, and the page that says which took it."""

from __future__ import annotations

from pathlib import Path

from tiny import TEXT, tiny_checkpoint

from fastprune import cli
from fastprune.models.families import FAMILIES

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "families.md"
FORMS = {"hf-uniform": "small", "gguf": "wide", "nemotron-nas": "wide"}
"""Forms of export, and which checkpoint is exported: a pruned one, or one with layers alike."""
MARKS = {0: "✓", 2: "–"}
"""What a command's exit status is shown as; any other is a fault."""
ABOUT = """# Families and commands

The model types that can be pruned, and the commands that ran on each: a tiny model with random
weights goes through them one after the other, and each reads the checkpoint of one before it. Both
times `prune` removes KV groups and channels, and compensates; without `--stream` it also removes
whole sublayers, by `--allocation search`. Of a mixture of experts it removes KV groups and experts.
`merge`, `diagnose` and `eval` take what LoRA has learnt. `hf-uniform` exports a checkpoint whose
layers differ in size, `gguf` and `nemotron-nas` one whose layers are alike.

✓: ran. –: refused in one line, before any work, since the form has no place for such a model. "Not
with" are settings in a model's `config.json` with which it is refused by `prune` alone.

`python tools/family_table.py` writes this page, and the tests hold it against what they run.
"""


def take_through(family: str, folder: Path) -> dict[str, int]:
    """The exit status of each command on a tiny model of ``family``, by the column's title."""
    (folder / "text.txt").write_text(TEXT * 40)
    # AutoTokenizer gives Qwen2 a token of its own beside those of the tiny tokenizer
    tiny_checkpoint(folder / "dense", family, vocab_size=304)
    # heads that fill the hidden size, channels by the multiple, and experts in every layer, as
    # readers of some forms need
    sizes = {"hidden_size": 128, "intermediate_size": 256, "layers": 2}
    experts = FAMILIES[family.partition("-")[0]].mixture is not None
    if experts:
        sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "mlp_only_layers": []}
    tiny_checkpoint(folder / "wide", family, vocab_size=304, **sizes)
    return {
        title: cli.main([*words, "--device", "cpu", "--quiet"])
        for title, words in _commands(folder, experts).items()
    }


def titles() -> list[str]:
    """The columns of the table, in order."""
    return list(_commands(Path()))


def row(family: str, statuses: dict[str, int]) -> str:
    """The line of the table for ``family``."""
    refused = " or ".join(f"`{name}`" for name in FAMILIES[family].refused)
    marks = [MARKS[statuses[title]] for title in titles()]
    return _line([f"`{family}`", *marks, refused])


def header() -> str:
    """The first two lines of the table."""
    columns = ["model type", *titles(), "not with"]
    return "\n".join([_line(columns), _line(["---"] * len(columns))])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _commands(folder: Path, experts: bool = False) -> dict[str, list[str]]:
    text, dense, small, adapter, merged = (
        str(folder / name) for name in ("text.txt", "dense", "small", "lora", "merged")
    )
    measured = ["--text", text, "--seq-len", "32", "--windows", "2"]
    windows = ["--eval", text, "--eval-seq-len", "32", "--eval-windows", "2", "--keep-worse"]
    learnt = ["--data", text, "--seq-len", "32", "--batch-size", "2", "--max-steps", "2", *windows]
    calib = ["--calib", text, "--calib-samples", "16", "--calib-seq-len", "32", *windows]

    def out(name: str) -> list[str]:
        return ["--out", str(folder / name)]

    every = ["--structures", "attention,mlp,sublayer", "--allocation", "search"]
    units = ["--structures", "attention,mlp", "--align", "1", "--stream"]
    if experts:
        every = ["--structures", "attention,experts"]
    found = {
        "prune": ["prune", dense, *out("small"), "--ratio", "0.3", *calib, *every],
        "prune --stream": ["prune", dense, *out("streamed"), "--ratio", "0.2", *calib, *units],
        "finetune": ["finetune", small, *out("full"), *learnt],
        "finetune --method lora": ["finetune", small, *out("lora"), "--method", "lora", *learnt],
        "merge": ["merge", small, "--adapter", adapter, *out("merged")],
        "diagnose": ["diagnose", merged, "--dense", dense, *measured],
        "eval": ["eval", merged, *measured],
        "generate": ["generate", small, "--prompt", "The river", "--max-new-tokens", "4"],
    }
    for form, source in FORMS.items():
        words = ["export", str(folder / source), "--format", form, *out(form)]
        found[f"export {form}"] = words
    return found
