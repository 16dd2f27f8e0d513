"""tools/check_wheel.py finds what is wrong with a wheel, here with small made-up ones."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from programs import ROOT, program

check_wheel = program("check_wheel.py")

NAME = "fastprune-1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
MODULE = "fastprune/kernels/_C.cpython-311-x86_64-linux-gnu.so"
SOURCE = 'extern "C" void PyInit__C() {}\n'
WITH_A_WEAK_SYMBOL = SOURCE + "inline int odd() { return 1; }\nint (*used)() = odd;\n"
needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("readelf")), reason="needs a compiler and readelf"
)


@pytest.fixture
def root(tmp_path):
    """A source tree of two files."""
    root = tmp_path / "root"
    (root / "fastprune").mkdir(parents=True)
    (root / "pyproject.toml").write_text('[project]\nversion = "1.0"\n')
    for name in ("__init__.py", "recipe.yaml"):
        (root / "fastprune" / name).write_text("")
    return root


@pytest.fixture
def library(tmp_path):
    """A shared library from C++ source."""

    def build(source, *flags):
        file, built = tmp_path / "source.cpp", tmp_path / "built.so"
        file.write_text(source)
        subprocess.run(["c++", "-shared", "-fPIC", *flags, "-o", built, file], check=True)
        return built

    return build


@pytest.fixture
def wheel(tmp_path, library):
    """A wheel of the given files, a sound one where nothing else is said."""

    def make(name=NAME, source=SOURCE, leave_out=(), **files):
        sound = {
            "fastprune/": "",
            "fastprune/__init__.py": "",
            "fastprune/recipe.yaml": "",
            "fastprune-1.0.dist-info/METADATA": "Name: fastprune\nVersion: 1.0\n\n",
        }
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file, text in {**sound, **files}.items():
                if file not in leave_out:
                    archive.writestr(file, text)
            if MODULE not in leave_out:
                archive.write(library(source), MODULE)
        return tmp_path / name

    return make


def found(wheel, root):
    return list(check_wheel.breaches(wheel, root))


@needs_compiler
def test_a_sound_wheel(wheel, root):
    assert found(wheel(), root) == []


@needs_compiler
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"leave_out": ["fastprune/recipe.yaml"]}, "fastprune/recipe.yaml is missing"),
        ({"leave_out": [MODULE]}, "holds the libraries []"),
        ({"fastprune/left.py": ""}, "fastprune/left.py is not in the source tree"),
        ({"tests/test_it.py": ""}, "tests/test_it.py is not in the source tree"),
        ({"name": NAME.replace("2_28", "2_34")}, "is for manylinux_2_34_x86_64"),
        ({"name": NAME.replace("manylinux_2_28", "linux")}, "is for linux_x86_64"),
        ({"fastprune-1.0.dist-info/METADATA": "\nVersion: 0.9\n"}, "do not name the version 1.0"),
        ({"source": WITH_A_WEAK_SYMBOL}, "may clash with others: _Z3oddv, used"),
    ],
)
def test_what_is_wrong_is_named(wheel, root, changes, words):
    (breach,) = found(wheel(**changes), root)
    assert words in breach


@needs_compiler
def test_a_library_that_was_grafted_in(wheel, root, library):
    grafted = wheel()
    with zipfile.ZipFile(grafted, "a") as archive:
        archive.write(library(SOURCE), "fastprune.libs/libtorch.so")
    (breach,) = found(grafted, root)
    assert breach.startswith("holds the libraries ['fastprune.libs/libtorch.so', ")


def test_a_file_that_is_no_library(tmp_path):
    (tmp_path / "odd.so").write_text("odd")
    with pytest.raises(SystemExit, match=r"odd\.so: readelf cannot read it"):
        list(check_wheel.library_breaches(tmp_path / "odd.so"))


def test_a_large_wheel(tmp_path, root, monkeypatch):
    monkeypatch.setattr(check_wheel, "MEGABYTES", 0)
    with zipfile.ZipFile(tmp_path / NAME, "w"):
        pass
    assert found(tmp_path / NAME, root)[0] == "0.0 MB; at most 0"


@needs_compiler
def test_other_libraries_than_the_systems(library, tmp_path):
    shutil.copy(library(SOURCE, "-Wl,-soname,libother.so.1"), tmp_path / "libother.so")
    needing = library(SOURCE, f"-L{tmp_path}", "-Wl,--no-as-needed", "-lother")
    assert list(check_wheel.library_breaches(needing)) == ["needs libother.so.1"]


@needs_compiler
def test_symbols_newer_than_manylinux_grants(library, monkeypatch):
    plain = library('#include <cstdlib>\nextern "C" void PyInit__C() { std::abort(); }\n')
    assert list(check_wheel.library_breaches(plain)) == []
    monkeypatch.setitem(check_wheel.NEWEST, "GLIBC", (2, 1))
    (breach,) = set(check_wheel.library_breaches(plain))
    assert breach.startswith("needs GLIBC_2.")
    assert breach.endswith("build it where GLIBC is at most 2.1")


def test_the_command_wants_a_wheel(tmp_path):
    file = tmp_path / "a.whl"
    file.write_text("no wheel")
    command = [sys.executable, ROOT / "tools" / "check_wheel.py", file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "a.whl: not a wheel" in done.stderr
