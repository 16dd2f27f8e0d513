"""What a stage leaves to go on from: the files of a checkpoint, and which checkpoints are whole."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

WEIGHTS, OWN_STATE = "weights.safetensors", "fastprune.json"
OPTIMIZER, SCHEDULE = "optimizer.pt", "scheduler.pt"
LIBRARY_STATE = "trainer_state.json"


def last_words(checkpoint: Path) -> str | None:
    """Why the guard gave up where it wrote `checkpoint`; None where it did not."""
    return json.loads((checkpoint / OWN_STATE).read_text(encoding="utf-8")).get("gave_up")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of `checkpoint`; None where they are whole.

    Their ends are looked at, not all that they hold: files are cut short by full disks and kills.
    """
    try:
        for file in (OWN_STATE, LIBRARY_STATE):
            json.loads((checkpoint / file).read_text(encoding="utf-8"))
        with safe_open(checkpoint / WEIGHTS, "pt"):
            pass
        for file in (OPTIMIZER, SCHEDULE):
            with zipfile.ZipFile(checkpoint / file):
                pass
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return " ".join(str(error).split())
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / OWN_STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
