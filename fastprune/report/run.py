"""What a run records of itself: stage times, log, versions, command line."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from io import StringIO
from pathlib import Path
from types import TracebackType
from typing import Any

from fastprune.errors import InputError
from fastprune.files import MARK, check_file, is_result, write_file, write_whole
from fastprune.printing import LogFormatter
from fastprune.progress import phase

log = logging.getLogger("fastprune")


@dataclass
class Clock:
    """Seconds by stage, in the order the stages first ran."""

    seconds: dict[str, float] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        with phase(stage):
            yield
        spent = time.perf_counter() - begin
        self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
        log.info("%s took %.1f s", stage, spent)

    def totals(self, stages: Iterable[str] = ()) -> dict[str, float]:
        """Seconds by stage, 0 for those of ``stages`` that did not run, and the ``total``."""
        total = time.perf_counter() - self.start
        return {**dict.fromkeys(stages, 0.0), **self.seconds, "total": total}


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short without a word: the run itself says that it is full."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class RunLog:
    """Collects everything the ``fastprune`` logger says while the body runs.

    With a ``path`` it goes to the end of that file at once, and stays there whatever happens.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._text, self._path = StringIO(), path
        self._handler: logging.StreamHandler[Any] = logging.StreamHandler(self._text)
        if path is not None:
            self._handler = _LogFile(path, encoding="utf-8")
        self._handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))

    def __enter__(self) -> RunLog:
        log.addHandler(self._handler)
        log.info("%s", command_line())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        log.removeHandler(self._handler)
        if error is not None:  # into this file alone: stderr has it from the command line
            ended = (type(error).__name__, error)
            record = log.makeRecord(log.name, logging.ERROR, "", 0, "ended by %s: %s", ended, None)
            self._handler.handle(record)
        self._handler.close()

    def save(self, path: Path) -> None:
        """Write all that was said to `path`; with a file of its own, all that this holds."""
        if self._path is None:
            path.write_text(self._text.getvalue(), encoding="utf-8")
        else:
            shutil.copyfile(self._path, path)


@contextmanager
def lasting_log(path: Path, begun: Callable[[], bool] = lambda: False) -> Iterator[RunLog]:
    """A `RunLog` with the file `path`, for a run whose folder is not there yet.

    After an InputError, or where a file cannot be read or written, the file is gone, and the
    folders that were made for it, unless it was there before or the run has `begun`: nothing shall
    be in the way of the corrected command.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    earlier = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with RunLog(path) as run_log:
            yield run_log
    except (InputError, OSError):
        if not (earlier or begun()):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # something else has come to lie there
                for folder in made:
                    folder.rmdir()
        raise


def command_line() -> str:
    """How this process was called, as one could type it again."""
    program = Path(sys.argv[0]).name
    if program == "__main__.py":
        program = f"python -m {Path(sys.argv[0]).parent.name}"
        return " ".join([program, *map(shlex.quote, sys.argv[1:])])
    return shlex.join([program, *sys.argv[1:]])


def settings(config: Any) -> dict[str, Any]:
    """The fields of a configuration dataclass as JSON-ready data."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return {f.name: plain(getattr(config, f.name)) for f in fields(config)}


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that decide a result, and of ``more`` packages."""
    packages = dict.fromkeys(("fastprune", "torch", "transformers", "safetensors", *more))
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def as_json(data: Any) -> str:
    """``data`` as the text of a JSON file."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as JSON into a folder of ours, whole or not at all."""
    write_whole(path, as_json(data))


def marked(result: Mapping[str, Any]) -> dict[str, Any]:
    """``result`` of a command, by which version it was made: so its file is known to be ours."""
    return {MARK: versions()["fastprune"], **result}


def check_result(path: Path) -> None:
    """Raise InputError if ``--json path`` cannot be written, or is a file that is not a result."""
    check_file("--json", path, is_result, "a result that fastprune wrote")


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a command to ``--json path``. Raises InputError as `check_result`."""
    check_result(path)  # what lies there may have changed while the command ran
    write_file("--json", path, as_json(marked(result)))
