"""A `.pt` of a training script becomes the GPT-2 it was, whatever wrapped it."""

import _codecs
import argparse
import collections
import functools
import importlib
import json
import pickle
import random
import subprocess
import sys
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny import TEXT, VOCABULARY, saved, tiny_gpt2, tiny_t5, tiny_tokenizer, token_ids

from fastprune import cli
from fastprune.errors import InputError
from fastprune.models.inert import read_inert
from fastprune.models.load import load_model, load_tokenizer
from fastprune.models.states import read_state

PROJECTIONS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
SETTINGS = {"n_head": 4, "n_layer": 2, "block_size": 128}


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def script_state(model, prefix="", *, linear=True):
    """The weights of `model` as a nanoGPT-like script keeps them, masks included."""
    state = {}
    for name, value in model.state_dict().items():
        if linear and name.endswith(PROJECTIONS):
            value = value.t().contiguous()
        state[prefix + name] = value
        if name.endswith("c_attn.weight"):
            mask = name.replace("c_attn.weight", "bias")
            state[prefix + mask] = torch.ones(1, 1, 128, 128)
    return state


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "conv1d"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.module.", "module."])
def test_a_checkpoint_of_a_script_is_the_model_it_was(folder, prefix, linear, caplog):
    model = tiny_gpt2()
    content = {
        "model": script_state(model, prefix, linear=linear),
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}}},
        "step": 700,
        "val_loss": 3.25,
        "config": SETTINGS,
    }
    torch.save(content, folder / "model_00700.pt")
    loaded, tokenizer = load_model(folder / "model_00700.pt")
    assert torch.equal(logits(loaded), logits(model))
    assert not loaded.training
    assert tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    assert "step 700, val_loss 3.25" in caplog.text
    assert load_model(folder / "model_00700.pt", dtype="bf16")[0].dtype == torch.bfloat16
    assert load_tokenizer(folder / "model_00700.pt")(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_names_may_lack_the_outer_module(folder):
    model = tiny_gpt2()
    state = {k.removeprefix("transformer."): v for k, v in script_state(model).items()}
    del state["lm_head.weight"]  # tied to the embedding
    torch.save({"model_args": SETTINGS, **state}, folder / "bare.pt")
    torch.save({"state_dict": state, "model_args": SETTINGS}, folder / "inner.pt")
    assert torch.equal(logits(load_model(folder / "inner.pt")[0]), logits(model))
    assert torch.equal(logits(load_model(folder / "bare.pt")[0]), logits(model))


def test_a_head_of_its_own_stays_its_own(folder):
    model = tiny_gpt2(tie_word_embeddings=False)
    torch.save({"model": script_state(model), "config": SETTINGS}, folder / "m.pt")
    loaded, _ = load_model(folder / "m.pt")
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(logits(loaded), logits(model))


def test_missing_biases_are_zeros(folder):
    model = tiny_gpt2()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    state = {k: v for k, v in script_state(model).items() if "mask" in k or not k.endswith("bias")}
    torch.save({"model": state, "model_args": SETTINGS}, folder / "m.pt")
    assert torch.equal(logits(load_model(folder / "m.pt")[0]), logits(model))


def test_a_vocabulary_rounded_up_stays_but_is_never_written(folder, tmp_path):
    model = tiny_gpt2(vocab_size=320)
    with torch.no_grad():  # a token of the padding would always win
        model.transformer.wte.weight[310] = model.transformer.wte.weight.abs().max()
    torch.save({"model": script_state(model), "config": SETTINGS}, folder / "m.pt")
    loaded, tokenizer = load_model(folder / "m.pt")
    assert loaded.config.vocab_size == 320
    assert torch.equal(logits(loaded), logits(model))
    output = loaded.generate(token_ids(1, 8), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert int(output.max()) < len(tokenizer) == VOCABULARY


def test_heads_are_counted_by_their_usual_size_or_the_config_beside(folder, caplog):
    wide = tiny_gpt2(n_embd=128, n_head=2)
    torch.save(script_state(wide), folder / "m.pt")
    assert torch.equal(logits(load_model(folder / "m.pt")[0]), logits(wide))
    assert "2 of size 64 taken" in caplog.text
    narrow = tiny_gpt2(n_embd=48, n_head=3, activation_function="gelu")
    torch.save(script_state(narrow), folder / "n.pt")
    with pytest.raises(InputError, match="n_head"):
        load_model(folder / "n.pt")
    settings = {"n_head": 3, "activation_function": "gelu"}
    (folder / "config.json").write_text(json.dumps(settings))
    assert torch.equal(logits(load_model(folder / "n.pt")[0]), logits(narrow))


def test_other_models_need_their_config_beside(folder):
    model = tiny_t5()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(state, folder / "chat_t5.best.bin")
    with pytest.raises(InputError, match=r"put the config\.json of its model beside it"):
        load_model(folder / "chat_t5.best.bin")
    model.config.save_pretrained(folder)
    loaded, _ = load_model(folder / "chat_t5.best.bin")
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(loaded(ids, labels=ids).logits, model(ids, labels=ids).logits)
    del state["module.decoder.final_layer_norm.weight"]
    torch.save(state, folder / "chat_t5.best.bin")
    with pytest.raises(InputError, match=r"1 weights are missing, first decoder\.final_layer_norm"):
        load_model(folder / "chat_t5.best.bin")


class Config:
    """What a script's own settings object is to whoever reads its checkpoint."""


def refusals():
    state = script_state(tiny_gpt2())
    cut = {k: v for k, v in state.items() if "h.1.mlp.c_fc.weight" not in k}
    odd = state | {"transformer.h.1.mlp.c_fc.weight": torch.ones(3, 5)}
    strange = state | {"transformer.h.0.attn.c_attn.weight": torch.ones(64, 64)}
    yield "nothing", {"step": 3}, "holds no weights"
    yield "missing", {"model": cut, "config": SETTINGS}, r"1 weights are missing, .*h\.1\.mlp\.c_fc"
    yield "shape", {"model": odd, "config": SETTINGS}, "fits no GPT-2"
    yield "strange", {"model": strange, "config": SETTINGS}, "fits no GPT-2"
    yield "heads", {"model": state, "config": {"n_head": 5}}, "do not make 5 heads"


@dataclass
class Slotted:
    n_head: int
    __slots__ = ("n_head",)


class Settings(dict):
    """A script's settings as a mapping of its own."""


class Losses(list):
    """What a script noted, as a list of its own."""


def foreign_settings(kind):
    config = Config()
    vars(config).update(SETTINGS)
    return {
        "object": config,
        "unknown class": config,
        "slots": Slotted(4),
        "namespace": argparse.Namespace(**SETTINGS),
        "numpy": {name: np.int64(value) for name, value in SETTINGS.items()},
    }[kind]


@pytest.mark.parametrize("kind", ["object", "unknown class", "slots", "namespace", "numpy"])
def test_other_objects_beside_the_weights_need_no_permission(folder, kind, monkeypatch, caplog):
    model = tiny_gpt2()
    content = {
        "model": script_state(model),
        "config": foreign_settings(kind),
        "step": 5,
        "val_loss": np.float64(3.25),
        "rng_state": (np.random.RandomState(1).get_state(), random.getstate()),
    }
    torch.save(content, folder / "m.pt")
    if kind == "unknown class":
        monkeypatch.delattr(sys.modules[__name__], "Config")
    loaded, _ = load_model(folder / "m.pt")
    assert torch.equal(logits(loaded), logits(model))
    assert "step 5, val_loss 3.25" in caplog.text
    assert "of size 64 taken" not in caplog.text  # the settings were understood


def test_weights_may_be_arrays(folder):
    model = tiny_gpt2()
    state = {name: value.numpy() for name, value in script_state(model).items()}
    torch.save({"model": state, "config": SETTINGS}, folder / "m.pt")
    assert torch.equal(logits(load_model(folder / "m.pt")[0]), logits(model))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["object", "slots", "namespace", "numpy", "mapping", "default"])
def test_any_protocol_and_mappings_of_any_class_need_no_permission(folder, protocol, kind, caplog):
    model = tiny_gpt2()
    if kind == "mapping":
        config = Settings(SETTINGS)
    elif kind == "default":
        config = collections.defaultdict(int, SETTINGS)
    else:
        config = foreign_settings(kind)
    state = script_state(model)
    state["transformer.wte.weight"] = torch.nn.Parameter(state["transformer.wte.weight"])
    content = {
        "model": collections.OrderedDict(state),
        "config": config,
        "val_loss": np.float64(3.25),
        "history": Losses([3.5, 3.25]),
        "rng_state": (np.random.RandomState(1).get_state(), random.getstate(), {1, 2}),
    }
    torch.save(content, folder / "m.pt", pickle_protocol=protocol)
    loaded, _ = load_model(folder / "m.pt")
    assert torch.equal(logits(loaded), logits(model))
    assert "val_loss 3.25" in caplog.text
    assert "of size 64 taken" not in caplog.text  # the settings were understood


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool])
def test_tensors_of_a_late_protocol_are_what_they_were(tmp_path, dtype):
    flat = torch.arange(60).to(dtype)
    content = {"a": flat.view(5, 12).t(), "b": flat[7:19], "c": torch.zeros(0, dtype=dtype)}
    torch.save(content, tmp_path / "m.pt", pickle_protocol=4)
    found = read_inert(tmp_path / "m.pt")
    assert all(torch.equal(found[name], value) for name, value in content.items())
    assert found["a"].untyped_storage().data_ptr() == found["b"].untyped_storage().data_ptr()


@pytest.mark.parametrize("allow", [False, True])
def test_permission_is_not_asked_for_where_it_cannot_help(folder, allow):
    for content in (tiny_gpt2(), {"model": tiny_gpt2()}):
        torch.save(content, folder / "m.pt")
        with pytest.raises(InputError, match=r"save model\.state_dict\(\) instead") as error:
            load_model(folder / "m.pt", allow_pickle=allow)
        assert "--allow-pickle" not in str(error.value)


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Build:
    """Pickles as the result of a call, to which a state is then given."""

    def __init__(self, function, state):
        self.call = (function, (), state)

    def __reduce__(self):
        return self.call


def hostile(mark):
    touch = f"open({str(mark)!r}, 'w').close()"
    yield "eval", Calls(eval, touch)
    yield "exec", Calls(exec, touch)
    yield "getattr", Calls(getattr, Calls(__import__, "pathlib"), "Path")
    yield "import", Calls(importlib.import_module, "this")
    yield "partial", Calls(functools.partial(eval, touch))
    yield "subprocess", Calls(subprocess.Popen, ["touch", str(mark)])
    yield "codecs", Calls(_codecs.lookup, "this")
    yield "load", Calls(pickle.loads, pickle.dumps(Calls(eval, touch)))
    yield "file", Calls(open, str(mark), "w")
    yield "state", Build(print, {"__call__": Calls(eval, touch)})
    yield "defaults", Build(torch.load, (None, {"__defaults__": (1,)}))


@pytest.mark.parametrize("name", [name for name, _ in hostile("x")])
def test_nothing_in_a_file_is_called_or_imported(folder, name):
    model, mark = tiny_gpt2(), folder / "mark"
    attack = dict(hostile(mark))[name]
    content = {"attack": attack, "model": script_state(model), "config": SETTINGS}
    torch.save(content, folder / "m.pt")
    before = set(sys.modules)
    if name == "partial":  # the result of a call is called
        with pytest.raises(InputError):
            load_model(folder / "m.pt")
    else:
        assert torch.equal(logits(load_model(folder / "m.pt")[0]), logits(model))
    assert not mark.exists()
    assert "this" not in set(sys.modules) - before
    assert torch.load.__defaults__ != (1,)


@pytest.mark.parametrize("name", [name for name, _ in hostile("x")])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nothing_in_a_file_of_any_protocol_is_called_or_imported(tmp_path, name, protocol):
    mark = tmp_path / "mark"
    attack = dict(hostile(mark))[name]
    before = set(sys.modules)
    content = {"attack": attack, "config": Settings(SETTINGS), "w": torch.ones(2)}
    torch.save(content, tmp_path / "m.pt", pickle_protocol=protocol)
    if name == "partial":  # the result of a call is called
        with pytest.raises(TypeError, match="not callable"):
            read_inert(tmp_path / "m.pt")
    else:
        assert torch.equal(read_inert(tmp_path / "m.pt")["w"], torch.ones(2))
    assert not mark.exists()
    assert "this" not in set(sys.modules) - before
    assert torch.load.__defaults__ != (1,)


def forged(path, stream):
    """A file of torch.save with another pickle in it."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in content.items():
            new.writestr(name, stream if name.endswith("data.pkl") else data)


STREAMS = {
    "getattr": b"\x80\x02cbuiltins\ngetattr\ncpathlib\nPath\nX\x03\x00\x00\x00cwd\x86R)R.",
    "system": b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
    "module": b"cos.path\nexists\n(X\x04\x00\x00\x00truetR.",
    "late memo": b"\x80\x04}r\xff\xff\xff\x7f.",
    "late system": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x04truet\x85R.",
    "late storage": b"\x80\x04(\x8c\x07storage\x8c\x08builtins\x8c\x04eval\x93\x8c\x010"
    b"\x8c\x03cpuK\x01tQ.",
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "persistent": b"\x80\x02X\x06\x00\x00\x00moduleQ.",
    "persistent call": b"\x80\x02(X\x07\x00\x00\x00storagecbuiltins\neval\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x01tQ.",
    "extension": b"\x80\x02\x82\x01.",
    "length": b"\x80\x02X\xff\xff\xff\xff.",
    "many": b"\x80\x02]q\x00(" + b"h\x00h\x00" * 9 + b"e.",
    "array": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "stack": b"\x80\x02RRRR.",
    "endless": b"\x80\x02" + b"(" * 100,
}


@pytest.mark.parametrize("name", STREAMS)
def test_forged_streams_are_refused(folder, name):
    forged(folder / "m.pt", STREAMS[name])
    with pytest.raises(InputError) as error:
        load_model(folder / "m.pt")
    assert "\n" not in str(error.value)
    if name in ("system", "module"):
        assert "truncated" not in str(error.value)


def test_the_operating_system_is_never_called(folder):
    forged(folder / "m.pt", STREAMS["system"])
    with pytest.raises(InputError, match="do not load it") as error:
        load_model(folder / "m.pt")
    assert "--allow-pickle" not in str(error.value)


def test_a_tokenizer_may_be_named(tmp_path, capsys):
    words = tmp_path / "words"
    tiny_tokenizer().save_pretrained(words)
    torch.save({"model": script_state(tiny_gpt2()), "config": SETTINGS}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="name one with --tokenizer"):
        load_model(tmp_path / "m.pt")
    (tmp_path / "t.txt").write_text(TEXT * 4)
    call = ["eval", str(tmp_path / "m.pt"), "--text", str(tmp_path / "t.txt")]
    call += ["--seq-len", "32", "--windows", "2"]
    assert cli.main([*call, "--tokenizer", str(words)]) == 0
    capsys.readouterr()
    assert cli.main([*call, "--tokenizer", str(tmp_path / "none")]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert cli.main([*call, "--tokenizer", str(tmp_path)]) == 2
    assert "no tokenizer in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [pytest.param(*r[1:], id=r[0]) for r in refusals()]
)
def test_what_is_not_a_gpt2_is_refused(folder, content, message):
    torch.save(content, folder / "m.pt")
    with pytest.raises(InputError, match=message) as error:
        load_model(folder / "m.pt")
    assert "\n" not in str(error.value)


def test_damaged_files_are_refused(folder):
    torch.save({"model": script_state(tiny_gpt2())}, folder / "m.pt")
    whole = (folder / "m.pt").read_bytes()
    (folder / "m.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_model(folder / "m.pt")
    (folder / "m.pt").write_bytes(b"")
    with pytest.raises(InputError, match="truncated or corrupt"):
        load_model(folder / "m.pt")


def test_tokenizers(tmp_path):
    torch.save({"model": script_state(tiny_gpt2()), "config": SETTINGS}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"vocab\.json and merges\.txt"):
        load_model(tmp_path / "m.pt")
    settings = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = dict(settings["vocab"])
    vocabulary["<|endoftext|>"] = vocabulary.pop("<|end|>")
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in settings["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    model, tokenizer = load_model(tmp_path / "m.pt")
    assert tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    vocabulary |= {f"more{i}": VOCABULARY + i for i in range(9)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match="309 tokens, the model only 300"):
        load_model(tmp_path / "m.pt")


def test_the_file_may_change_once_it_is_read(folder):
    torch.save({"model": script_state(tiny_gpt2())}, folder / "m.pt")
    weights = read_state(folder / "m.pt").weights
    before = {name: value.clone() for name, value in weights.items()}
    with (folder / "m.pt").open("r+b") as file:
        file.write(b"\0" * (folder / "m.pt").stat().st_size)
    assert all(torch.equal(weights[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_every_command_but_prune_takes_it(tmp_path, capsys, kind):
    model = saved(tmp_path / kind, tiny_gpt2() if kind == "gpt2" else tiny_t5())
    (tmp_path / "text.txt").write_text(TEXT * 4)
    text = ["--text", str(tmp_path / "text.txt"), "--seq-len", "32", "--windows", "2"]
    assert cli.main(["eval", str(model), *text]) == 0
    assert cli.main(["generate", str(model), "--prompt", "The river", "--max-new-tokens", "5"]) == 0
    capsys.readouterr()
    assert cli.main(["prune", str(model), "--ratio", "0.2", "--out", str(tmp_path / "out")]) == 2
    assert "fastprune prunes cohere, " in capsys.readouterr().err
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["prune", str(model), "--ratio", "0.2", "--stream", *out]) == 2
    assert "fastprune prunes cohere, " in capsys.readouterr().err
