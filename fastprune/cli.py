"""The command line: parse one configuration, call one function, print its result.

A command is one row of COMMANDS. What it needs is imported when it is called, so `fastprune --help`
answers at once. Exit status: 0 done, 1 unexpected error, 2 bad input or usage, 3 a gate was not
met, 4 numerical trouble, 130 interrupted, 141 the reader of stdout went away (`| head`), as a shell
has it.
"""

import difflib
import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import asdict, dataclass, is_dataclass
from importlib import import_module
from importlib.metadata import version
from io import TextIOWrapper
from typing import Any, TextIO

from rich.logging import RichHandler

from fastprune.config import CommonConfig, apply
from fastprune.cores import wait_without_spinning_where_busy
from fastprune.distributed import launched
from fastprune.errors import FastpruneError, InputError
from fastprune.flags import parse
from fastprune.messages import reason, shown
from fastprune.printing import LogFormatter, one_line, visible
from fastprune.progress import console
from fastprune.progress import log as progress_log
from fastprune.report.run import check_result, write_result
from fastprune.space import disk_trouble

log = logging.getLogger("fastprune")


@dataclass(frozen=True)
class Command:
    """`config`, `run` and `show` are "module:name", imported when the command is called.

    `run` takes the configuration and returns a mapping, a dataclass, or an object with `to_dict`;
    `show` prints that on stdout. A command without `show` prints its own output while it runs. A
    result with a `failure` is written and shown, and then the command ends with that error.
    """

    summary: str
    config: str
    run: str
    show: str | None = None


COMMANDS = {
    "compress": Command(
        "the whole way: prune, recover, measure, write a small model that works",
        "fastprune.compression.config:CompressConfig",
        "fastprune.compression.pipeline:run_compress",
        "fastprune.report.compress:show_compress",
    ),
    "prune": Command(
        "remove KV groups and MLP channels, measure the result, write a checkpoint",
        "fastprune.pruning.config:PruneConfig",
        "fastprune.compression.forms:run_prune",
        "fastprune.report.tables:show_prune",
    ),
    "eval": Command(
        "perplexity, tasks, speed and memory of a model",
        "fastprune.inspect.perplexity:EvalConfig",
        "fastprune.inspect.perplexity:run_eval",
        "fastprune.report.tables:show_eval",
    ),
    "diagnose": Command(
        "look for broken weights, wrong sizes, and for what pruning cost",
        "fastprune.inspect.diagnose:DiagnoseConfig",
        "fastprune.inspect.diagnose:run_diagnose",
        "fastprune.report.tables:show_diagnose",
    ),
    "finetune": Command(
        "recover a pruned model, or teach any model, by finetuning",
        "fastprune.recover.config:FinetuneConfig",
        "fastprune.recover.pipeline:run_finetune",
        "fastprune.report.tables:show_finetune",
    ),
    "generate": Command(
        "continue a prompt",
        "fastprune.inspect.generate:GenerateConfig",
        "fastprune.inspect.generate:run_generate",
    ),
    "chat": Command(
        "talk to a model",
        "fastprune.inspect.generate:ChatConfig",
        "fastprune.inspect.generate:run_chat",
    ),
    "merge": Command(
        "write a LoRA adapter into the model it was trained on",
        "fastprune.recover.merge:MergeConfig",
        "fastprune.recover.merge:run_merge",
        "fastprune.report.tables:show_merge",
    ),
    "export": Command(
        "write a model in the forms that other engines load",
        "fastprune.exporting.config:ExportConfig",
        "fastprune.exporting.pipeline:run_export",
        "fastprune.report.tables:show_export",
    ),
    "compare": Command(
        "runs side by side: a table and a Pareto plot",
        "fastprune.report.compare:CompareConfig",
        "fastprune.report.compare:run_compare",
        "fastprune.report.tables:show_compare",
    ),
    "info": Command(
        "versions, compiled kernels, why CUDA is on or off",
        "fastprune.inspect.info:InfoConfig",
        "fastprune.inspect.info:run_info",
        "fastprune.report.tables:show_info",
    ),
    "completion": Command(
        "a script that makes a shell complete commands and options",
        "fastprune.completion:CompletionConfig",
        "fastprune.completion:run_completion",
        "fastprune.completion:show_completion",
    ),
}


STDOUT_CLOSED = 128 + 13  # SIGPIPE
REFUSED = {
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE),
}
"""Errors of the operating system about a file that no code can prevent; those of disks that take no
more bytes are `space.disk_trouble`'s."""
LINK_LOOP = "Symlink loop"
"""How pathlib begins to say that symbolic links lead back to themselves."""
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUDA out of memory")
"""What torch says where memory is lacking, in a RuntimeError."""
RED, PLAIN = "\033[1;31m", "\033[0m"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program name); returns the exit status."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that it does not know is no error
    with _ended_by_sigterm():
        status = _status(list(sys.argv[1:] if argv is None else argv))
    closed = _closed(sys.stdout)
    _closed(sys.stderr)  # else the interpreter ends with a status of its own
    return STDOUT_CLOSED if closed and not status else status


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the body as Ctrl-C does: what is half-written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _status(args: list[str]) -> int:
    verbose = "--verbose" in args
    try:
        if not args or args[0] in ("-h", "--help"):
            print(_overview())
            return 0 if args else 2
        if args[0] == "--version":
            print(f"fastprune {version('fastprune')}")
            return 0
        command = _command(args[0])
        config = parse(_load(command.config), args[1:], f"fastprune {args[0]}")
        verbose = config.verbose
        _call(command, config)
        return 0
    except SystemExit as end:  # --help has been printed; rich ends with 1 where stdout is closed
        return STDOUT_CLOSED if end.code else 0
    except FastpruneError as error:
        _complain(f"error: {reason(error)}", verbose)
        return error.exit_status
    except KeyboardInterrupt:
        _complain("interrupted", verbose=False)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _closed(sys.stdout, "\n"):
            return STDOUT_CLOSED
        if (trouble := disk_trouble(error)) is not None:
            _complain(f"error: {error}: {trouble}", verbose)
            return InputError.exit_status
        if told := _outside_reason(error):
            _complain(f"error: {told}", verbose)
            return InputError.exit_status
        hint = "" if verbose else " (unexpected; run again with --verbose to see where)"
        _complain(f"error: {type(error).__name__}: {error}{hint}", verbose)
        return 1


def _outside_reason(error: Exception) -> str | None:
    """What to tell of an error that the machine or a name given made, whatever code met it; None
    for others, which are bugs."""
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, RuntimeError) and str(error).startswith(LINK_LOOP):
        return str(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return (
            "out of memory; give a smaller model, text, batch or window, or use "
            "fastprune prune --stream"
        )
    return None


def _closed(stream: TextIO, probe: str = "") -> bool:
    """Whether no one reads `stream` any more; then what is yet to be printed goes nowhere.

    `probe` is written to find out: a stream without a buffer has nothing left to flush.
    """
    try:
        print(end=probe, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return True
    return False


def _call(command: Command, config: CommonConfig) -> None:
    with _logging_to_stderr(config):
        _carry_out(command, config)


def _carry_out(command: Command, config: CommonConfig) -> None:
    if config.json is not None:
        check_result(config.json)
    if "torch" not in sys.modules:
        wait_without_spinning_where_busy()
    apply(config)
    result = _load(command.run)(config)
    failure: FastpruneError | None = getattr(result, "failure", None)
    if hasattr(result, "to_dict"):
        result = result.to_dict()
    elif is_dataclass(result) and not isinstance(result, type):
        result = asdict(result)
    if not launched().first:  # torchrun started several; the first one speaks
        return
    if config.json is not None:
        write_result(config.json, result)
    if command.show is not None and not config.quiet:
        _load(command.show)(result)
    if failure is not None:
        raise failure


def _command(name: str) -> Command:
    if name in COMMANDS:
        return COMMANDS[name]
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
    raise InputError(f"no command {name!r}; {hint}")


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastprune COMMAND [ARGUMENTS]",
            "",
            "Prune Llama-family language models, measure the result, recover its quality.",
            "",
            *rows,
            "",
            "fastprune COMMAND --help lists a command's options.",
        ]
    )


def _complain(message: str, verbose: bool) -> None:
    with suppress(BrokenPipeError):  # where no one reads stderr
        _print_complaint(message, verbose)


def _print_complaint(message: str, verbose: bool) -> None:
    if verbose:
        sys.stderr.write(visible(traceback.format_exc()))
    rank = launched().rank
    process = f" (process {rank})" if rank else ""
    red, plain = (RED, PLAIN) if message.startswith("error") and _colourful() else ("", "")
    print(f"{red}fastprune{process}: {one_line(message)}{plain}", file=sys.stderr)


def _colourful() -> bool:
    """Whether stderr is a terminal that shows colours."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


class _Shown(LogFormatter):
    """The message alone, in the user's language, as one visible line."""

    def format(self, record: logging.LogRecord) -> str:
        record = copy(record)  # other handlers have it in English
        record.msg = shown(record.msg)
        if isinstance(record.args, tuple):
            record.args = tuple(map(shown, record.args))
        return super().format(record)


@contextmanager
def _logging_to_stderr(config: CommonConfig) -> Iterator[None]:
    """In the block stderr has progress and warnings by default, everything under --verbose, and
    errors only under --quiet; afterwards logging is as it was.

    The logger itself stays at INFO, for the run log of commands that keep one.
    """
    quiet = config.quiet or not launched().first
    of_python, showwarning = logging.getLogger("py.warnings"), warnings.showwarning
    before = console.quiet, log.handlers, log.propagate, of_python.handlers
    level = log.level
    try:
        console.quiet = quiet
        handler = _handler(config, quiet)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.DEBUG if config.verbose else logging.INFO)
        logging.captureWarnings(True)
        of_python.handlers = [handler if config.verbose else logging.NullHandler()]
        _quieten_libraries(config, quiet)
        yield
    finally:
        console.quiet, log.handlers, log.propagate, of_python.handlers = before
        log.setLevel(level)
        if warnings.showwarning is not showwarning:  # else they were captured before
            logging.captureWarnings(False)


def _handler(config: CommonConfig, quiet: bool) -> logging.Handler:
    """What writes the records to stderr that `config` wants to see there."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(
            console=console, show_time=False, show_level=False, show_path=False
        )
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(_Shown("%(message)s"))
    if quiet:
        handler.setLevel(logging.ERROR)
    elif not config.verbose:
        handler.addFilter(lambda r: r.levelno >= logging.WARNING or r.name == progress_log.name)
    return handler


def _quieten_libraries(config: CommonConfig, quiet: bool) -> None:
    if not config.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if quiet or not console.is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
