"""What a stage leaves to go on from: its checkpoints, and the best weights it came to.

    checkpoint-STEP/
      weights.safetensors   what learns: the other weights are where they came from
      optimizer.pt          moments and the like, whole tensors
      scheduler.pt          the learning rate's place in its schedule
      rng_state.pth         random states, one file a process where there are several
      fastprune.json        step, figures, what the guard and the monitor have seen
      sealed.json           sizes and digests of these
    best.safetensors        weights of the best evaluation

Tensors of a sharded model (FSDP2) are whole in it: all processes gather them and the first one
writes, so that a run goes on with any number of processes.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastprune.distributed import ALONE, Processes
from fastprune.errors import InputError
from fastprune.files import SEAL, is_sealed, seal, sync
from fastprune.kernels.optim import AdamW
from fastprune.models.checks import check_values
from fastprune.output import sync_folder
from fastprune.readers import read_json
from fastprune.recover.freeze import rates_of, reschedule
from fastprune.recover.state import State
from fastprune.report.run import write_json
from fastprune.sharding import collected, local, shard_of
from fastprune.space import disk_errors

WEIGHTS, OWN_STATE = "weights.safetensors", "fastprune.json"
OPTIMIZER, SCHEDULE = "optimizer.pt", "scheduler.pt"
BEST, WRITING = "best.safetensors", "writing"
NAME = re.compile(r"checkpoint-\d{1,18}")


def own_state(checkpoint: Path) -> dict[str, Any]:
    """The figures in `checkpoint`."""
    return read_json(checkpoint / OWN_STATE)


def is_named(checkpoint: Path) -> bool:
    """Whether `checkpoint` has the name of one, which says after how many steps it was written."""
    return NAME.fullmatch(checkpoint.name) is not None


def step_of(checkpoint: Path | None) -> int:
    """The optimizer steps done where `checkpoint` was written; 0 without one."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def last_words(checkpoint: Path) -> str | None:
    """Why the guard gave up where it wrote `checkpoint`; None where it did not."""
    return own_state(checkpoint).get("gave_up")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of `checkpoint`; None where they are whole.

    All that they hold is compared with what was written; of a checkpoint without a seal, as earlier
    versions wrote them, only their form is looked at. The best weights belong to it where there
    were any.
    """
    try:
        if (checkpoint / SEAL).is_file():
            if not is_sealed(checkpoint):
                return "a file is missing, cut short, or holds something else than was written"
        else:
            _check_form(checkpoint)
        state, _ = State.resumed(own_state(checkpoint), {})
        best = checkpoint.parent / BEST
        if state.monitor.best is not None and not (best.is_file() and _is_readable(best)):
            return f"the best weights, {best}, are missing or damaged"
    except Exception as error:  # damaged bytes lead readers to any error
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def _check_form(checkpoint: Path) -> None:
    """Read the files of `checkpoint` as far as their form goes; raises what their readers do."""
    with safe_open(checkpoint / WEIGHTS, "pt"):
        pass
    for file in (OPTIMIZER, SCHEDULE):
        torch.load(checkpoint / file, map_location="cpu", weights_only=True, mmap=True)


def _is_readable(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to the file `path`, whole or not at all, and to the disk."""
    beside = path.with_name(f".{path.name}")
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, beside, metadata=metadata)
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if is_named(p) and (p / OWN_STATE).is_file()]
    return sorted(found, key=step_of)


class CheckpointFolder:
    """Writes and reads the checkpoints of one stage; all processes must call what it offers.

    Args:
        folder: where they lie; it holds nothing else.
        keep_last: how many stay.
        model, optimizer, schedule: what they are of.
        processes: those that train together; the first one writes.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        model: nn.Module,
        optimizer: AdamW,
        schedule: Any,
        processes: Processes = ALONE,
    ) -> None:
        self.folder, self.keep_last, self.processes = folder, keep_last, processes
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.device = next(model.parameters()).device

    def write(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint aside, rename it when it is on the disk, and drop the oldest.

        Raises InputError where the disk is full; what was written of it is removed.
        """
        first, work = self.processes.first, self.folder / WRITING
        made = work / f"checkpoint-{step}"
        if first:
            shutil.rmtree(work, ignore_errors=True)
        self.processes.wait()
        try:
            with disk_errors(self.folder):
                self._fill(made, state)
                self.processes.wait()
                if first:
                    self._put_in_place(made)
        finally:
            if first:
                shutil.rmtree(work, ignore_errors=True)

    def _fill(self, made: Path, state: Mapping[str, Any]) -> None:
        """Write the files of a checkpoint into the folder `made`."""
        first = self.processes.first
        made.mkdir(parents=True, exist_ok=True)  # processes may have folders of their own
        self._write_weights(made / WEIGHTS)
        optimizer = collected(self.optimizer.state_dict(), keep=first)
        if first:
            _save(optimizer, made / OPTIMIZER)
            _save(self.schedule.state_dict(), made / SCHEDULE)
            write_json(made / OWN_STATE, dict(state))
        _save(_random_state(self.device), made / self._random_file)

    def _put_in_place(self, made: Path) -> None:
        """Give the complete checkpoint `made` its name, and drop the oldest."""
        seal(made)
        sync_folder(made)
        place, work = self.folder / made.name, made.parent
        if place.exists():
            place.rename(work / "old")
        made.rename(place)
        sync(self.folder)
        self.drop_oldest()

    def drop_oldest(self) -> None:
        """Keep the last checkpoints alone. A process that was killed may have left more."""
        work = self.folder / WRITING
        for path in checkpoints(self.folder)[: -self.keep_last] if self.processes.first else ():
            work.mkdir(exist_ok=True)
            path.rename(work / f"old-{path.name}")  # half removed, it is none
            shutil.rmtree(work / f"old-{path.name}", ignore_errors=True)
        with suppress(OSError):  # it still holds what is being written, or is not there
            work.rmdir()

    def read(self, checkpoint: Path, *, rescheduled: bool) -> None:
        """Bring model, optimizer and schedule to where they were in `checkpoint`.

        `rescheduled`: the learning rates stay those of now. Raises InputError when the checkpoint
        is of other weights.
        """
        weights = load_file(checkpoint / WEIGHTS, device="cpu")
        expected = set(self._learning())
        if set(weights) != expected:
            raise InputError(
                f"{checkpoint}: holds {len(weights)} weights, and this run learns {len(expected)} "
                "others; resume with the model and the --method of that run"
            )
        check_values(weights, checkpoint)
        self._put(weights)
        # Mapped, for it is whole: a process may need a part of it only.
        read = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
        rates = rates_of(self.optimizer)
        self.optimizer.load_state_dict(read(checkpoint / OPTIMIZER))
        begun = read(checkpoint / SCHEDULE)
        if rescheduled:
            reschedule(self.schedule, self.optimizer, rates, begun)
        else:
            self.schedule.load_state_dict(begun)

    def restore_random_state(self, checkpoint: Path) -> None:
        """Draw on as when `checkpoint` was written, by as many processes as there are now."""
        from accelerate.utils import load  # torch's reader of weights, with numpy's arrays allowed

        file = checkpoint / self._random_file
        if not file.is_file():
            return
        state = load(file, map_location="cpu")
        random.setstate(state["python"])
        numpy.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            cuda = state["cuda"]  # of several processes earlier versions kept those of all GPUs
            own = cuda if isinstance(cuda, Tensor) else cuda[self.device.index]
            torch.cuda.set_rng_state(own, self.device)

    def write_best(self, step: int) -> None:
        """The weights as they are after `step` are the best so far."""
        with disk_errors(self.folder):
            self._write_weights(self.folder / BEST, {"step": str(step)})

    def read_best(self) -> None:
        """Put the best weights back."""
        self._put(load_file(self.folder / BEST, device="cpu"))

    @property
    def _random_file(self) -> str:
        several, rank = self.processes.several, self.processes.rank
        return f"rng_state_{rank}.pth" if several else "rng_state.pth"

    def _learning(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        """Give what learns the whole tensors `weights`."""
        for name, parameter in self._learning().items():
            local(parameter).copy_(shard_of(weights[name], parameter))

    def _write_weights(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write what learns to `path`, whole or not at all."""
        tensors = collected(self._learning(), keep=self.processes.first)
        if self.processes.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, tensors, metadata)


def _save(content: Any, path: Path) -> None:
    """As torch.save, but for the errors, which are the operating system's."""
    with path.open("wb") as file:
        torch.save(content, file)


def _random_state(device: torch.device) -> dict[str, Any]:
    """The random states that a process on `device` draws from."""
    state = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
