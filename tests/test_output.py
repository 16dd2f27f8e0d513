"""Output folders: nothing destroyed, whatever happens and whenever."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastprune import output
from fastprune.errors import InputError
from fastprune.output import RECORDS, check_apart, check_out, staged
from fastprune.workplace import remove_leftovers

KILLED = """
import os, signal, sys
from pathlib import Path
from fastprune import output

moment, exchanging, out = int(sys.argv[1]), sys.argv[2] == "exchange", Path(sys.argv[3])
if not exchanging:
    output._exchange_paths = lambda one, other: False
steps = 0

def counted(name, owner):
    original = getattr(owner, name)
    def call(*args, **options):
        global steps
        result = original(*args, **options)
        steps += 1
        if steps == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

for name in ("rename", "unlink", "rmdir", "fsync", "mkdir"):
    counted(name, os)
if exchanging:
    counted("_exchange_paths", output)
with output.staged(out, overwrite=True) as fresh:
    records = fresh / "fastprune"
    records.mkdir()
    (records / "metrics.json").write_text('{"versions": {"fastprune": "2"}}')
    (fresh / "weights").write_text("new")
print("done")
"""


def fill(folder: Path, content: str = "old") -> Path:
    """A folder as a run of ours leaves it."""
    (folder / RECORDS).mkdir(parents=True)
    (folder / RECORDS / "metrics.json").write_text('{"versions": {"fastprune": "1"}}')
    (folder / "weights").write_text(content)
    return folder


def overwrite(out: Path) -> None:
    """A run with --overwrite."""
    with staged(out, overwrite=True) as work:
        (work / "weights").write_text("new")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchanging(request, monkeypatch):
    """With the kernel's exchange of two folders, and where the file system has none."""
    if not request.param:
        monkeypatch.setattr(output, "_exchange_paths", lambda one, other: False)
    return request.param


class TestStaged:
    def test_the_folder_appears_only_when_whole(self, tmp_path):
        out = tmp_path / "new" / "out"
        with staged(out) as work:
            (work / "config.json").write_text("{}")
            assert not out.exists()
        assert names(out) == ["config.json"]
        assert names(out.parent) == ["out"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    def test_nothing_is_left_behind(self, error, tmp_path):
        with pytest.raises(error), staged(tmp_path / "new" / "out") as work:
            (work / "half").write_text("written")
            raise error
        assert names(tmp_path) == []

    def test_overwriting_is_all_or_nothing(self, exchanging, tmp_path):
        out = fill(tmp_path / "out")
        with pytest.raises(RuntimeError), staged(out, overwrite=True):
            raise RuntimeError
        assert (out / "weights").read_text() == "old"
        overwrite(out)
        assert (out / "weights").read_text() == "new"
        assert names(out) == ["weights"]
        assert names(tmp_path) == ["out"]

    def test_an_empty_folder_is_filled(self, exchanging, tmp_path):
        (tmp_path / "out").mkdir()
        with staged(tmp_path / "out") as work:
            (work / "weights").write_text("new")
        assert names(tmp_path / "out") == ["weights"]

    def test_it_is_on_the_disk_before_it_has_its_name(self, tmp_path, monkeypatch):
        said = []
        monkeypatch.setattr(os, "fsync", lambda handle: said.append(os.fstat(handle).st_ino))
        real = output.exchange
        monkeypatch.setattr(
            output, "exchange", lambda *paths: (said.append("exchange"), real(*paths))
        )
        with staged(tmp_path / "out") as work:
            (work / "weights").write_text("new")
        before = said[: said.index("exchange")]
        inodes = [path.stat().st_ino for path in (tmp_path / "out", tmp_path / "out" / "weights")]
        assert set(inodes) <= set(before)
        assert tmp_path.stat().st_ino in said[said.index("exchange") :]

    @pytest.mark.parametrize(
        ("error", "when"),
        [
            (KeyboardInterrupt, "before"),
            (KeyboardInterrupt, "after"),
            (OSError(16, "Device or resource busy"), "before"),
        ],
    )
    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_ctrl_c_or_a_failure_in_the_exchange(self, tmp_path, monkeypatch, error, when, step):
        """At each rename of the slow way: what was there stays, or the new one is there."""
        out = fill(tmp_path / "out")
        monkeypatch.setattr(output, "_exchange_paths", lambda one, other: False)
        real, renames = os.rename, []

        def rename(source, target):
            renames.append(target)
            failing = len(renames) == step
            if failing and when == "before":
                raise error
            real(source, target)
            if failing:
                renames.append(None)
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            with pytest.raises((KeyboardInterrupt, OSError, InputError)) as raised:
                overwrite(out)
        remove_leftovers(out)
        results = {(folder / "weights").read_text() for folder in tmp_path.iterdir()}
        assert (out / "weights").read_text() in ("old", "new")
        if isinstance(raised.value, InputError):  # the work is done: it is kept, and the error says
            assert "new" in results
            assert any(str(folder) in str(raised.value) for folder in tmp_path.iterdir())
        assert all(not name.startswith(".") for name in names(tmp_path))

    def test_what_appeared_during_the_work_stays_and_so_does_the_work(self, tmp_path):
        out = tmp_path / "out"

        def run():
            with staged(out) as work:
                (work / "weights").write_text("new")
                out.mkdir()
                (out / "thesis.tex").write_text("years of work")

        with pytest.raises(InputError, match="the finished result is in") as raised:
            run()
        assert names(out) == ["thesis.tex"]
        kept = Path(str(raised.value).rpartition(" ")[2])
        assert (kept / "weights").read_text() == "new"

    @pytest.mark.parametrize("way", ["exchange", "renames"])
    def test_killed_at_any_moment(self, tmp_path, way):
        """After every call that changes the disk, in turn: the old or the new, never neither."""
        seen = set()
        for moment in range(1, 100):
            out = fill(tmp_path / str(moment) / "out")
            command = [sys.executable, "-c", KILLED, str(moment), way, str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
            check_out(out, overwrite=True)  # as the next run with this OUT begins
            assert names(out.parent) == ["out"]
            content = (out / "weights").read_text()
            assert output.is_ours(out)
            seen.add(content)
            if done.returncode == 0:
                break
        assert done.stdout == "done\n"
        assert seen == {"old", "new"}
        assert moment > 10


class TestCheckOut:
    def test_before_the_work(self, tmp_path):
        (tmp_path / "file").write_text("")
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "one.jpg").write_text("")
        (tmp_path / "empty").mkdir()
        check_out(tmp_path / "empty")
        check_out(tmp_path / "a" / "b")
        for path, overwrite, words in (
            ("file", True, "is a file"),
            ("photos", False, "exists already"),
            ("photos", True, "not a checkpoint"),
            ("file/out", False, "not writable"),
        ):
            with pytest.raises(InputError, match=words):
                check_out(tmp_path / path, overwrite)
        assert names(tmp_path) == ["empty", "file", "photos"]

    @pytest.mark.parametrize(
        "files",
        [
            {"config.json": '{"model_type": "llama"}'},
            {"fastprune/__init__.py": ""},
            {"fastprune/metrics.json": "not json"},
            {"fastprune/metrics.json": '{"versions": 3}'},
            {"fastprune/metrics.json": '{"accuracy": 1}'},
            {"fastprune/metrics.json": '{"versions": {"fastprune": "1"}}', ".git/HEAD": "ref"},
        ],
        ids=["a model", "a checkout", "broken", "odd", "another's", "a repository"],
    )
    def test_only_what_is_ours_is_replaced(self, tmp_path, files):
        for name, content in files.items():
            file = tmp_path / "out" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        with pytest.raises(InputError, match="--overwrite does not replace it"):
            check_out(tmp_path / "out", overwrite=True)

    def test_this_project_is_not_ours(self):
        assert not output.is_ours(Path(__file__).parents[1])

    @pytest.mark.parametrize("file", ["metrics.json", "state/run.json"])
    def test_a_result_and_a_state_are(self, tmp_path, file):
        path = tmp_path / "out" / RECORDS / file
        path.parent.mkdir(parents=True)
        content = {"versions": {"fastprune": "1"}, "settings": {}, "stage": 0}
        path.write_text(json.dumps(content))
        check_out(tmp_path / "out", overwrite=True)

    def test_what_a_run_left_before_its_first_step(self, tmp_path):
        records = tmp_path / "out" / RECORDS
        (records / ".state.fastprune" / "new").mkdir(parents=True)
        (records / "state").mkdir()
        for name in ("run.log", ".state.fastprune/new/run.json", "state/.run.json.fastprune-x7"):
            (records / name).write_text("{")
        check_out(tmp_path / "out")
        (records / "notes.txt").write_text("years of work")
        with pytest.raises(InputError, match="exists already"):
            check_out(tmp_path / "out")

    def test_a_link(self, tmp_path):
        fill(tmp_path / "real")
        (tmp_path / "out").symlink_to(tmp_path / "real")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        for name, target in (("out", "real"), ("dangling", "nowhere")):
            with pytest.raises(InputError, match=f"symbolic link; .*{target}"):
                check_out(tmp_path / name, overwrite=True)
        (tmp_path / "above").symlink_to(tmp_path)
        check_out(tmp_path / "above" / "real", overwrite=True)

    @pytest.mark.parametrize("name", output.WRITTEN_INTO)
    def test_a_link_in_it_that_would_be_written_through(self, tmp_path, name):
        (tmp_path / "elsewhere").mkdir()
        link = tmp_path / "out" / name
        link.parent.mkdir(parents=True)
        link.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(InputError, match=rf"{link}: is a symbolic link, which the run would"):
            check_out(tmp_path / "out", overwrite=True)

    def test_a_mount_point(self, tmp_path, monkeypatch):
        out = fill(tmp_path / "a mount")
        mounts = tmp_path / "mountinfo"
        line = f"36 35 98:0 /root {str(out).replace(' ', chr(92) + '040')} rw - ext4 /dev/sda rw"
        mounts.write_text(f"1 1 8:1 / / rw - ext4 /dev/sda rw\n{line}\n")
        monkeypatch.setattr(output, "MOUNTS", mounts)
        with pytest.raises(InputError, match="is a mount point"):
            check_out(out, overwrite=True)
        with pytest.raises(InputError, match="is a mount point"):
            check_out(Path("/proc"), overwrite=True)

    @pytest.mark.parametrize("length", [240, 300])
    def test_a_name_that_is_too_long_for_a_folder_beside_it(self, tmp_path, length):
        check_out(tmp_path / ("x" * 230))
        with pytest.raises(InputError, match="cannot be created: File name too long"):
            check_out(tmp_path / ("x" * length))

    def test_a_folder_that_cannot_be_reached(self, tmp_path, monkeypatch):
        def refused(path, *args, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "exists", refused)
        with pytest.raises(InputError, match="cannot be created: Permission denied"):
            output.check_place(tmp_path / "out")

    def test_the_current_folder(self, tmp_path, monkeypatch):
        (fill(tmp_path / "out") / "deeper").mkdir()
        monkeypatch.chdir(tmp_path / "out" / "deeper")
        for out in ("..", ".", tmp_path / "out"):
            with pytest.raises(InputError, match="holds the current folder"):
                check_out(Path(out), overwrite=True)
        check_out(Path("new"))

    def test_a_folder_of_another_user(self, tmp_path, monkeypatch):
        fill(tmp_path / "out")
        tmp_path.chmod(0o1777)
        monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
        with pytest.raises(InputError, match="its permissions forbid it"):
            check_out(tmp_path / "out", overwrite=True)

    def test_without_permission(self, tmp_path, monkeypatch):
        fill(tmp_path / "out")
        real = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path).name != "out" and real(path, mode)
        )
        with pytest.raises(InputError, match="its permissions forbid it"):
            check_out(tmp_path / "out", overwrite=True)


class TestInputs:
    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("out", "is what the run reads .*out"),
            ("out/weights", "holds .*out/weights, which the run reads"),
            ("", "lies in"),
            ("../{}-inputs/link", "holds .*link, which the run reads"),
            ("../{}-inputs/linked", "holds .*linked, which the run reads"),
        ],
    )
    def test_in_the_output_or_around_it(self, tmp_path, source, words):
        out = fill(tmp_path / "out")
        others = tmp_path.parent / f"{tmp_path.name}-inputs"
        others.mkdir()
        (others / "link").symlink_to(out / "weights")
        (others / "linked").mkdir()
        (others / "linked" / "model.safetensors").symlink_to(out / "weights")
        with pytest.raises(InputError, match=words):
            check_out(out, True, [tmp_path / source.format(tmp_path.name)])
        assert names(out) == [RECORDS, "weights"]

    def test_apart_from_it(self, tmp_path, monkeypatch):
        fill(tmp_path / "out")
        fill(tmp_path / "out-2")
        monkeypatch.chdir(tmp_path)
        sources = ["out-2", "hf:a/b", "smollm2-135m", "", "gone/out", "x" * 5000, "~nobody/x"]
        check_apart(Path("out"), sources)
