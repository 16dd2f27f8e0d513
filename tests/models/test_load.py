"""Every source loads, every broken one is named in one line, and nothing is filled in at random."""

import json
import shutil
import sys
import threading
from types import ModuleType

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from tiny import TEXT, tiny_checkpoint, tiny_model, tiny_tokenizer, token_ids

from fastprune.errors import InputError
from fastprune.models import foreign, load
from fastprune.models.conform import conform
from fastprune.models.families import Geometry, geometries
from fastprune.models.load import load_config, load_model, load_tokenizer
from fastprune.models.streamed import StreamedModel


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint(tmp_path / "model", "llama")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastprune"


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_folder_loads_in_the_wanted_dtype(folder, name, dtype):
    model, tokenizer = load_model(folder, dtype=name)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
    assert tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids


def test_auto_keeps_the_dtype_of_the_checkpoint(tmp_path):
    tiny_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.bfloat16


def test_loading_prints_nothing(folder, capfd):
    load_model(folder)
    assert capfd.readouterr() == ("", "")


def test_config_and_tokenizer_alone(folder):
    assert load_config(str(folder)).hidden_size == 64
    assert load_tokenizer(folder)(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def scramble(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_queries(folder):
    tensors = load_file(folder / "model.safetensors")
    for name, dim in {"q_proj": 0, "o_proj": 1}.items():
        key = f"model.layers.1.self_attn.{name}.weight"
        tensors[key] = tensors[key].narrow(dim, 0, 64).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def break_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def rename_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "not_a_model"}))


def configure(**settings):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return edit


def point(name):
    return write(name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def add_bias(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(128)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def wrap_twice(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["module.model.norm.weight"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "no config.json"),
        (write("config.json", "{"), "config.json: broken"),
        (write("config.json", "[]"), "config.json: broken"),
        (write("config.json", '{"model_type": 3}'), "config.json: broken"),
        (rename_type, "not_a_model"),
        (remove("model.safetensors"), "no weights"),
        (truncate, "model.safetensors: truncated or corrupt"),
        (scramble, "model.safetensors: truncated or corrupt"),
        (drop_tensor, r"1 weights are missing, first model\.layers\.1\.mlp\.up_proj"),
        (cut_tensor, r"up_proj\.weight has the shape \(95, 64\), the config says \(96, 64\)"),
        (cut_queries, r"layer 1 has 4 query and 4 KV heads, other layers 2 query heads to a KV"),
        (lose_shard, "model-00001-of-00002.safetensors is missing"),
        (break_index, "broken index"),
        (remove("tokenizer.json"), "no tokenizer"),
        (write("tokenizer.json", "{"), "broken tokenizer"),
        (write("tokenizer_config.json", '{"model_max_length": ""}'), "broken tokenizer"),
        (point("model.safetensors"), r"model\.safetensors: a Git LFS pointer, .*git lfs pull"),
        (point("tokenizer.json"), r"tokenizer\.json: a Git LFS pointer"),
        (point("config.json"), r"config\.json: a Git LFS pointer"),
        (configure(num_attention_heads=7), r"hidden size \(64\) is not a multiple of .* \(7\)"),
        (configure(num_hidden_layers=3), r"9 weights of its layers are not used, .*layers\.3\."),
        (
            configure(vocab_size=299),
            r"tokens\.weight has the shape \(300, 64\), .*\(299, 64\)",
        ),
        (configure(hidden_size=32), r"has the shape .*, the config says"),
        (add_bias, r"1 weights of its layers are not used, first .*\.q_proj\.bias: the config"),
        (wrap_twice, "both with and without the prefix"),
    ],
)
def test_broken_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such file"),
        ("./none", "no such file"),
        ("owner/no-such-model", "could be fetched"),
        ("..none", "no such file"),
        ("", "no MODEL given"),
    ],
)
def test_unknown_sources_are_refused(source, message):
    with pytest.raises(InputError, match=message):
        load_model(source)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "fake.gguf").write_text("hello")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    for name, message in (
        ("notes.txt", "not a model"),
        ("fake.gguf", "not a GGUF"),
        ("damaged.gguf", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / name)


def test_unused_weights_are_mentioned(folder, caplog):
    tensors = load_file(folder / "model.safetensors")
    tensors["value_head.weight"] = torch.zeros(2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # of older releases
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder)
    assert "1 weights are not used, first value_head.weight" in caplog.text


def wrap(weights, prefix):
    return {prefix + name: value.clone() for name, value in weights.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.module.module."])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "pt"])
def test_prefixes_of_wrappers_are_no_part_of_a_name(folder, kind, prefix):
    expected = logits(load_model(folder)[0])
    weights = wrap(load_file(folder / "model.safetensors"), prefix)
    names = [name.replace(".layers.0.", ".layers.0._orig_mod.") for name in weights]
    weights = dict(zip(names, weights.values(), strict=True))  # a layer compiled by itself
    source = folder
    if kind == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        file = folder / {"bin": "pytorch_model.bin", "pt": "weights.pt"}[kind]
        torch.save(weights, file)
        source = folder if kind == "bin" else file
    loaded, _ = load_model(source)
    assert torch.equal(logits(loaded), expected)
    assert load_model(source, dtype="bf16")[0].dtype == torch.bfloat16
    if kind == "safetensors":
        streamed = StreamedModel(source)
        assert torch.equal(streamed.read("model.norm.weight"), loaded.model.norm.weight)


def cut_layers(folder):
    """Other sizes in the files than in the config, as other pruners leave them."""
    model = load_model(folder)[0]
    plan = [Geometry(8, 4, 96, 16), Geometry(4, 2, 50, 16), *[Geometry(8, 4, 96, 16)] * 2]
    tensors = dict(load_file(folder / "model.safetensors"))
    rows = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 50, "up_proj": 50}
    columns = {"o_proj": 64, "down_proj": 50}
    for name, tensor in tensors.items():
        short = name.split(".")[-2]
        if name.startswith("model.layers.1.") and short in rows:
            tensors[name] = tensor[: rows[short]].clone()
        elif name.startswith("model.layers.1.") and short in columns:
            tensors[name] = tensor[:, : columns[short]].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model, plan


def test_sizes_that_the_config_does_not_say_are_read_off_the_weights(folder, caplog):
    dense, plan = cut_layers(folder)
    loaded, _ = load_model(folder)
    assert geometries(loaded) == plan
    assert "sizes are read off the weights" in caplog.text
    assert not torch.equal(logits(loaded), logits(dense))
    caplog.clear()
    streamed = StreamedModel(folder)
    assert geometries(streamed.model) == plan
    assert "sizes are read off the weights" in caplog.text
    for name, weight in loaded.named_parameters():
        assert torch.equal(streamed.read(name), weight)


def test_demo_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"fastprune\[demo\]"):
        load_model("smollm2-135m")


def test_pickles_need_permission(tmp_path):
    model = tiny_model("llama")
    conform(model, [Geometry(8, 4, 96, 16)] * 3 + [Geometry(0, 0, 96, 16)])
    path = tmp_path / "pytorch_model.bin"
    torch.save({"model": model, "tokenizer": tiny_tokenizer()}, path)
    with pytest.raises(InputError, match="--allow-pickle"):
        load_model(path)
    loaded, _ = load_model(path, allow_pickle=True, dtype="bf16")
    assert loaded.dtype == torch.bfloat16
    loaded, _ = load_model(path, allow_pickle=True)
    assert geometries(loaded) == geometries(model)
    assert torch.equal(logits(loaded), logits(model))


def test_pickles_of_classes_that_are_gone(tmp_path, monkeypatch):
    model, module = tiny_model("llama"), ModuleType("gone")
    monkeypatch.setitem(sys.modules, "gone", module)
    for part in (*model.modules(), model.config):
        kind = type(part)
        if kind.__module__.startswith("transformers.models.llama") and part is not model.config:
            new = type(kind.__name__, (kind,), {"__module__": "gone"})
            part.__class__ = vars(module).setdefault(kind.__name__, new)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"model": model, "tokenizer": tiny_tokenizer()}, path)
    monkeypatch.delitem(sys.modules, "gone")
    loaded, _ = load_model(path, allow_pickle=True)
    assert type(loaded).__module__ != "gone"
    assert torch.equal(logits(loaded), logits(tiny_model("llama")))


def test_pickles_of_other_things_are_refused(tmp_path):
    torch.save({"weights": 1}, tmp_path / "a.bin")
    (tmp_path / "b.bin").write_text("hello")
    for name, message in (("a.bin", "holds no weights"), ("b.bin", "truncated or corrupt")):
        with pytest.raises(InputError, match=message):
            load_model(tmp_path / name, allow_pickle=True)


@pytest.fixture(scope="module")
def gguf_model():
    return tiny_model("llama", layers=2, head_dim=8)


@pytest.fixture
def gguf_file(tmp_path, gguf_model):
    return write_gguf(tmp_path / "tiny.gguf", gguf_model)


def test_gguf_loads_as_a_plain_model(gguf_file, gguf_model, tmp_path, capfd):
    model, tokenizer = load_model(gguf_file)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(logits(model), logits(gguf_model))
    assert tokenizer(TEXT).input_ids == tiny_tokenizer()(TEXT).input_ids
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "saved")  # refused while marked as quantised


def test_gguf_is_converted_once(gguf_file, gguf_model, cache, monkeypatch):
    load_model(gguf_file)
    assert [p.name.split("-")[0] for p in cache.iterdir()] == ["gguf"]
    monkeypatch.setattr(foreign, "_save_dequantised", None)  # calling it would fail
    assert torch.equal(logits(load_model(gguf_file)[0]), logits(gguf_model))


@pytest.mark.parametrize("damage", [truncate, remove("model.safetensors"), remove("config.json")])
def test_damaged_copies_are_converted_again(gguf_file, gguf_model, cache, damage):
    load_model(gguf_file)
    damage(next(cache.iterdir()))
    assert torch.equal(logits(load_model(gguf_file)[0]), logits(gguf_model))


def test_interrupted_conversion_leaves_nothing(gguf_file, cache, monkeypatch):
    def interrupted(path, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(foreign, "_save_dequantised", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(gguf_file)
    assert list(cache.iterdir()) == []


def test_of_concurrent_callers_one_converts(gguf_file, cache, monkeypatch):
    original, converted = foreign._save_dequantised, []

    def convert(path, folder):
        converted.append(folder)
        original(path, folder)

    monkeypatch.setattr(foreign, "_save_dequantised", convert)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(foreign.convert_gguf(gguf_file)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 2
    assert len(converted) == 1
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("name", ["mine", f"gguf-{foreign.LAYOUT}-0123"])
def test_a_model_of_the_user_in_the_cache_folder_stays(cache, name):
    """Whatever is wrong with it: only copies that were made here are made anew."""
    folder = tiny_checkpoint(cache / name, layers=2)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="broken"):
        load_model(folder)
    assert (folder / "model.safetensors").is_file()


def test_a_cache_that_cannot_be_made_is_told(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"Not a directory; name another folder .* XDG_CACHE_HOME"):
        load_model(gguf_file)


def test_a_cache_without_room_is_told(gguf_file, cache, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="0 kB are free"):
        load_model(gguf_file)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("value", [2**63, [1, {"a": -(10**20)}]])
def test_numbers_of_a_config_fit_into_64_bits(tmp_path, value):
    model = tiny_checkpoint(tmp_path / "model", layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": value}))
    with pytest.raises(InputError, match=r"broken or unknown config: .* is too large a number"):
        load_config(model)


def test_a_tokenizer_whose_library_panics_is_broken(tmp_path, capfd):
    model = tiny_checkpoint(tmp_path / "model", layers=1)
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["model"]["continuing_subword_prefix"] = "x" * 40
    (model / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="broken tokenizer: range end index"):
        load_tokenizer(model)
