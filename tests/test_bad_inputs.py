"""A sample of the malformed inputs of tools/bad_inputs, run in this process.

The tool itself runs thousands of them, in processes with limits on memory and time.
"""

import io
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tools" / "bad_inputs"))

from inputs import all_cases, make_base
from pool import LINES, problem_of, run

COUNT = 40


def test_a_sample_of_malformed_inputs_is_refused(tmp_path, monkeypatch):
    cases = all_cases(make_base(tmp_path / "base"), seed=0)
    assert len(cases) > 2000
    assert len({case.name for case in cases}) > 2000
    random.Random(0).shuffle(cases)
    refused = [case for case in cases if case.expected == (2,)]
    for number, case in enumerate(refused[:COUNT]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        said = io.StringIO()
        monkeypatch.setattr(sys, "stderr", said)
        found = run(case, folder, said.getvalue)
        assert not found.problem, found


def test_what_the_tool_looks_for_is_found(tmp_path):
    (case, *_) = (c for c in all_cases(make_base(tmp_path / "base"), 0) if c.expected == (2,))
    line = "fastprune: error: a.json: not JSON"
    assert problem_of(case, 2, f"{line}\n", set()) == ""
    assert problem_of(case, 0, "", set()) == "exit 0"
    assert problem_of(case, 1, f"{line}\n", set()) == "exit 1"
    assert problem_of(case, 2, "", set()) == "not one line of an error"
    assert problem_of(case, 2, f"{line}\nmore\n", set()) == "not one line of an error"
    assert problem_of(case, 2, f"Traceback\n{line}\n", set()) == "traceback"
    assert problem_of(case, 2, f"{line}\x1b[2J\n", set()) == "control characters"
    assert problem_of(case, 2, f"{line}\n", {"out"}) == "left behind: out"
    assert problem_of(case, 2, "warned\n" * LINES + f"{line}\n", set()) == "many lines"
