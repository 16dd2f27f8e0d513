"""tools/version_matrix.py makes an environment for each combination, here of made-up packages."""

import sys
import zipfile

import pytest
from programs import program

matrix = program("version_matrix.py")


@pytest.fixture
def package(tmp_path):
    """A wheel of one module."""
    wheel = tmp_path / "thing-1.0-py3-none-any.whl"
    info = "thing-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing.py", "value = 1\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def folders(tmp_path):
    """Two folders as `pip install --target` leaves them, with other versions of transformers."""
    made = []
    for version in ("1.5", "1.6"):
        info = tmp_path / version / f"transformers-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n"
        )
        (tmp_path / version / "transformers.py").write_text(f"__version__ = {version!r}\n")
        made.append(str(tmp_path / version))
    return made


def test_each_cell_has_its_own_versions(tmp_path, package, folders, capsys, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import sys, thing, transformers\n"
        "def test_it():\n"
        "    assert (thing.value, transformers.__version__) == (1, '1.6')\n"
        f"    assert {str(matrix.ROOT)!r} not in sys.path, 'the source tree hides the package'\n"
    )
    flags = ("--package", package, "--tests", tests, "--work", tmp_path / "work")
    assert matrix.main([*map(str, flags), "--transformers", *folders]) == 1
    first, second = capsys.readouterr().out.splitlines()[2:]
    python = sys.version.split()[0]
    assert first.startswith(f"| {python} ")
    assert " 1.5 | failed | 1 failed in " in first
    assert " 1.6 | passed | 1 passed in " in second


def test_what_cannot_be_installed_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    flags = ("--package", tmp_path / "missing.whl", "--work", tmp_path / "work")
    assert matrix.main([*map(str, flags), "--transformers", "5.0"]) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert "_installed_5.0 | not installed | " in row
    assert "missing.whl" in row


def test_another_torch_is_installed_with_all_that_the_tests_need(tmp_path):
    cell = matrix.Cell("python3.12", "2.10.0", "5.15.0")
    make, install = matrix.installation(cell, "the.whl", tmp_path)
    assert make[:3] == ["python3.12", "-m", "venv"]
    assert {"the.whl", "torch==2.10.0", "transformers==5.15.0", *matrix.NEEDED} <= set(install)
    assert "--no-deps" not in install
