"""The texts that the package carries, so that everybody's figures are those of the same text.

`texts/README.md` says where each comes from and under which licence.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).with_name("texts")
C4, WIKITEXT2, PYDOCS = "builtin:c4", "builtin:wikitext2", "builtin:pydocs"
BUILTIN = (C4, WIKITEXT2, PYDOCS)
TRAINING_TEXT, EVALUATION_TEXT = C4, WIKITEXT2
"""What commands calibrate and train on, and what they evaluate on, where no text is named."""


def builtin_documents(name: str) -> Iterator[str]:
    """The documents of the text `name`, one of BUILTIN, in the order of the source."""
    for file in sorted(FOLDER.glob(f"{name.removeprefix('builtin:')}-*.jsonl.xz")):
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
