"""A sample of the malformed inputs of tools/bad_inputs, run in this process.

The tool itself runs thousands of them, in processes with limits on memory and time.
"""

import io
import os
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tools" / "bad_inputs"))

from case import Case
from inputs import all_cases, make_base
from pool import LINES, change_of, listed, problem_of, run

from fastprune import cli

COUNT = 40


def test_a_sample_of_malformed_inputs_is_refused(tmp_path, monkeypatch):
    cases = all_cases(make_base(tmp_path / "base"), seed=0)
    assert len(cases) > 2000
    assert len({case.name for case in cases}) > 2000
    random.Random(0).shuffle(cases)
    refused = [case for case in cases if case.expected == (2,)]
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for number, case in enumerate(refused[:COUNT]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        found = run(case, folder, cache, lambda o=out, e=err: [o.getvalue(), e.getvalue()])
        assert not found.problem, found


def test_what_the_tool_looks_for_on_stderr_is_found(tmp_path):
    case = Case("sound", lambda _: ["info"], expected=(2,))
    line = "fastprune: error: a.json: not JSON"
    assert problem_of(case, 2, f"{line}\n") == ""
    assert problem_of(case, 0, "") == "exit 0"
    assert problem_of(case, 1, f"{line}\n") == "exit 1"
    assert problem_of(case, 2, "") == "not one line of an error"
    assert problem_of(case, 2, f"{line}\nmore\n") == "not one line of an error"
    assert problem_of(case, 2, f"Traceback\n{line}\n") == "traceback"
    assert problem_of(case, 2, f"{line}\x1b[2J\n") == "control characters"
    assert problem_of(case, 2, "warned\n" * LINES + f"{line}\n") == "many lines"


def test_what_the_tool_looks_for_among_files_is_found(tmp_path):
    (tmp_path / "given").write_text("a")
    before = listed(tmp_path)
    assert change_of(before, listed(tmp_path), whole=True) == ""
    (tmp_path / "out").mkdir()
    assert change_of(before, listed(tmp_path), whole=False) == ""
    assert change_of(before, listed(tmp_path), whole=True) == "left behind: out"
    (tmp_path / "out" / ".new").touch()
    left = os.path.join("out", ".new")
    assert change_of(before, listed(tmp_path), whole=False) == f"left behind: {left}"
    (tmp_path / "given").write_text("ab")
    assert change_of(before, listed(tmp_path), whole=False) == "changed: given"
    (tmp_path / "given").unlink()
    assert change_of(before, listed(tmp_path), whole=True) == "changed: given"


def test_control_characters_on_stdout_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda _: 0)
    for command, problem in {"eval": "control characters on stdout", "generate": ""}.items():
        case = Case(command, lambda _, command=command: [command], expected=(0,))
        found = run(case, tmp_path, tmp_path / "cache", lambda: ["\x1b[2J", ""])
        assert found.problem == problem
