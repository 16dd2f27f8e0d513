"""DIR/fastprune of a finetuning run: what a killed run needs to go on, and the records of it.

    DIR/fastprune/
      train_log.jsonl         one line a logged step
      tensorboard/            with --log-to tensorboard, a folder a stage and start
      run.log                 everything the run has said, from its first second on
      state/run.json          settings, results of the finished stages, the stage at work
      state/start-N.safetensors    all weights as stage N began (N > 0; stage 0 begins with MODEL)
      state/stage-N/checkpoint-S   what the training loop goes on from

At the end a folder with the model's own files and all of these takes the place of DIR in one step.
Until then DIR is what it was before, an earlier model or none, and the same command continues the
run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastprune.distributed import ALONE, Processes
from fastprune.errors import InputError, NumericalError
from fastprune.files import sync, write_whole
from fastprune.output import (
    RECORDS,
    RUN_LOG,
    check_apart,
    check_out,
    check_place,
    replacing,
)
from fastprune.progress import log as progress_log
from fastprune.readers import parse_json, read_json
from fastprune.recover.checkpoints import (
    BEST,
    OWN_STATE,
    WRITING,
    checkpoints,
    damage,
    is_named,
    last_words,
    write_tensors,
)
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.loggers import EVENTS
from fastprune.report.run import lasting_log, settings, write_json
from fastprune.space import disk_errors
from fastprune.workplace import remove_leftovers

NOT_COMPARED = {
    "json", "quiet", "verbose", "threads", "out", "overwrite", "resume", "log_to", "log_steps",
    "save_steps", "keep_last", "prompt", "generate_steps", "guard_snapshot_steps", "shard",
    "read_back", "gate_ppl_ratio", "keep_worse",
}  # fmt: skip
"""Settings that may differ between a run and its continuation: they do not change the result."""
PACE = {"lr", "layer_lrs", "max_steps", "epochs"}
"""Settings that may differ, too, where the checkpoint to continue from is named."""
STAGE = re.compile(r"stage-(\d{1,9})")
UNFINISHED = ".final-"
"""What earlier versions called a model that was being written, inside DIR/fastprune."""


log = logging.getLogger("fastprune")


class RunFolder:
    """The state of one run in `out`, or in a temporary folder where there is no `out`.

    `record` is what run.json holds: settings, stage (the number of the stage at work), results,
    replaces (whether DIR holds an earlier result, which goes when this one is complete), and, of a
    finished run, files (what it has put into DIR). All `processes` that train together have one,
    and the first one writes.
    """

    def __init__(self, records: Path, config: FinetuneConfig, processes: Processes = ALONE) -> None:
        self.records, self.processes = records, processes
        self.state = records / "state"
        self.log_file = records / "train_log.jsonl"
        self.run_log = records / RUN_LOG
        self.record: dict[str, Any] = {"settings": settings(config), "stage": 0, "results": []}
        self.checkpoint: Path | None = None
        """to continue the stage at work from; None starts it"""
        self.resumed = False
        self.lasting = False
        """whether a later call can continue it; none does where there is no `out`"""
        self.claim: Path | None = None
        """what `claimed` gave for `out`, where the caller has it while the run lasts"""

    # ------------------------------------------------------------------------ beginning

    @classmethod
    def open(cls, config: FinetuneConfig, processes: Processes = ALONE) -> RunFolder:
        """Decide from what lies in --out whether to begin or to continue; nothing is written.

        Raises InputError when --out holds something else, or a run with other settings, and
        NumericalError when it holds one that gave up: going on would end where that did.
        """
        out = config.out
        assert out is not None  # run_finetune has seen it
        folder = cls(Path(out).absolute() / RECORDS, config, processes)
        folder.lasting = True
        for place in (out, folder.state):
            remove_leftovers(place)
        check_place(out)
        check_apart(out, config.inputs())
        if config.resume not in ("auto", "never"):
            folder._continue_from(Path(config.resume).expanduser(), config)
            return folder
        begun = folder._unfinished(anew=config.resume == "never")
        if begun is None or config.resume == "never" or folder._never_stepped(begun, config):
            earlier = (folder.records / "metrics.json").exists()
            check_out(out, config.overwrite or (begun is not None and not earlier))
            folder.record["replaces"] = earlier
            return folder
        folder.checkpoint = folder._newest(begun["stage"])
        if folder.checkpoint and (reason := last_words(folder.checkpoint)):
            raise NumericalError(
                f"{out} holds a run that gave up at {reason}. Begin anew with --resume never and a "
                "lower --lr, or let it go on from its last good state: --resume "
                f"{folder.checkpoint}"
            )
        folder._adopt(begun, config)
        return folder

    def _never_stepped(self, record: dict[str, Any], config: FinetuneConfig) -> bool:
        """Whether the run had other settings and came to no checkpoint: nothing of it is lost."""
        come_far = record["stage"] or record["results"] or checkpoints(self.stage_folder(0))
        return not come_far and self._other_settings(record, config) is not None

    def _unfinished(self, *, anew: bool) -> dict[str, Any] | None:
        """What run.json holds of a run that can go on; `anew` takes a damaged one for that, too."""
        file = self.state / "run.json"
        if not file.is_file():
            return None
        try:
            record = _read_record(file)
        except InputError:
            if not anew:
                raise
            return {}
        return None if record.get("finished") else record

    def _adopt(
        self, record: dict[str, Any], config: FinetuneConfig, free: Iterable[str] = ()
    ) -> None:
        """Go on with the run of `record`. InputError where a setting not in `free` is another."""
        key = self._other_settings(record, config, free)
        if key is not None:
            where = config.out if not free else config.resume
            ways = "--resume never to begin anew"
            if key in PACE and self.checkpoint is not None:
                ways = f"--resume {self.checkpoint} to go on from there with another, or {ways}"
            now, then = settings(config)[key], record["settings"].get(key)
            raise InputError(
                f"{where} holds a run that was begun with --{key.replace('_', '-')} {then}, not "
                f"{now}: give the same to continue it, or {ways}"
            )
        record["results"] = record["results"][: record["stage"]]
        record["settings"] = settings(config)
        self.record, self.resumed = record, True

    def _other_settings(
        self, record: dict[str, Any], config: FinetuneConfig, free: Iterable[str] = ()
    ) -> str | None:
        """The first setting that changes the result and is another than `record` has."""
        now, then = settings(config), record["settings"]
        compared = [key for key in now if key not in NOT_COMPARED and key not in free]
        return next((key for key in compared if now[key] != then.get(key)), None)

    def _newest(self, stage: int) -> Path | None:
        """The newest checkpoint that is whole; a warning names those that are not."""
        for checkpoint in reversed(checkpoints(self.stage_folder(stage))):
            if (harm := damage(checkpoint)) is None:
                return checkpoint
            log.warning("%s is damaged and passed over: %s", checkpoint, harm)
        return None

    def _continue_from(self, path: Path, config: FinetuneConfig) -> None:
        """--resume PATH: a checkpoint of this run or of another one."""
        if not (path / OWN_STATE).is_file():
            raise InputError(f"--resume {path}: not a checkpoint of a run; {_instead(path)}")
        if (harm := damage(path)) is not None:
            others = [p for p in checkpoints(path.parent) if damage(p) is None]
            older = f"give {others[-1]}" if others else "begin anew: --resume never"
            raise InputError(f"--resume {path}: is damaged ({harm}); {older}")
        path = path.absolute()
        found = STAGE.fullmatch(path.parent.name)
        if found is None or not is_named(path):
            raise InputError(
                f"--resume {path}: was moved or renamed, and does not say of which stage and step "
                "it is; put it back as stage-N/checkpoint-N beside run.json"
            )
        source = path.parent.parent
        own = source == self.state
        if not own:
            check_out(self.records.parent, config.overwrite, [path])
        record = _read_record(source / "run.json")
        record["stage"] = int(found[1])
        if record.pop("finished", False) or not own:
            record["replaces"] = not own and (self.records / "metrics.json").exists()
        if not own:
            record.pop("files", None)
        self._adopt(record, config, PACE)
        self.checkpoint = path
        self._source = source

    _source: Path | None = None
    _anew = False
    """whether the state is that of a run which this call began"""

    def begin(self) -> None:
        """Make the folder, before the first step: the state of an abandoned run goes."""
        if not self.processes.first:
            return
        if self.resumed:
            self.state.mkdir(parents=True, exist_ok=True)
            self._take_over_weights()
            self._remove_half_written()
            self.save()
            return
        shutil.rmtree(self.records / EVENTS, ignore_errors=True)
        self.log_file.unlink(missing_ok=True)
        with replacing(self.state) as state:  # in one step, so that none goes on from the old one
            write_json(state / "run.json", self.record)
        self._anew = True

    def _take_over_weights(self) -> None:
        """Of a run that is continued in another folder: how its stage began, and its best."""
        number = self.record["stage"]
        for name in (f"start-{number}.safetensors", f"stage-{number}/{BEST}"):
            if self._source is not None and (self._source / name).is_file():
                (self.state / name).parent.mkdir(exist_ok=True)
                _take_along(self._source / name, self.state / name)

    def _remove_half_written(self) -> None:
        """Remove what a killed process was writing into `state`."""
        for path in [*self.state.glob(".*"), *self.state.glob("stage-*/.*")]:
            path.unlink(missing_ok=True)
        for path in self.state.glob(f"stage-*/{WRITING}"):
            shutil.rmtree(path, ignore_errors=True)

    def save(self) -> None:
        """Write run.json."""
        if self.processes.first:
            write_json(self.state / "run.json", self.record)

    # ------------------------------------------------------------------------ stages

    def stage_folder(self, number: int) -> Path:
        return self.state / f"stage-{number}"

    def start_weights(self) -> dict[str, Tensor] | None:
        """All weights as the stage at work began; None where it begins with MODEL."""
        number = self.record["stage"]
        file = (self._source or self.state) / f"start-{number}.safetensors"
        try:
            return load_file(file, device="cpu") if number else None
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{file} is missing or damaged: begin the run anew (--resume never)"
            ) from error

    def perplexity(self) -> float | None:
        """What the weights kept so far have; None where it is not measured."""
        kept = [r["perplexity"]["after"] for r in self.record["results"] if r["kept"]]
        return kept[-1] if kept else self.record.get("before")

    def add_result(self, result: dict[str, Any]) -> None:
        """The stage at work is done, and `result` says how it went.

        It stays the stage at work, in run.json too, until `next_stage` or `finish`: killed before
        that, a continuation finds its last checkpoint and comes to the same result.
        """
        self.record["results"].append(result)

    def next_stage(self, model: nn.Module) -> None:
        """Another stage begins, with the weights of `model`."""
        number = self.record["stage"] + 1
        if not self.processes.first:
            self.record["stage"] = number
            return
        with disk_errors(self.state):
            tensors = {n: p.detach() for n, p in model.named_parameters()}
            write_tensors(self.state / f"start-{number}.safetensors", tensors)
        self.record["stage"] = number
        self.save()
        (self.state / f"start-{number - 1}.safetensors").unlink(missing_ok=True)
        shutil.rmtree(self.stage_folder(number - 1), ignore_errors=True)

    # ------------------------------------------------------------------------ the logs

    @contextmanager
    def keeping_log(self) -> Iterator[None]:
        """Everything that is said in the block goes to the end of run.log, at once.

        After an InputError before the first checkpoint of a new run the file is gone, the state,
        and the folders that were made for them.
        """
        if not self.processes.first:
            yield
            return
        with lasting_log(self.run_log, self.state.exists):
            if self.checkpoint is not None:
                step = int(self.checkpoint.name.rpartition("-")[2])
                progress_log.info("continuing at step %d from %s", step, self.checkpoint)
            try:
                yield
            except (InputError, OSError):
                self._withdraw()
                raise
            except KeyboardInterrupt:
                if self.state.is_dir():
                    auto = self.record["settings"]["resume"] == "auto"
                    command = "the same command" + ("" if auto else " without --resume")
                    log.warning("the state is in %s; %s continues", self.state, command)
                raise

    def _withdraw(self) -> None:
        """Remove the state of a new run that has nothing to go on from."""
        come_far = self.record["stage"] or self.record["results"]
        if self._anew and not come_far and not checkpoints(self.stage_folder(0)):
            self.log_file.unlink(missing_ok=True)
            for made in (self.records / EVENTS, self.state):
                shutil.rmtree(made, ignore_errors=True)

    def add_line(self, line: dict[str, Any]) -> None:
        """Append one line to train_log.jsonl."""
        if self.processes.first:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """The lines of train_log.jsonl so far; a last one cut short by a kill is left out."""
        if not self.log_file.is_file():
            return []
        found: list[dict[str, Any]] = []
        for text in self.log_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = parse_json(text)
            except ValueError:
                break
            if not isinstance(line, dict) or not {"stage", "step"} <= line.keys():
                break
            found.append(line)
        return found

    def sync_log(self) -> None:
        """Wait until train_log.jsonl is on the disk, of which a checkpoint is the continuation."""
        if self.log_file.is_file():
            sync(self.log_file)

    def cut_log(self, stage: int, step: int) -> None:
        """Forget the lines after `step` of stage number `stage`: these steps are done again."""
        if not self.processes.first:
            return
        kept = [x for x in self.lines() if (x["stage"], x["step"]) <= (stage, step)]
        write_whole(self.log_file, "".join(json.dumps(x) + "\n" for x in kept))

    # ------------------------------------------------------------------------ the end

    def finish(self, write: Callable[[Path], None]) -> None:
        """Let `write` fill a folder with the model's files, and put it in the place of DIR.

        What else lies in DIR goes along, unless DIR held an earlier result that this one replaces.
        A kill at any moment leaves a run that the same command finishes, or the complete model.
        """
        out = self.records.parent
        with replacing(out, claim=self.claim) as fresh:
            write(fresh)
            files = sorted(path.name for path in fresh.iterdir() if path.name != RECORDS)
            earlier = self.record.get("files", [])
            done = {**self.record, "finished": True, "files": files}
            (fresh / RECORDS / "state").mkdir(parents=True)
            write_json(fresh / RECORDS / "state" / "run.json", done)
            for path in self._to_keep(out, earlier):
                _take_along(path, fresh / path.relative_to(out))
        self.record = done

    def _to_keep(self, out: Path, earlier: list[str]) -> list[Path]:
        """What DIR shall hold besides the new model; `earlier` are this run's own files in it."""
        own = [*self.state.iterdir(), self.log_file, self.run_log, self.records / EVENTS]
        own = [path for path in own if not path.name.startswith(("start-", ".")) and path.exists()]
        if self.record.get("replaces"):
            return own
        others = [path for path in out.iterdir() if path.name not in (RECORDS, *earlier)]
        records = [
            path
            for path in self.records.iterdir()
            if path != self.state and not path.name.startswith((UNFINISHED, ".state."))
        ]
        return [*own, *others, *records]


def _read_record(file: Path) -> dict[str, Any]:
    """What run.json holds. Raises InputError where it is not what a run of ours has written."""
    try:
        record = read_json(file)
        whole = (
            isinstance(record["stage"], int)
            and isinstance(record["settings"], dict)
            and isinstance(record["results"], list)
        )
    except (InputError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(
            f"{file}: missing or damaged, so the run cannot be continued; begin it anew: --resume "
            "never"
        )
    return record


def _instead(path: Path) -> str:
    """What to give to --resume in the place of `path`: the newest checkpoint that lies in it."""
    states = [path, path.parent, path / "state", path / RECORDS / "state"]
    stages = {stage for state in states for stage in (state, *state.glob("stage-*"))}
    found = [p for stage in sorted(stages) for p in checkpoints(stage) if damage(p) is None]
    if found:
        return f"give {max(found, key=lambda p: (p / OWN_STATE).stat().st_mtime)}"
    return "no checkpoint lies there either; for the weights of a model give it as MODEL"


def _take_along(source: Path, target: Path) -> None:
    """Put `source` at `target` too, but for what is there already: links, where there can be."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            _take_along(path, target / path.name)
    elif not os.path.lexists(target):
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)
