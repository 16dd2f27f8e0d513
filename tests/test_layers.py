"""The rules of tools/check_layers.py hold, and the check sees what it should."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("check_layers", ROOT / "tools" / "check_layers.py")
check_layers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_layers)


def test_this_repository_is_in_order():
    assert check_layers.breaches(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "words"),
    [
        ("models/a.py", "from fastprune.pruning import plan", "pruning stands above models"),
        ("models/a.py", "from ..pruning.plan import Plan", "pruning stands above models"),
        ("models/a.py", "def f():\n    import fastprune.cli", "cli stands above models"),
        ("pruning/a.py", "from fastprune.recover import lora", "never import each other"),
        ("exporting/a.py", "from fastprune.recover import merge", "never import each other"),
        ("pruning/a.py", "import fastprune.exporting", "exporting stands above pruning"),
        ("pruning/a.py", "from fastprune.kernels import _C", "call the compiled module"),
        ("kernels/optim.py", "from ._C import adamw", "call the compiled module"),
        ("errors.py", "import fastprune", "the package itself"),
        ("extra/a.py", "import fastprune.errors", "extra has no level"),
        ("models/a.py", "\n" * 501, "502 lines"),
    ],
)
def test_a_breach_is_named(tmp_path, file, source, words):
    path = tmp_path / "fastprune" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    [line] = check_layers.breaches(tmp_path)
    assert words in line
    assert f"fastprune/{file}" in line


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "from fastprune.pruning import plan\nfrom fastprune.errors import InputError"),
        ("pruning/a.py", "from fastprune.pruning.plan import Plan\nimport torch"),
        ("kernels/ops.py", "from fastprune.kernels import _C"),
        ("__init__.py", "from fastprune.kernels.optim import AdamW"),
    ],
)
def test_what_is_allowed_passes(tmp_path, file, source):
    path = tmp_path / "fastprune" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    assert check_layers.breaches(tmp_path) == []
