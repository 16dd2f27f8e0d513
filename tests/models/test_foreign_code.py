"""Python code that comes with a model is not run, asked for, or copied, unless the user says so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TEXT, saved, tiny_checkpoint, tiny_model, tiny_tokenizer

from fastprune import cli
from fastprune.errors import InputError
from fastprune.models import modeling
from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.conform import conform
from fastprune.models.families import Geometry
from fastprune.models.load import load_config, load_model, load_tokenizer
from fastprune.models.shards import ShardReader

MODELLING = """
from transformers import LlamaConfig, LlamaForCausalLM

class ForeignConfig(LlamaConfig):
    model_type = "foreign"

class ForeignModel(LlamaForCausalLM):
    config_class = ForeignConfig
"""
AUTO_MAP = {"AutoConfig": "foreign.ForeignConfig", "AutoModelForCausalLM": "foreign.ForeignModel"}


def edit(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Yes is what whoever would be asked says."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture
def folder(tmp_path):
    """A Llama that says it is of another type, and brings the code for it."""
    path = tiny_checkpoint(tmp_path / "model", "llama", layers=2)
    edit(path / "config.json", model_type="foreign", auto_map=AUTO_MAP)
    (path / "foreign.py").write_text(MODELLING)
    return path


@pytest.mark.parametrize("load", [load_model, load_config])
def test_code_of_a_model_is_not_run_unasked(folder, load):
    with pytest.raises(InputError, match="pass --trust-remote-code") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_code_of_a_model_is_run_where_trusted(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, _ = load_model(folder, trust_remote_code=True)
    assert type(model).__name__ == "ForeignModel"


def test_code_of_a_tokenizer_is_not_run_unasked(tmp_path):
    path = tiny_checkpoint(tmp_path / "model", "llama", layers=2)
    auto_map = {"AutoTokenizer": [None, "foreign.Tokenizer"]}
    edit(path / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="ForeignTokenizer")
    (path / "foreign.py").write_text("raise SystemExit('ran')")
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match="pass --trust-remote-code"):
            load(path)


def test_code_that_was_not_run_is_not_passed_on(tmp_path):
    path = tiny_checkpoint(tmp_path / "model", "llama", layers=2)
    edit(path / "config.json", auto_map=AUTO_MAP)
    edit(path / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "foreign.Tokenizer"]})
    (path / "foreign.py").write_text("raise SystemExit('ran')")
    model, tokenizer = load_model(path)
    out = saved(tmp_path / "out", model)
    tokenizer.save_pretrained(out)
    assert not list(out.glob("*.py"))
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((out / name).read_text())


@pytest.mark.parametrize(("command", "status"), [("eval", 2), ("generate", 2), ("diagnose", 4)])
def test_the_flag_is_the_one_way(folder, command, status, capfd, home):
    options = {"eval": ["--seq-len", "32", "--windows", "1"], "generate": ["--prompt", "a"]}
    words = [command, str(folder), "--quiet", *options.get(command, [])]
    assert cli.main(words) == status
    assert capfd.readouterr().err.count("\n") == 1
    assert not home.exists()


def test_our_own_folders_ask_nobody(tmp_path):
    model = tiny_model("llama")
    conform(model, [Geometry(8, 4, 96, 16)] * 3 + [Geometry(0, 0, 96, 16)])
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    script = f"""
import builtins, fastprune
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
builtins.input = None  # asking would fail
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
AutoConfig.from_pretrained({str(tmp_path)!r})
AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(tokenizer({TEXT!r}).input_ids)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == tiny_tokenizer()(TEXT).input_ids


@pytest.mark.parametrize("trust", [False, True])
def test_the_modelling_file_of_a_per_layer_checkpoint_is_not_run(tmp_path, trust):
    """The layers are this program's own, whatever the file says that came with the weights."""
    model = tiny_model("llama")
    conform(model, [Geometry(8, 4, 96, 16)] * 3 + [Geometry(0, 0, 96, 16)])
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    file = tmp_path / "modeling_fastprune.py"
    assert file.read_bytes() == Path(modeling.__file__).read_bytes()
    file.write_text("raise SystemExit('ran')")
    read, _ = load_model(tmp_path, trust_remote_code=trust)
    assert type(read).__module__ == "fastprune.models.modeling"
    again = tmp_path / "again"
    again.mkdir()
    save_checkpoint(read, tiny_tokenizer(), again)
    assert (again / file.name).read_bytes() == Path(modeling.__file__).read_bytes()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/tmp/secret.safetensors"])
@pytest.mark.parametrize("read", [load_model, ShardReader])
def test_an_index_does_not_name_files_of_other_folders(tmp_path, name, read):
    path = tiny_checkpoint(tmp_path / "model", "llama", layers=2)
    (path / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="outside of its folder"):
        read(path)


def test_nor_do_the_settings_of_a_tokenizer(tmp_path):
    path = tiny_checkpoint(tmp_path / "model", "llama", layers=2)
    edit(path / "tokenizer_config.json", merges_file="/home/me/.ssh/id", tokenizer_class="GPT2")
    load_tokenizer(path)  # which tokenizer.json is enough for
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(InputError, match=r"/home/me/\.ssh/id, which is outside of its folder"):
        load_tokenizer(path)
