"""Weights in dtypes that no model is computed in: what each command does with them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEXT, tiny_checkpoint

from fastprune import cli
from fastprune.errors import InputError
from fastprune.models.load import load_model
from fastprune.models.streamed import StreamedModel

NAME = "model.layers.0.mlp.up_proj.weight"
REFUSED = (torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64)


def store(folder, change):
    """A tiny model with the weights that `change` makes of its own."""
    tiny_checkpoint(folder, layers=2)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return file


def commands(folder, out):
    text = folder / "text.txt"
    text.write_text(TEXT * 20)
    measured = ["--text", text, "--seq-len", "32", "--windows", "2"]
    evaluated = ["--eval", text, "--eval-seq-len", "32", "--eval-windows", "2", "--keep-worse"]
    calibrated = ["--calib", text, "--calib-samples", "4", "--calib-seq-len", "32", *evaluated]
    learnt = ["--data", text, "--seq-len", "32", "--batch-size", "2", "--max-steps", "1"]
    return {
        "eval": ["eval", folder, *measured],
        "diagnose": ["diagnose", folder, *measured],
        "prune": ["prune", folder, "--ratio", "0.2", *calibrated, "--out", out / "p"],
        "stream": ["prune", folder, "--ratio", "0.2", "--stream", *calibrated, "--out", out / "s"],
        "finetune": ["finetune", folder, *learnt, *evaluated, "--out", out / "f"],
        "lora": ["finetune", folder, *learnt, *evaluated, "--method", "lora", "--out", out / "a"],
        "merge": ["merge", folder, "--adapter", out / "a", "--out", out / "m"],
        "hf": ["export", folder, "--format", "hf", "--out", out / "h"],
        "gguf": ["export", folder, "--format", "gguf", "--out", out / "g.gguf"],
    }


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
def test_every_command_refuses_what_is_no_weight(tmp_path, capsys, dtype):
    folder, out = tmp_path / "model", tmp_path / "out"
    store(folder, lambda weights: weights | {NAME: weights[NAME].to(dtype)})
    (out / "a").mkdir(parents=True)
    capsys.readouterr()  # what was said while the model was written
    for name, words in commands(folder, out).items():
        assert cli.main([*map(str, words), "--quiet", "--device", "cpu"]) == 2, name
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and (f"{NAME} is stored as" in error or name == "merge"), error
    assert [path.name for path in out.iterdir()] == ["a"]


def test_positions_and_masks_beside_the_weights_may_be_integers(tmp_path):
    beside = {"model.position_ids": torch.arange(8), "model.mask": torch.ones(3) > 0}
    store(tmp_path, lambda weights: weights | beside)
    load_model(tmp_path)


@pytest.mark.parametrize("named", [True, False])
def test_float64_is_read_as_float32_by_every_command(tmp_path, named):
    """Also where the config names no dtype, so that the weights' own would be taken."""
    folder, out = tmp_path / "model", tmp_path / "out"
    file = store(folder, lambda weights: {name: t.double() for name, t in weights.items()})
    config = json.loads((folder / "config.json").read_text())
    if not named:
        del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    for name, words in commands(folder, out).items():
        assert cli.main([*map(str, words), "--quiet", "--device", "cpu"]) == 0, name
    assert StreamedModel(folder).dtype == torch.float32
    assert {t.dtype for t in load_file(out / "h" / "model.safetensors").values()} == {torch.float32}
    torch.save(load_file(file), folder / "weights.pt")
    for source in (folder, folder / "weights.pt"):
        model, _ = load_model(source)
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_weight_of_integers_in_a_file_of_weights_alone(tmp_path):
    file = store(tmp_path, lambda weights: weights | {NAME: weights[NAME] > 0})
    torch.save(load_file(file), tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"up_proj\.weight is stored as bool"):
        load_model(tmp_path / "weights.pt")
