"""DIR/fastprune of a finetuning run: what a killed run needs to go on, and the records of it.

    DIR/fastprune/
      train_log.jsonl         one line a logged step
      tensorboard/            with --log-to tensorboard, a folder a stage and start
      state/run.json          settings, results of the finished stages, the stage at work
      state/start-N.safetensors    all weights as stage N began (N > 0; stage 0 begins with MODEL)
      state/stage-N/checkpoint-S   what transformers' Trainer resumes from

The model's own files appear in DIR at the end, config.json (or adapter_config.json) last: until
then DIR is not a model, and the same command continues the run.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastprune.errors import InputError, NumericalError
from fastprune.models.checkpoint import RECORDS, check_out
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.loggers import EVENTS
from fastprune.recover.trainer import OWN_STATE, checkpoints, last_words
from fastprune.report.run import settings, write_json

MARKS = ("config.json", "adapter_config.json")
"""Files that make a folder a model; they are moved last."""
NOT_COMPARED = {
    "json", "quiet", "verbose", "threads", "out", "overwrite", "resume", "log_to", "log_steps",
    "save_steps", "keep_last", "prompt", "generate_steps", "guard_snapshot_steps", "shard",
    "read_back",
}  # fmt: skip
"""Settings that may differ between a run and its continuation: they do not change the result."""


class RunFolder:
    """The state of one run in `out`, or in a temporary folder where there is no `out`.

    `record` is what run.json holds: settings, stage (the number of the stage at work), results.
    """

    def __init__(self, records: Path, config: FinetuneConfig) -> None:
        self.records = records
        self.state = records / "state"
        self.log_file = records / "train_log.jsonl"
        self.record: dict[str, Any] = {"settings": settings(config), "stage": 0, "results": []}
        self.checkpoint: Path | None = None
        """to continue the stage at work from; None starts it"""
        self.resumed = False

    # ------------------------------------------------------------------------ beginning

    @classmethod
    def open(cls, config: FinetuneConfig) -> RunFolder:
        """Decide from what lies in --out whether to begin or to continue; nothing is written.

        Raises InputError when --out holds something else, or a run with other settings, and
        NumericalError when it holds one that gave up: going on would end where that did.
        """
        out = config.out
        assert out is not None  # run_finetune has seen it
        folder = cls(Path(out).absolute() / RECORDS, config)
        if config.resume not in ("auto", "never"):
            folder._continue_from(Path(config.resume).expanduser(), config)
            return folder
        begun = folder._unfinished()
        if begun is None or config.overwrite or config.resume == "never":
            check_out(out, config.overwrite or begun is not None)
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

    def _unfinished(self) -> dict[str, Any] | None:
        file = self.state / "run.json"
        if not file.is_file():
            return None
        record = json.loads(file.read_text(encoding="utf-8"))
        return None if record.get("finished") else record

    def _adopt(self, record: dict[str, Any], config: FinetuneConfig) -> None:
        now, then = settings(config), record["settings"]
        for key in now:
            if key not in NOT_COMPARED and now[key] != then.get(key):
                raise InputError(
                    f"{config.out} holds a run that was begun with --{key.replace('_', '-')} "
                    f"{then.get(key)}, not {now[key]}: give the same to continue it, or "
                    "--overwrite to begin anew"
                )
        record["results"] = record["results"][: record["stage"]]
        self.record, self.resumed = record, True

    def _newest(self, stage: int) -> Path | None:
        found = checkpoints(self.stage_folder(stage))
        return found[-1] if found else None

    def _continue_from(self, path: Path, config: FinetuneConfig) -> None:
        """--resume PATH: a checkpoint of this run or of another one."""
        if not (path / OWN_STATE).is_file():
            raise InputError(
                f"--resume {path}: not a checkpoint of a run (…/fastprune/state/stage-N/"
                "checkpoint-S); for the weights of a model give it as MODEL"
            )
        path = path.absolute()
        source = path.parent.parent
        own = source == self.state
        if not own:
            check_out(self.records.parent, config.overwrite)
        record = json.loads((source / "run.json").read_text(encoding="utf-8"))
        stage = int(path.parent.name.rpartition("-")[2])
        record["stage"] = stage
        record.pop("finished", None)
        self._adopt(record, config)
        self.checkpoint = path
        self._source = source

    _source: Path | None = None

    def begin(self) -> None:
        """Make the folder, before the first step: leftovers of an abandoned run go."""
        if not self.resumed:
            shutil.rmtree(self.state, ignore_errors=True)
            shutil.rmtree(self.records / EVENTS, ignore_errors=True)
            self.log_file.unlink(missing_ok=True)
        self.state.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        """Write run.json."""
        write_json(self.state / "run.json", self.record)

    # ------------------------------------------------------------------------ stages

    def stage_folder(self, number: int) -> Path:
        return self.state / f"stage-{number}"

    def start_weights(self) -> dict[str, Tensor] | None:
        """All weights as the stage at work began; None where it begins with MODEL."""
        number = self.record["stage"]
        file = (self._source or self.state) / f"start-{number}.safetensors"
        if number and not file.is_file():
            raise InputError(f"{file} is missing: begin the run anew (--overwrite)")
        return load_file(file, device="cpu") if number else None

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
        file = self.state / f"start-{number}.safetensors"
        beside = file.with_name(f".{file.name}")
        tensors = {n: p.detach().contiguous() for n, p in model.named_parameters()}
        save_file(tensors, beside)
        os.replace(beside, file)
        self.record["stage"] = number
        self.save()
        (self.state / f"start-{number - 1}.safetensors").unlink(missing_ok=True)
        shutil.rmtree(self.stage_folder(number - 1), ignore_errors=True)

    # ------------------------------------------------------------------------ the log

    def add_line(self, line: dict[str, Any]) -> None:
        """Append one line to train_log.jsonl."""
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """The lines of train_log.jsonl so far; a last one cut short by a kill is left out."""
        if not self.log_file.is_file():
            return []
        found = []
        for text in self.log_file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except ValueError:
                break
        return found

    def cut_log(self, stage: int, step: int) -> None:
        """Forget the lines after `step` of stage number `stage`: these steps are done again."""
        kept = [x for x in self.lines() if (x["stage"], x["step"]) <= (stage, step)]
        beside = self.log_file.with_name(".train_log.jsonl")
        beside.write_text("".join(json.dumps(x) + "\n" for x in kept), encoding="utf-8")
        os.replace(beside, self.log_file)

    # ------------------------------------------------------------------------ the end

    def finish(self, write: Callable[[Path], None], clean: bool = False) -> None:
        """Let `write` fill a folder with the model's files, then move them to DIR, marks last.

        With `clean` whatever else lies in DIR, an earlier checkpoint, is removed. A kill before the
        last move leaves a run that the same command finishes.
        """
        out = self.records.parent
        work = Path(tempfile.mkdtemp(prefix=".final-", dir=self.records))
        try:
            fresh = work / "new"
            fresh.mkdir()
            write(fresh)
            names = sorted(path.name for path in fresh.iterdir() if path.name != RECORDS)
            for name in MARKS:
                (out / name).unlink(missing_ok=True)
            for path in out.iterdir() if clean else ():
                if path.name != RECORDS and path.name not in names:
                    _remove(path)
            for name in [n for n in names if n not in MARKS]:
                _remove(out / name)
                (fresh / name).rename(out / name)
            for path in (fresh / RECORDS).iterdir():
                os.replace(path, self.records / path.name)
            for name in [n for n in names if n in MARKS]:
                (fresh / name).rename(out / name)
            self.record["finished"] = True
            self.save()
            for path in self.state.glob("start-*.safetensors"):
                path.unlink()
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
