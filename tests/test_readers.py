"""JSON and YAML are read within limits, and whatever breaks one is an InputError that names it."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from fastprune import readers
from fastprune.errors import InputError
from fastprune.readers import (
    in_time,
    parse_json,
    parse_json_values,
    read_json,
    read_text,
    read_yaml,
)

DEEP = readers.MAX_DEPTH
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * (DEEP + 2) + "]" * (DEEP + 2), f"more than {DEEP} deep"),
        ('{"a":' * (DEEP + 2) + "1" + "}" * (DEEP + 2), f"more than {DEEP} deep"),
        (f"[{'9' * 5000}]", "5000 digits"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"\\udc00": 1}', "half of a surrogate pair"),
    ],
)
def test_json_beyond_a_limit_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(InputError, match=f"{file}: not JSON: .*{words}"):
        read_json(file)


def test_json_within_the_limits_is_read():
    assert parse_json(b'{"a": [1, 2.5, null, "\\ud83d\\ude00"]}') == {"a": [1, 2.5, None, "😀"]}
    assert parse_json("[" * DEEP + "]" * DEEP)
    assert parse_json('"[[[["') == "[[[["
    assert math.isnan(parse_json("[NaN]")[0])
    assert parse_json('"\\ud800"', halves=True) == "\ud800"


def test_values_one_after_the_other():
    assert parse_json_values(' {"a": 1}\n[2] 3 ') == [{"a": 1}, [2], 3]
    assert parse_json_values(" ") == []
    with pytest.raises(ValueError, match="Expecting"):
        parse_json_values("{} x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases repeat"),
        ("a: &a [*a]", "aliases repeat"),
        ("a: *b", "line 1: found undefined alias"),
        ("b: 2\na: 1\na: 2", "line 1: the key 'a' stands twice"),
        ("a: " + "[" * 3000, f"more than {DEEP} deep"),
        (f"a: {'9' * 5000}", "5000 digits"),
        (f"a: 0x{'f' * 5000}", "5002 digits"),
        ("a: !!timestamp x", "without tags"),
        ("!!python/object:os.system x", "without tags"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("a: \0", "special characters"),
        ("a: b: c", "line 1: mapping values"),
        ("? [a]\n: b", "unhashable"),
    ],
)
def test_yaml_beyond_a_limit_is_refused_at_once(tmp_path, text, words):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    start = time.process_time()
    with pytest.raises(InputError, match=f"{file}: not YAML: .*{words}"):
        read_yaml(file)
    assert time.process_time() - start < 5


def test_plain_yaml_is_read(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "a: 3:27\nb: 2020-01-01\nc: [1, -2, 0x10, 1_000]\nd: 1.5e-3\ne: .inf\nf: true\n"
        "g: ~\nh: 1e-7\nbase: &base {x: 1, y: 2}\nover: {<<: *base, x: 3}\nagain: *base\n"
    )
    assert read_yaml(file) == {
        "a": "3:27",
        "b": "2020-01-01",
        "c": [1, -2, 16, 1000],
        "d": 0.0015,
        "e": math.inf,
        "f": True,
        "g": None,
        "h": "1e-7",
        "base": {"x": 1, "y": 2},
        "over": {"x": 3, "y": 2},
        "again": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "No such file"),
        (".", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "null byte"),
        ("x" * 5000, "name too long"),
    ],
)
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    for read in (read_json, read_yaml):
        with pytest.raises(InputError, match=f"(?i)cannot be read: .*{words}"):
            read(name)


def test_a_pipe_that_no_one_writes_to_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        read_json(tmp_path / "pipe")


def test_what_is_too_large_or_no_text(tmp_path):
    file = tmp_path / "a"
    file.write_text("x" * 5000)
    with pytest.raises(InputError, match="larger than 4 KiB"):
        read_text(file, 4096)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not text"):
        read_text(file)


def endless():
    while True:
        with suppress(Exception):  # as a program may that shall not be stopped
            "x".strip()


def in_main_thread(call):
    return call()


def in_another_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("where", [in_main_thread, in_another_thread])
def test_a_program_is_interrupted_when_its_time_is_up(where):
    with pytest.raises(TimeoutError, match="too long"):
        where(lambda: in_time(endless, 0.05, "too long"))
    assert where(lambda: in_time(lambda: 3, 60, "too long")) == 3
    with pytest.raises(ZeroDivisionError):
        where(lambda: in_time(lambda: 1 / 0, 60, "too long"))


def test_programs_of_two_threads_have_their_own_times():
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(in_time, endless, 0.05, "too long")
        other = pool.submit(in_time, slow.exception, 60, "the other one")
        assert isinstance(other.result(), TimeoutError)
