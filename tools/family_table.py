"""Write docs/reference/families.md: which commands take which family of models.

    python tools/family_table.py

A tiny random model of every family goes through the commands, as it does in the tests.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from every_command import ABOUT, PAGE, header, row, take_through

from fastprune.models.families import FAMILIES


def main() -> None:
    """Run all families, and replace the page."""
    lines = [ABOUT, header()]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            lines.append(row(family, take_through(family, Path(folder))))
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
