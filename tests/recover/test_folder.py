"""DIR of a finetuning run: an old or a new model whatever happens, or a run that goes on."""

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastprune import output
from fastprune.errors import InputError
from fastprune.files import seal
from fastprune.recover.checkpoints import BEST, OPTIMIZER, OWN_STATE, SCHEDULE, WEIGHTS
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.folder import RunFolder
from fastprune.recover.monitor import Monitor
from fastprune.recover.state import State

FILES = (OWN_STATE, WEIGHTS, OPTIMIZER, SCHEDULE)


class Killed(BaseException):
    """Stands for SIGKILL; what runs after it in this process does so in the next one, too."""


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def config(out: Path, **changed) -> FinetuneConfig:
    return FinetuneConfig(model="org/model", data="hf:org/data", out=out, **changed)


def earlier_model(out: Path) -> None:
    """What a run of prune left."""
    (out / "fastprune").mkdir(parents=True)
    (out / "config.json").write_text('{"is": "old"}')
    (out / "model-00001-of-00002.safetensors").write_text("old")
    (out / "fastprune" / "metrics.json").write_text('{"versions": {"fastprune": "1"}}')


def begun(out: Path, **changed) -> RunFolder:
    """A run with one line in its log and one checkpoint of its first stage."""
    folder = RunFolder.open(config(out, **changed))
    folder.begin()
    folder.add_line({"stage": 0, "step": 1})
    write_checkpoint(folder.stage_folder(0) / "checkpoint-1")
    return folder


def write_checkpoint(checkpoint: Path) -> None:
    """The smallest that is whole."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / OWN_STATE).write_text(json.dumps(State().saved({})))
    save_file({"weight": torch.zeros(9)}, checkpoint / WEIGHTS)
    for name in (OPTIMIZER, SCHEDULE):
        torch.save({"step": 1}, checkpoint / name)


def write(directory: Path) -> None:
    """The model and its records, as the command writes them."""
    (directory / "config.json").write_text('{"is": "new"}')
    (directory / "model.safetensors").write_text("new")
    (directory / "fastprune").mkdir()
    (directory / "fastprune" / "metrics.json").write_text('{"versions": {"fastprune": "2"}}')


def model_in(out: Path) -> str | None:
    """Which complete model `out` holds."""
    if not (out / "config.json").is_file():
        return None
    which = json.loads((out / "config.json").read_text())["is"]
    files = {"old": "model-00001-of-00002.safetensors", "new": "model.safetensors"}
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["config.json", "fastprune", files[which]]
    )
    return which


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_whole_run_is_in_the_finished_folder(out, overwrite):
    if overwrite:
        earlier_model(out)
    folder = begun(out, overwrite=overwrite)
    (folder.records / ".final-old").mkdir()
    folder.finish(write)
    assert model_in(out) == "new"
    assert folder.lines() == [{"stage": 0, "step": 1}]
    assert (folder.stage_folder(0) / "checkpoint-1" / OWN_STATE).is_file()
    assert json.loads((folder.state / "run.json").read_text())["finished"]
    assert sorted(path.name for path in folder.records.iterdir()) == [
        *("metrics.json", "state", "train_log.jsonl")
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_was_put_beside_the_run_stays(out):
    folder = begun(out)
    (out / "notes.txt").write_text("years of work")
    (folder.records / "eval.json").write_text("{}")
    folder.finish(write)
    assert (out / "notes.txt").read_text() == "years of work"
    assert (folder.records / "eval.json").is_file()
    again = RunFolder.open(config(out, resume=str(folder.stage_folder(0) / "checkpoint-1")))
    again.begin()

    def another(directory: Path) -> None:
        write(directory)
        (directory / "model.safetensors").rename(directory / "adapter.safetensors")

    again.finish(another)  # files of its own that it does not write again are gone
    assert sorted(path.name for path in out.iterdir()) == [
        *("adapter.safetensors", "config.json", "fastprune", "notes.txt")
    ]


def test_without_hard_links(out, monkeypatch):
    def refused(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    folder = begun(out)
    folder.finish(write)
    assert folder.lines() == [{"stage": 0, "step": 1}]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt])
@pytest.mark.parametrize("slow", [False, True], ids=["exchange", "two renames"])
def test_stopped_at_any_moment_of_the_last_phase(out, monkeypatch, overwrite, error, slow):
    """The model of before, or the new one, or a run that the same command finishes."""
    if slow:
        monkeypatch.setattr(output, "_exchange_paths", lambda one, other: False)
    changed = {"overwrite": overwrite}
    seen = set()
    for moment in range(1, 200):
        here = out.parent / str(moment) / "out"
        if overwrite:
            earlier_model(here)
        folder = begun(here, **changed)
        with monkeypatch.context() as patch:
            steps = stop_at(patch, moment, error)
            with suppress(error):
                folder.finish(write)
        try:
            again = RunFolder.open(config(here, **changed, resume="auto"))
        except InputError:  # a complete model, which is not overwritten
            assert not overwrite
            assert model_in(here) == "new"
        else:
            found = model_in(here) if overwrite else None
            assert again.resumed or found == "new"
            if again.resumed:
                assert again.lines() == [{"stage": 0, "step": 1}]
                assert again.checkpoint is not None
                assert not overwrite or found == "old"
                again.begin()
                again.finish(write)
                seen.add("went on")
            assert model_in(here) == "new"
        assert [path.name for path in here.parent.iterdir()] == ["out"]
        if len(steps) < moment:
            break
    assert moment > 10
    assert seen == {"went on"}


def stop_at(patch: pytest.MonkeyPatch, moment: int, error: type[BaseException]) -> list[str]:
    """Raise `error` after that many changes of the disk; the changes so far.

    After `Killed` nothing is changed any more, as by a process that is gone.
    """
    steps: list[str] = []

    def stopping(name):
        original = getattr(os, name)

        def call(*args, **options):
            if error is Killed and len(steps) >= moment:
                raise Killed
            result = original(*args, **options)
            steps.append(name)
            if len(steps) == moment:
                raise error
            return result

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "link", "fsync"):
        patch.setattr(os, name, stopping(name))
    return steps


class TestOverwrite:
    def test_of_an_unfinished_run_goes_on(self, out):
        earlier_model(out)
        begun(out, overwrite=True)
        for overwrite in (True, False):  # what was agreed to stays agreed to
            again = RunFolder.open(config(out, overwrite=overwrite))
            assert again.resumed
            assert again.checkpoint is not None
            assert again.record["replaces"]

    def test_of_other_settings_says_how_to_begin_anew(self, out):
        earlier_model(out)
        begun(out, overwrite=True)
        with pytest.raises(InputError, match=r"--lr None, not 0.1: .* or --resume never"):
            RunFolder.open(config(out, overwrite=True, lr=0.1))
        again = RunFolder.open(config(out, overwrite=True, lr=0.1, resume="never"))
        assert not again.resumed
        again.begin()
        assert again.lines() == []
        assert not again.stage_folder(0).exists()
        assert model_in(out) == "old"

    def test_never_alone_does_not_replace_a_model(self, out):
        earlier_model(out)
        begun(out, overwrite=True)
        with pytest.raises(InputError, match="exists already"):
            RunFolder.open(config(out, resume="never"))

    @pytest.mark.parametrize("moment", range(1, 12))
    def test_stopped_while_it_begins_anew(self, out, monkeypatch, moment):
        earlier_model(out)
        begun(out, overwrite=True)
        folder = RunFolder.open(config(out, overwrite=True, resume="never"))
        with monkeypatch.context() as patch:
            stop_at(patch, moment, Killed)
            with suppress(Killed):
                folder.begin()
        assert model_in(out) == "old"
        again = RunFolder.open(config(out, overwrite=True))
        assert again.resumed
        assert (again.checkpoint is None) == (not again.stage_folder(0).exists())

    def test_a_looser_gate_goes_on(self, out):
        begun(out, gate_ppl_ratio=1.0)
        assert RunFolder.open(config(out, gate_ppl_ratio=2.0)).resumed


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "out"},
        {"teacher": "out/fastprune"},
        {"data": "hf:org/data,out/config.json"},
        {"eval": "out"},
        {"recipe": "out/config.json"},
        {"prompt": "out/prompts.txt"},
    ],
)
def test_what_is_read_is_not_replaced(out, changed, monkeypatch):
    earlier_model(out)
    (out / "prompts.txt").write_text("The river")
    monkeypatch.chdir(out.parent)
    settings = {"model": "org/model", "data": "hf:org/data", "out": out, "overwrite": True}
    with pytest.raises(InputError, match="read"):
        RunFolder.open(FinetuneConfig(**settings | changed))


def test_a_stage_of_another_run_can_be_continued_twice(tmp_path):
    """Weights that a later stage began with come from the other run, and are kept here."""
    first = begun(tmp_path / "first")
    first.record["stage"] = 1
    first.save()
    (first.state / "start-1.safetensors").write_text("weights")
    checkpoint = first.stage_folder(1) / "checkpoint-3"
    write_checkpoint(checkpoint)
    RunFolder.open(config(tmp_path / "out", resume=str(checkpoint))).begin()
    again = RunFolder.open(config(tmp_path / "out"))
    assert again.resumed
    assert (again.state / "start-1.safetensors").read_text() == "weights"


class TestDamagedCheckpoints:
    @pytest.mark.parametrize("file", FILES)
    def test_the_next_older_one_is_taken(self, out, file, caplog):
        folder = begun(out)
        older, newest = (folder.stage_folder(0) / f"checkpoint-{n}" for n in (1, 2))
        write_checkpoint(newest)
        content = (newest / file).read_bytes()
        (newest / file).write_bytes(content[: len(content) // 2])
        again = RunFolder.open(config(out))
        assert again.resumed and again.checkpoint == older
        assert f"{newest} is damaged and passed over" in caplog.text
        with pytest.raises(InputError, match=rf"is damaged .*; give {older}"):
            RunFolder.open(config(out, resume=str(newest)))

    @pytest.mark.parametrize("file", FILES)
    def test_a_changed_byte_of_a_sealed_one_is_seen(self, out, file):
        folder = begun(out)
        older, newest = (folder.stage_folder(0) / f"checkpoint-{n}" for n in (1, 2))
        for checkpoint in (older, newest):
            write_checkpoint(checkpoint)
            seal(checkpoint)
        content = bytearray((newest / file).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / file).write_bytes(content)
        assert RunFolder.open(config(out)).checkpoint == older

    @pytest.mark.parametrize("content", ["[]", "{}", '{"monitor": 3}', "null", "\x00"])
    def test_figures_that_are_none(self, out, content):
        folder = begun(out)
        newest = folder.stage_folder(0) / "checkpoint-2"
        write_checkpoint(newest)
        (newest / OWN_STATE).write_text(content)
        assert RunFolder.open(config(out)).checkpoint == folder.stage_folder(0) / "checkpoint-1"

    @pytest.mark.parametrize("content", [None, b"", b"{"])
    def test_the_best_weights_belong_to_those_that_came_after_them(self, out, content):
        folder = begun(out)
        newest = folder.stage_folder(0) / "checkpoint-2"
        write_checkpoint(newest)
        state = State(monitor=Monitor(best=1.0, best_step=2)).saved({})
        (newest / OWN_STATE).write_text(json.dumps(state))
        if content is not None:
            (folder.stage_folder(0) / BEST).write_bytes(content)
        assert RunFolder.open(config(out)).checkpoint == folder.stage_folder(0) / "checkpoint-1"

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"stage": "../../..", "settings": {}}'])
    def test_of_the_run_itself(self, out, content):
        folder = begun(out)
        folder.run_log.write_text("said")
        (folder.state / "run.json").write_text(content)
        with pytest.raises(InputError, match=r"run.json: missing or damaged.* --resume never"):
            RunFolder.open(config(out))
        checkpoint = folder.stage_folder(0) / "checkpoint-1"
        with pytest.raises(InputError, match=r"run.json: missing or damaged"):
            RunFolder.open(config(out, resume=str(checkpoint)))
        again = RunFolder.open(config(out, resume="never"))
        again.begin()
        assert not again.stage_folder(0).exists()

    @pytest.mark.parametrize("name", ["stage-0/mine", "stage-0/checkpoint-2-a", "b/checkpoint-1"])
    def test_of_the_name_of_a_checkpoint(self, out, name):
        folder = begun(out)
        write_checkpoint(folder.state / name)
        with pytest.raises(InputError, match="moved or renamed"):
            RunFolder.open(config(out, resume=str(folder.state / name)))
        assert RunFolder.open(config(out)).checkpoint == folder.stage_folder(0) / "checkpoint-1"

    @pytest.mark.parametrize("content", [None, b"", b"weights"])
    def test_of_the_weights_that_a_stage_began_with(self, out, content):
        folder = begun(out)
        folder.record["stage"] = 1
        folder.save()
        if content is not None:
            (folder.state / "start-1.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="missing or damaged: begin the run anew"):
            RunFolder.open(config(out)).start_weights()

    def test_of_the_log_what_comes_before_is_kept(self, out):
        folder = begun(out)
        with folder.log_file.open("ab") as file:
            file.write(b'\x00\xff{"stage": 0, "step": 2}\n')
        assert folder.lines() == [{"stage": 0, "step": 1}]

    def test_without_another_one_the_stage_begins_again(self, out):
        folder = begun(out)
        checkpoint = folder.stage_folder(0) / "checkpoint-1"
        (checkpoint / WEIGHTS).unlink()
        again = RunFolder.open(config(out))
        assert again.resumed and again.checkpoint is None
        with pytest.raises(InputError, match=r"is damaged .* --resume never"):
            RunFolder.open(config(out, resume=str(checkpoint)))


class TestNamedCheckpoint:
    def test_may_go_on_at_another_pace(self, out):
        checkpoint = begun(out).stage_folder(0) / "checkpoint-1"
        with pytest.raises(InputError, match=f"--resume {checkpoint} to go on from there"):
            RunFolder.open(config(out, lr=0.1))
        changed = {"lr": 0.1, "max_steps": 7, "epochs": 2.0}
        again = RunFolder.open(config(out, resume=str(checkpoint), **changed))
        assert again.resumed
        again.begin()
        assert RunFolder.open(config(out, **changed)).resumed  # and so does the same without a name
        with pytest.raises(InputError, match=r"--weight-decay None, not 0\.5"):
            RunFolder.open(config(out, resume=str(checkpoint), weight_decay=0.5))

    @pytest.mark.parametrize(
        "place", ["", "fastprune", "fastprune/state", "fastprune/state/stage-0"]
    )
    def test_is_named_where_a_folder_above_it_is_given(self, out, place):
        checkpoint = begun(out).stage_folder(0) / "checkpoint-1"
        with pytest.raises(InputError, match=f"not a checkpoint of a run; give {checkpoint}"):
            RunFolder.open(config(out, resume=str(out / place)))

    def test_of_another_run_replaces_a_model_where_that_is_wanted(self, tmp_path, out):
        earlier_model(out)
        checkpoint = begun(tmp_path / "first").stage_folder(0) / "checkpoint-1"
        with pytest.raises(InputError, match="pass --overwrite"):
            RunFolder.open(config(out, resume=str(checkpoint)))
        folder = RunFolder.open(config(out, resume=str(checkpoint), overwrite=True))
        folder.begin()
        assert model_in(out) == "old"
        folder.finish(write)
        assert model_in(out) == "new"


def test_what_a_killed_run_was_writing_goes(out):
    folder = begun(out)
    (folder.stage_folder(0) / "writing" / "checkpoint-2").mkdir(parents=True)
    left = [folder.state / ".start-1.safetensors", folder.stage_folder(0) / ".best.safetensors"]
    left.append(folder.state / ".run.json.fastprune-x7")
    for file in left:
        file.write_text("half")
    again = RunFolder.open(config(out))
    again.begin()
    again.finish(write)
    assert sorted(path.name for path in again.state.rglob("*")) == sorted(
        ["run.json", "stage-0", "checkpoint-1", *FILES]
    )


def test_the_best_weights_come_along_to_another_folder(tmp_path, out):
    first = begun(tmp_path / "first")
    save_file({"weight": torch.zeros(9)}, first.stage_folder(0) / BEST)
    checkpoint = first.stage_folder(0) / "checkpoint-1"
    RunFolder.open(config(out, resume=str(checkpoint))).begin()
    assert (out / "fastprune/state/stage-0" / BEST).is_file()


class TestRunLog:
    def test_is_kept_and_goes_on(self, out):
        for said in ("first", "second"):
            folder = RunFolder.open(config(out))
            with suppress(Killed), folder.keeping_log():
                folder.begin()
                logging.getLogger("fastprune").warning(said)
                raise Killed
        folder = RunFolder.open(config(out))
        with folder.keeping_log():
            folder.begin()
            folder.finish(write)
            logging.getLogger("fastprune").warning("third")
        text = (out / "fastprune" / "run.log").read_text()
        assert [line.split()[-1] for line in text.splitlines() if "WARNING" in line] == [
            *("first", "second", "third")
        ]

    @pytest.mark.parametrize("error", [InputError("--data: no such file"), Killed()])
    def test_of_a_run_that_never_began_is_in_no_ones_way(self, out, error):
        folder = RunFolder.open(config(out))
        with suppress(InputError, Killed), folder.keeping_log():
            assert (out / "fastprune" / "run.log").is_file()
            raise error
        assert out.exists() == isinstance(error, Killed)
        output.check_out(out)
        assert not RunFolder.open(config(out, lr=0.1)).resumed

    def test_of_a_run_that_was_refused_at_its_first_step_goes_with_its_state(self, out):
        earlier_model(out)
        before = set(out.rglob("*"))
        folder = RunFolder.open(config(out, overwrite=True))
        with pytest.raises(InputError), folder.keeping_log():
            folder.begin()
            folder.add_line({"stage": 0, "step": 1})
            raise InputError("--lora-target-modules: no such module")
        assert set(out.rglob("*")) == before

    def test_of_a_run_that_can_go_on_stays(self, out):
        folder = RunFolder.open(config(out))
        with pytest.raises(InputError), folder.keeping_log():
            folder.begin()
            write_checkpoint(folder.stage_folder(0) / "checkpoint-1")
            raise InputError("the disk is full")
        again = RunFolder.open(config(out))
        with pytest.raises(InputError), again.keeping_log():
            raise InputError("--data: no such file")
        assert (again.resumed, again.run_log.is_file()) == (True, True)


def test_a_run_that_never_stepped_gives_way_to_other_settings(out):
    RunFolder.open(config(out, lora_r=8)).begin()
    again = RunFolder.open(config(out, lora_r=16))
    assert not again.resumed
    again.begin()
    assert RunFolder.open(config(out, lora_r=16)).resumed
