"""Where runs work: one at a time for each output, and nothing of a killed one stays."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from fastprune import workplace
from fastprune.errors import InputError
from fastprune.output import check_out, staged
from fastprune.workplace import claimed, remove_leftovers

HOLDER = """
import sys
from pathlib import Path
from fastprune.workplace import claimed

with claimed(Path(sys.argv[1])) as work:
    (work / "new").mkdir()
    (work / "new" / "weights").write_text("half")
    print("working", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def work(tmp_path):
    """What a killed run left."""
    work = tmp_path / ".out.fastprune"
    (work / "new").mkdir(parents=True)
    (work / "lock").write_text("1")
    (work / "new" / "weights").write_text("half")
    return work


@pytest.fixture
def other(out):
    """Another process that is writing to `out`."""
    command = [sys.executable, "-c", HOLDER, str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "working\n"
        yield process
        process.kill()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestLeftovers:
    def test_of_a_killed_run_go(self, tmp_path, out, work):
        check_out(out)
        assert names(tmp_path) == []

    def test_of_a_run_killed_while_it_began_or_ended(self, tmp_path, out, work):
        for file in ("new/weights", "new", "lock", ""):
            check_out(out)
            assert names(tmp_path) == []
            work.mkdir()
            if file == "new/weights":
                (work / "lock").write_text("")

    def test_of_a_living_run_stay(self, tmp_path, out, other):
        check_out(out)
        assert (tmp_path / ".out.fastprune" / "new" / "weights").is_file()

    @pytest.mark.parametrize("name", ["out-2", "in", ".out", "out.fastprune"])
    def test_of_another_output_stay(self, tmp_path, work, name):
        check_out(tmp_path / name)
        assert (work / "new" / "weights").exists()

    def test_what_no_run_makes_stays(self, tmp_path, out, work):
        (work / "thesis.tex").write_text("years of work")
        check_out(out)
        with staged(out) as fresh:
            (fresh / "weights").write_text("new")
        assert names(work) == ["thesis.tex"]

    def test_links_are_not_followed(self, tmp_path, out):
        (tmp_path / "photos" / "new").mkdir(parents=True)
        (tmp_path / ".out.fastprune").symlink_to(tmp_path / "photos")
        remove_leftovers(out)
        with pytest.raises(InputError, match="is in the way"), staged(out):
            pass
        assert names(tmp_path / "photos") == ["new"]

    def test_what_was_taken_away_comes_back(self, tmp_path, out, work):
        (work / "old").mkdir()
        (work / "old" / "weights").write_text("old")
        remove_leftovers(out)
        assert (out / "weights").read_text() == "old"
        assert names(tmp_path) == ["out"]

    def test_of_all_outputs_in_a_folder(self, tmp_path, work, out, other):
        killed = tmp_path / ".in.fastprune"
        (killed / "new").mkdir(parents=True)
        workplace.remove_all_leftovers(tmp_path)
        assert names(tmp_path) == [".out.fastprune"]


class TestClaims:
    def test_a_second_run_is_refused_at_once(self, out, other):
        with (
            pytest.raises(InputError, match=rf"another fastprune \(process {other.pid}\)"),
            claimed(out),
        ):
            pass

    def test_after_a_kill_the_next_one_begins(self, tmp_path, out, other):
        other.kill()
        other.wait()
        with claimed(out) as work:
            assert names(work) == ["lock"]
        assert names(tmp_path) == []

    def test_in_one_process_too(self, out):
        with claimed(out), pytest.raises(InputError, match="another fastprune"), claimed(out):
            pass

    def test_who_waits_comes_next(self, tmp_path, out, other):
        killed, came = threading.Event(), []

        def wait():
            with claimed(out, wait=True):
                came.append(killed.is_set())

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        killed.set()
        other.kill()
        other.wait()
        thread.join()
        assert came == [True]
        assert names(tmp_path) == []

    def test_a_run_that_is_taken_for_a_leftover_begins_again(self, tmp_path, out, monkeypatch):
        """Another run removes the folder between its making and its lock."""
        real, seen = os.open, []

        def late(path, *args, **options):
            if str(path).endswith("lock") and not seen:
                seen.append(path)
                remove_leftovers(out)
                assert names(tmp_path) == []
            return real(path, *args, **options)

        monkeypatch.setattr(os, "open", late)
        with claimed(out) as work:
            assert names(work) == ["lock"]
        assert seen

    def test_it_is_private(self, out):
        with claimed(out) as work:
            assert stat.S_IMODE(work.stat().st_mode) == 0o700
            assert stat.S_IMODE((work / "lock").stat().st_mode) == 0o600

    def test_without_locks_runs_have_folders_of_their_own(self, tmp_path, out, monkeypatch):
        def refused(handle, how):
            raise OSError(37, "No locks available")

        monkeypatch.setattr(workplace.fcntl, "flock", refused)
        with claimed(out) as one, claimed(out) as another:
            assert one != another
        assert names(tmp_path) == []

    def test_a_full_disk_is_said_in_one_line(self, tmp_path, out):
        said = rf"{out}: cannot be written: No space left on device; make room"
        with pytest.raises(InputError, match=said), staged(out) as fresh:
            (fresh / "half").write_text("written")
            raise OSError(28, "No space left on device")
        assert names(tmp_path) == []
