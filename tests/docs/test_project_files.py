"""Files about the project agree with each other: the version, workflows, issue forms."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from fastprune.config import CommonConfig
from fastprune.flags import options_of
from fastprune.inspect.diagnose import DiagnoseConfig

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(file):
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def test_the_version_has_one_place():
    """What repeats it says the same, and the code does not name it."""
    number = PROJECT["project"]["version"]
    assert version("fastprune") == number
    assert str(read("CITATION.cff")["version"]) == number
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] in (number, "Unreleased")
    assert number in headings
    for file in (ROOT / "fastprune").rglob("*.py"):
        assert f'"{number}"' not in file.read_text(encoding="utf-8"), file


def test_the_citation_has_what_the_format_requires():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]
    assert all("name" in author for author in citation["authors"])


@pytest.mark.parametrize("file", FORMS, ids=lambda file: file.stem)
def test_an_issue_form_has_what_the_format_requires(file):
    form = read(file)
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_fits_together(file):
    jobs = read(file)["jobs"]
    for job in jobs.values():
        assert set(job.get("needs", [])) <= jobs.keys()
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "uses" not in step or "@" in step["uses"]
            for program in re.findall(r"(?:^|\s)(\.ci/\S+)", step.get("run", "")):
                assert (ROOT / program).stat().st_mode & 0o100, f"{program} cannot be run"


def test_wheels_are_built_for_the_python_that_the_package_needs():
    settings = PROJECT["tool"]["cibuildwheel"]
    assert settings["build"] == [f"cp3{minor}-manylinux*" for minor in (11, 12, 13, 14)]
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert (ROOT / settings["before-all"].replace("{project}/", "")).stat().st_mode & 0o100
    paths = re.findall(r"\{project\}/(\S+)", " ".join(settings["repair-wheel-command"]))
    paths += re.findall(r"\{project\}/(\S+)", settings["test-command"])
    assert paths
    assert all((ROOT / path).exists() for path in paths)


def test_the_flags_that_run_code_are_off_unless_given():
    """As SECURITY.md says."""
    text = (ROOT / "SECURITY.md").read_text()
    options = {option.shown: option for option in options_of(DiagnoseConfig).values()}
    for flag in ("--allow-pickle", "--trust-remote-code"):
        assert flag in text
        assert options[flag].default is False
        assert flag not in {option.shown for option in options_of(CommonConfig).values()}
