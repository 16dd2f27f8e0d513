"""Keep the house in order: imports point downward, files stay short, one caller of the module _C.

    python tools/check_layers.py [ROOT]

Reads every import in fastprune/ (those inside functions too) without running anything. Prints one
line per breach and exits 1 if there is any.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "fastprune"
LINES = 500

# Top to bottom. A file may import from its own level and from those below it.
LEVELS = (
    ("cli", "__main__", "completion"),
    ("compression",),
    ("exporting",),
    ("pruning", "recover"),
    ("inspect", "report"),
    ("models", "data"),
    ("kernels",),
    (
        *("flags", "config", "cache", "precision", "progress", "distributed", "sharding"),
        *("output", "workplace", "space", "files", "messages", "readers", "printing", "bounds"),
        "errors",
    ),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
STRANGERS = {
    ("pruning", "recover"), ("recover", "pruning"),
    ("exporting", "pruning"), ("exporting", "recover"),
}  # fmt: skip
CALLERS_OF_C = {"kernels/ops.py", "kernels/backend.py"}
SOURCES = {"fastprune": ".py", "tests": ".py", "tools": ".py", "bench": ".py", "csrc": ""}


def breaches(root: Path) -> list[str]:
    """One line per breach of the rules under `root`, sorted."""
    found = [*_long_files(root)]
    for file in sorted((root / PACKAGE).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        for line, module in _imports(tree, file.relative_to(root)):
            reason = _forbidden(file.relative_to(root / PACKAGE), module)
            if reason:
                found.append(f"{file.relative_to(root)}:{line}: imports {module}: {reason}")
    return found


def _long_files(root: Path) -> Iterator[str]:
    for folder, suffix in SOURCES.items():
        for file in sorted((root / folder).rglob(f"*{suffix}")):
            if file.is_file() and "__pycache__" not in file.parts:
                lines = len(file.read_bytes().splitlines())
                if lines > LINES:
                    yield f"{file.relative_to(root)}: {lines} lines; split it by subject ({LINES})"


def _imports(tree: ast.Module, file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything `file` imports from the package, relative imports solved.

    Every imported name counts as a module: `from fastprune.kernels import _C` names `_C` below it.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(file.parts[: len(file.parts) - node.level]) if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == PACKAGE)


def _forbidden(file: Path, module: str) -> str | None:
    """Why `file` (relative to the package) may not import `module`; None if it may."""
    parts = module.split(".")[1:]
    if "_C" in parts and file.as_posix() not in CALLERS_OF_C:
        return f"only {' and '.join(sorted(CALLERS_OF_C))} call the compiled module"
    here = file.parts[0].removesuffix(".py")
    if here == "__init__":  # the public face may name anything
        return None
    if here not in LEVEL:
        return f"{here} has no level in tools/check_layers.py"
    if not parts or parts[0] not in LEVEL:
        return None if here in LEVELS[0] else "the package itself stands above its parts"
    if (here, parts[0]) in STRANGERS:
        return f"{here} and {parts[0]} never import each other"
    if LEVEL[parts[0]] < LEVEL[here]:
        return f"{parts[0]} stands above {here}"
    return None


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    lines = breaches(root)
    print("\n".join(lines) if lines else "layers: in order")
    sys.exit(bool(lines))
