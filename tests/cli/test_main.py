"""The command line's manners: exit statuses, one line on stderr, the JSON file, quick help."""

import json
import logging
import os
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny import tiny_checkpoint

from fastprune import cli
from fastprune.config import CommonConfig
from fastprune.errors import GateError, InputError, NumericalError

ERRORS = {
    "input": InputError("the model\nis not there"),
    "gate": GateError("too bad"),
    "numerical": NumericalError("not finite"),
    "bug": KeyError("oops"),
    "stop": KeyboardInterrupt(),
    "disk": OSError(28, "No space left on device", "/cache/x"),
}


@dataclass(kw_only=True)
class EchoConfig(CommonConfig):
    """Give back a word, or fail as told."""

    word: str = "hello"
    """the word"""
    fail: str | None = None
    """how to fail"""


def run_echo(config: EchoConfig) -> dict[str, object]:
    log = logging.getLogger("fastprune")
    log.info("echoing")
    log.warning("take care")
    if config.fail == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    elif config.fail:
        raise ERRORS[config.fail]
    return {"word": config.word}


def show_echo(result: dict[str, object]) -> None:
    print("the word is", result["word"])


@pytest.fixture(autouse=True)
def echo(monkeypatch):
    here = __name__
    command = cli.Command("echo", f"{here}:EchoConfig", f"{here}:run_echo", f"{here}:show_echo")
    monkeypatch.setitem(cli.COMMANDS, "echo", command)


def test_a_command_prints_its_result(capsys):
    assert cli.main(["echo", "--word", "yes"]) == 0
    assert capsys.readouterr() == ("the word is yes\n", "take care\n")


def test_verbose_logs_every_step(capsys):
    assert cli.main(["echo", "--verbose"]) == 0
    assert capsys.readouterr().err == "echoing\ntake care\n"


def test_quiet_prints_nothing(capsys):
    assert cli.main(["echo", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize(
    ("fail", "status", "line"),
    [
        ("input", 2, "fastprune: error: the model is not there"),
        ("gate", 3, "fastprune: error: too bad"),
        ("numerical", 4, "fastprune: error: not finite"),
        ("stop", 130, "fastprune: interrupted"),
        ("sigterm", 130, "fastprune: interrupted"),
        ("disk", 2, "fastprune: error: [Errno 28] No space left on device: '/cache/x'"),
        ("bug", 1, "fastprune: error: KeyError: 'oops' (unexpected; run again with --verbose"),
    ],
)
def test_an_error_is_one_line_and_a_status(capsys, tmp_path, fail, status, line):
    file = tmp_path / "out.json"
    assert cli.main(["echo", "--quiet", "--fail", fail, "--json", str(file)]) == status
    captured = capsys.readouterr()
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("terminal", "no_colour", "red"), [(True, "", True), (False, "", False), (True, "1", False)]
)
def test_an_error_is_red_on_a_terminal_alone(capsys, monkeypatch, terminal, no_colour, red):
    monkeypatch.setenv("NO_COLOR", no_colour)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert cli.main(["echo", "--quiet", "--fail", "gate"]) == 3
    assert ("\033" in capsys.readouterr().err) is red


def test_verbose_shows_the_traceback(capsys):
    assert cli.main(["echo", "--fail", "bug", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["ecko"], "no command 'ecko'; did you mean echo?"),
        (["zzz"], "no command 'zzz'; one of "),
        (["echo", "--words", "x"], "did you mean --word?"),
        (["echo", "--threads", "0"], "--threads must be at least 1, not 0"),
        (["echo", "--json", "missing/out.json"], "its folder does not exist"),
        (["echo", "--json", "."], "is a folder; name a file"),
    ],
)
def test_usage_errors(capsys, args, words):
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def result_in(text):
    """The result in a JSON text, once it is seen to be marked as ours."""
    result = json.loads(text)
    assert result.pop("fastprune") == version("fastprune")
    return result


class TestJson:
    """What `--json` may name, and what it leaves alone."""

    @pytest.mark.parametrize("before", [None, "", '{"fastprune": "0.1", "word": "old"}'])
    def test_a_new_an_empty_or_an_earlier_file(self, tmp_path, before):
        file = tmp_path / "out.json"
        if before is not None:
            file.write_text(before)
        for word in ("one", "two"):
            assert cli.main(["echo", "--word", word, "--json", str(file)]) == 0
            assert result_in(file.read_text()) == {"word": word}
        assert list(tmp_path.iterdir()) == [file]

    @pytest.mark.parametrize("content", ["years of work", '{"model_type": "llama"}', "[1]"])
    def test_other_files_stay(self, capsys, tmp_path, content, monkeypatch):
        file = tmp_path / "config.json"
        file.write_text(content)
        monkeypatch.setitem(ERRORS, "input", RuntimeError("the work has begun"))
        assert cli.main(["echo", "--fail", "input", "--json", str(file)]) == 2
        assert "config.json: exists and is not a result" in capsys.readouterr().err
        assert file.read_text() == content

    def test_a_file_that_appears_during_the_work_stays(self, tmp_path, monkeypatch):
        file = tmp_path / "out.json"
        monkeypatch.setattr(cli, "apply", lambda config: file.write_text("of another program"))
        assert cli.main(["echo", "--json", str(file)]) == 2
        assert file.read_text() == "of another program"

    def test_a_link_stays_and_leads_to_the_result(self, tmp_path):
        link, file = tmp_path / "link.json", tmp_path / "file.json"
        link.symlink_to(file)
        for _ in range(2):
            assert cli.main(["echo", "--json", str(link)]) == 0
            assert link.is_symlink()
            assert result_in(file.read_text()) == {"word": "hello"}

    def test_a_named_pipe_is_written_into(self, tmp_path):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
        assert cli.main(["echo", "--json", str(pipe)]) == 0
        assert result_in(reader.communicate()[0]) == {"word": "hello"}
        assert pipe.is_fifo()

    def test_a_device_stays_a_device(self, capsys):
        assert cli.main(["echo", "--json", "/dev/null", "--quiet"]) == 0
        assert cli.main(["echo", "--json", "/dev/full", "--quiet"]) == 2
        assert "--json /dev/full: cannot be written: No space left" in capsys.readouterr().err
        assert all(Path(device).is_char_device() for device in ("/dev/null", "/dev/full"))

    def test_a_descriptor_goes_on_where_it_stood(self, tmp_path):
        with (tmp_path / "log").open("w+") as file:
            file.write("before\n")
            file.flush()
            path = f"/dev/fd/{file.fileno()}"
            assert cli.main(["echo", "--quiet", "--json", path]) == 0
            file.seek(0)
            first, _, rest = file.read().partition("\n")
        assert first == "before"
        assert result_in(rest) == {"word": "hello"}


def test_under_torchrun_the_first_process_speaks(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    file = tmp_path / "result.json"
    assert cli.main(["echo", "--json", str(file)]) == 0
    assert capsys.readouterr() == ("", "")
    assert not file.exists()
    assert cli.main(["echo", "--fail", "gate"]) == 3
    assert capsys.readouterr() == ("", "fastprune (process 1): error: too bad\n")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["echo", "--json", str(file)]) == 0
    assert capsys.readouterr().out
    assert file.exists()


def test_overview_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert name in text
        assert command.summary in text


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "echo"])
def test_every_command_exists(name, capsys):
    """Each row of the table leads to a real configuration and real functions."""
    command = cli.COMMANDS[name]
    assert callable(cli._load(command.run))
    assert command.show is None or callable(cli._load(command.show))
    assert cli.main([name, "--help"]) == 0
    assert f"usage: fastprune {name}" in capsys.readouterr().out


def test_help_does_not_load_torch():
    code = "import sys, fastprune.cli as c; c.main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr


def test_python_m_fastprune():
    command = [sys.executable, "-m", "fastprune", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("fastprune: error: no command 'nothing'")


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def buffering(request, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


def with_closed_stdout(*args, stderr=subprocess.PIPE):
    """Run the command while no one reads what it prints; its status, and what stderr has without
    the steps that took long."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        target = closed if stderr is subprocess.STDOUT else stderr
        command = [sys.executable, "-m", "fastprune", *map(str, args)]
        done = subprocess.run(command, stdout=closed, stderr=target, text=True)
    lines = (done.stderr or "").splitlines()
    return done.returncode, [line for line in lines if not line.endswith((" so far", " left"))]


@pytest.mark.parametrize("args", [["--help"], ["prune", "--help"]])
def test_a_closed_stdout_ends_quietly(buffering, args):
    assert with_closed_stdout(*args) == (141, [])


def test_a_closed_stdout_of_a_longer_command(tmp_path, monkeypatch):
    """What is printed at the end by a table, and bit by bit; the result is written all the same."""
    folder = tiny_checkpoint(tmp_path / "model", layers=2)
    result = tmp_path / "result.json"
    eval_ = ["eval", folder, "--windows", "1", "--seq-len", "32", "--json", result]
    assert with_closed_stdout(*eval_) == (141, [])
    assert json.loads(result.read_text())["windows"] == 1
    (tmp_path / "prompts.txt").write_text("a\nb\n" * 3)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")  # else it is all printed at the end
    generate = ["generate", folder, "--prompt", tmp_path / "prompts.txt", "--max-new-tokens", "2"]
    assert with_closed_stdout(*generate) == (141, [])


def test_a_failure_keeps_its_status_where_no_one_reads(buffering):
    assert with_closed_stdout("nothing", stderr=subprocess.STDOUT) == (2, [])


def test_another_broken_pipe_is_a_bug(capsys, monkeypatch):
    monkeypatch.setitem(ERRORS, "bug", BrokenPipeError("of a worker"))
    assert cli.main(["echo", "--fail", "bug"]) == 1
    assert "BrokenPipeError: of a worker" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastprune {version('fastprune')}\n"


def test_info_holds_what_a_report_of_a_fault_needs(tmp_path):
    file = tmp_path / "info.json"
    assert cli.main(["info", "--quiet", "--json", str(file)]) == 0
    found = result_in(file.read_text())
    assert {"python", "fastprune", "torch", "transformers", "peft", "numpy"} <= set(
        found["versions"]
    )
    assert set(found["system"]) == {"platform", "processor", "cores", "memory_bytes"}
    assert [kernels["name"] for kernels in found["kernels"]] == ["cpu", "cuda"]
    for private in (Path.home(), platform.node(), sys.prefix):
        assert str(private) not in file.read_text()
