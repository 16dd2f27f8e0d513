"""Between two steps: the guard looks, progress shows, evaluations and prompts fall due."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from fastprune.errors import NumericalError
from fastprune.progress import log as progress_log
from fastprune.progress import track
from fastprune.recover.guard import Guard
from fastprune.report import format

if TYPE_CHECKING:
    from fastprune.recover.trainer import FinetuneTrainer

log = logging.getLogger("fastprune")

TENTHS = 10  # progress lines of a stage
LARGEST_EXPONENT = 700.0  # beyond, exp is no number


class Watch(TrainerCallback):
    """The one callback of a FinetuneTrainer; it comes after the library's own."""

    def __init__(self, trainer: FinetuneTrainer) -> None:
        self.trainer = trainer
        self._bar: Iterator[int] | None = None
        self._asked_to_stop = False
        self._handlers: dict[int, Any] = {}
        self._save_later = False
        self._tenth = 0
        self._since: list[float] = []
        self._skipped = 0
        self._rate: float | None = None

    # ------------------------------------------------------------------------ begin and end

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, config = self.trainer, self.trainer.config
        trainer.guard = Guard(
            trainer.model,
            trainer.adamw,
            trainer.lr_scheduler,
            patience=config.guard_steps,
            rollbacks=config.guard_rollbacks,
            delay=int(args.device.type != "cpu"),
            state=trainer.guard_state,
        )
        trainer.guard.keep(state.global_step)
        self._skipped = trainer.guard_state.skipped
        self._tenth = TENTHS * state.global_step // max(1, state.max_steps)
        steps = range(state.global_step, state.max_steps)
        self._bar = track(steps, trainer.stage.name, state.max_steps, state.global_step)
        next(self._bar, None)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._ask_to_stop)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the signals back and take the bar away; also after an error."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self._bar is not None:
            self._bar.close()  # type: ignore[attr-defined]
            self._bar = None

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop:
            raise KeyboardInterrupt
        self._asked_to_stop = True
        log.warning("stopping after this step; the state will be saved (again: at once)")

    # ------------------------------------------------------------------------ a step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        guard = trainer.guard
        assert guard is not None  # on_train_begin has made it
        try:
            returned = guard.look(step)
        except NumericalError as error:
            raise trainer.give_up(error) from None
        calm = not returned and guard.state.in_a_row == 0 and trainer.monitor.sound()
        every = trainer.config.guard_snapshot_steps
        if calm and every and step % every == 0 and not control.should_save:
            guard.keep(step)
        last = step >= state.max_steps
        if not calm and control.should_save and not last:
            control.should_save, self._save_later = False, True
        elif calm and self._save_later:
            control.should_save, self._save_later = True, False
        stage = trainer.stage
        if stage.eval_steps is not None and step % stage.eval_steps == 0 and self._measurable():
            control.should_evaluate = True
        if stage.generate_steps is not None and step % stage.generate_steps == 0:
            trainer.on_sample(step)
        if self._bar is not None:
            next(self._bar, None)
        if self._stop_agreed(args, step):
            trainer.interrupted = True
            control.should_save = control.should_training_stop = True

    def _measurable(self) -> bool:
        return self.trainer.eval_dataset is not None or self.trainer.windows is not None

    def _stop_agreed(self, args: Any, step: int) -> bool:
        """Whether to stop now. Several processes ask each other, to stop at the same step."""
        if args.world_size == 1:
            return self._asked_to_stop
        if step % self.trainer.config.guard_steps:
            return False
        asked = torch.tensor(int(self._asked_to_stop), device=args.device)
        return bool(self.trainer.accelerator.reduce(asked, "sum") > 0)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        guard = self.trainer.guard
        if guard is not None and guard.state.in_a_row == 0 and self.trainer.monitor.sound():
            guard.keep(state.global_step)  # what a resumed run begins with, too

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A line for people: what the epoch came to, as far as it is measured."""
        trainer, step = self.trainer, state.global_step
        if trainer.interrupted:
            return
        sums = trainer.epoch_sums.clone()
        if args.world_size > 1:
            sums = trainer.accelerator.reduce(sums, "mean")
        trainer.epoch_sums.zero_()
        total, steps = sums.tolist()
        parts = [f"mean loss {total / steps:.4f}" if steps else "no finite loss"]
        measured = trainer.evaluated if trainer.evaluated.get("step") == step else {}
        if trainer.eval_dataset is not None:
            loss = measured.get("eval_loss")
            loss = self._validation_loss() if loss is None else loss
            perplexity = math.exp(loss) if loss < LARGEST_EXPONENT else math.inf
            parts.append(f"validation loss {loss:.4f} (perplexity {format.perplexity(perplexity)})")
        elif "eval_perplexity" in measured:
            parts.append(f"perplexity {format.perplexity(measured['eval_perplexity'])}")
        if trainer.bleu is not None:
            of = "" if trainer.bleu["step"] == step else f" at step {trainer.bleu['step']}"
            parts.append(f"BLEU-4 {format.bleu(trainer.bleu['bleu'])}{of}")
        if self._rate is not None:
            parts.append(f"lr {self._rate:.3g}")
        epoch = state.epoch or 0.0
        whole = round(epoch, 6).is_integer()
        where = f"epoch {epoch:.0f} ends" if whole else f"it ends at epoch {epoch:.2g}"
        progress_log.info("%s: %s, step %d: %s", trainer.stage.name, where, step, ", ".join(parts))

    def _validation_loss(self) -> float:
        """The validation loss; the random state, which a checkpoint may hold, stays as it was."""
        device = self.trainer.args.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return self.trainer.validation_loss()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A line for people each tenth of the way, with the mean loss since the last one."""
        if not logs or "learning_rate" not in logs:
            return
        self._rate = logs["learning_rate"]
        loss = logs["loss"]
        if loss == loss:
            self._since.append(loss)
        tenth = TENTHS * state.global_step // max(1, state.max_steps)
        if tenth == self._tenth:
            return
        guard = self.trainer.guard_state
        skipped = guard.skipped - self._skipped
        progress_log.log(
            logging.INFO if self._since else logging.WARNING,
            "%s: %d %%, step %d of %d, %s%s, lr %.3g",
            self.trainer.stage.name,
            round(100 * state.global_step / max(1, state.max_steps)),
            state.global_step,
            state.max_steps,
            f"mean loss {sum(self._since) / len(self._since):.4f}"
            if self._since
            else "no finite loss since the last line",
            f", {skipped} skipped for a non-finite loss or gradient" if skipped else "",
            logs["learning_rate"],
        )
        self._tenth, self._skipped, self._since = tenth, guard.skipped, []
