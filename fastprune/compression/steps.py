"""The steps of a run in DIR/fastprune/state, so that a killed one goes on where it was.

    DIR/fastprune/state/
      run.json     what each step was asked, what it gave, how long it took
      NAME/        what the step NAME made: a checkpoint, an adapter

A step is asked by its settings and by those of the steps before it: one that was asked the same is
not done again, one that was asked otherwise is done again with all that follow.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastprune.compression.config import CompressConfig
from fastprune.errors import InputError
from fastprune.output import RECORDS, check_apart, check_out, check_place, replacing
from fastprune.progress import log as progress_log
from fastprune.readers import read_json
from fastprune.report.run import settings, write_json
from fastprune.workplace import remove_leftovers

COMMAND = "compress"
ADAPTER_OR_MODEL = ("adapter_config.json", "config.json")


class Steps:
    """What is done and what is left of the run in `config.out`."""

    def __init__(self, config: CompressConfig, record: dict[str, Any]) -> None:
        assert config.out is not None  # the config was checked
        self.out = Path(config.out)
        self.state = self.out.absolute() / RECORDS / "state"
        self.record = record
        self._before = ""

    @classmethod
    def open(cls, config: CompressConfig) -> Steps:
        """Continue the run in --out, or begin one; nothing is written.

        Raises InputError when --out holds something else.
        """
        assert config.out is not None
        out = Path(config.out)
        remove_leftovers(out)
        check_place(out)
        check_apart(out, config.inputs())
        file = out / RECORDS / "state" / "run.json"
        begun = _read(file, anew=config.resume == "never") if file.is_file() else {}
        earlier = (out / "config.json").exists()
        if begun.get("command") == COMMAND and config.resume != "never":
            if earlier and not config.overwrite:
                raise InputError(
                    f"{out}: holds an earlier result beside the run that is to be continued; pass "
                    "--overwrite to replace it, or choose another --out"
                )
            return cls(config, begun)
        own = begun.get("command") == COMMAND and not earlier
        check_out(out, config.overwrite or own, config.inputs())
        # `stage` is what tells every command that the folder is a run of this program.
        fresh = {"command": COMMAND, "stage": 0, "settings": settings(config), "steps": {}}
        steps = cls(config, fresh)
        steps.fresh = True
        return steps

    fresh = False

    def begin(self) -> None:
        """Make the folder; what an abandoned run left in it goes, in one step."""
        if not self.fresh:
            self._save()
            return
        with replacing(self.state) as state:
            write_json(state / "run.json", self.record)
        self.fresh = False

    def folder(self, name: str) -> Path:
        """Where the step `name` keeps what it makes."""
        return self.state / name

    def spent(self) -> float:
        """Seconds of the finished steps."""
        return sum(step.get("seconds", 0.0) for step in self.record["steps"].values())

    def do(self, name: str, asked: dict[str, Any], work: Callable[[], dict[str, Any]]) -> Any:
        """What `work` gives, JSON-ready; or gave, where the step was done before as it is `asked`.

        A step that was begun and asked the same finds its folder as it left it. The first step
        calls `begin` when it has seen that the run can be.
        """
        key = hashlib.sha256(json.dumps([self._before, name, asked]).encode()).hexdigest()
        known = self.record["steps"].get(name, {})
        self._before = key
        if known.get("key") == key and "result" in known:
            progress_log.info("%s: done before", name)
            return known["result"]
        if known.get("key") != key:
            shutil.rmtree(self.folder(name), ignore_errors=True)
            known = {"key": key}
            self.record["steps"][name] = known
            if self.state.is_dir():
                self._save()
        start = time.monotonic()
        known["result"] = work()
        known["seconds"] = time.monotonic() - start
        self._save()
        return known["result"]

    def decide(self, name: str, value: Callable[[], Any]) -> Any:
        """What was decided for the step `name` when it was first begun; `value()` the first time.

        Call it inside the step's `work`.
        """
        step = self.record["steps"][name]
        if "decided" not in step:
            step["decided"] = value()
            self._save()
        return step["decided"]

    def _save(self) -> None:
        write_json(self.state / "run.json", self.record)


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a finished checkpoint or adapter."""
    return any((folder / name).is_file() for name in ADAPTER_OR_MODEL)


def _read(file: Path, *, anew: bool) -> dict[str, Any]:
    """What run.json holds; its command alone where it is damaged and the run begins `anew`.

    Raises InputError where it is damaged otherwise.
    """
    try:
        record = read_json(file)
        whole = record["command"] != COMMAND or all(map(_is_step, record["steps"].values()))
    except KeyError:  # of another command
        return {}
    except (InputError, TypeError, AttributeError):
        whole = False
    if whole:
        return record
    if anew:
        return {"command": COMMAND}
    raise InputError(f"{file}: damaged; the run cannot be continued: --resume never begins anew")


def _is_step(step: Any) -> bool:
    """Whether `step` is what `Steps.do` notes of one."""
    seconds = step.get("seconds", 0.0) if isinstance(step, dict) else None
    return isinstance(seconds, (int, float))
