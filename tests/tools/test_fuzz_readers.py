"""tools/fuzz_readers.py: every reader takes its sound input, and refuses a malformed one."""

import json
import sys
from types import SimpleNamespace

import pytest
from programs import program

from fastprune.errors import FastpruneError

fuzz_readers = program("fuzz_readers.py")
NAMES = [
    *("json", "yaml", "plan", "importance", "settings", "recipe", "safetensors", "index"),
    *("config", "adapter", "gguf", "data.json", "data.jsonl", "data.csv"),
]


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return fuzz_readers._readers(tmp_path_factory.mktemp("sound"))


def test_all_readers_are_named(readers):
    assert list(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_input_is_read_and_a_malformed_one_refused(readers, name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reader = readers[name]
    reader.put(tmp_path, reader.sound)
    reader.read(tmp_path)
    reader.put(tmp_path, b"\xff" + reader.sound)
    with pytest.raises(FastpruneError):
        reader.read(tmp_path)


def test_values_of_json_are_changed(monkeypatch):
    atheris = SimpleNamespace(Mutate=lambda data, size: data[:size])
    monkeypatch.setitem(sys.modules, "atheris", atheris)
    found = {fuzz_readers._mutated(b'{"a": [1, 2]}', 1000, seed) for seed in range(20)}
    assert len(found) > 3
    assert all(isinstance(json.loads(text), dict) for text in found)
    assert fuzz_readers._mutated(b'{"a": [1, 2]', 5, 0) == b'{"a":'
