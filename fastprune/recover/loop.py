"""The training loop of one stage: batches, gradients, steps, and what falls due between two steps.

Data order and random draws follow from the seed and the step alone, and a checkpoint holds all that
the loop goes on from, so a run that was killed ends with the bits of one that was not.

Several processes average their gradients (DDP), or each holds a part of the weights (FSDP2), as the
model is given.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from fastprune.errors import NumericalError
from fastprune.messages import Message
from fastprune.models.script_optimizer import Moments
from fastprune.progress import log as progress_log
from fastprune.recover.batches import Batch, Counted, load_batches, own_batches, shuffled
from fastprune.recover.checkpoints import CheckpointFolder, own_state
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.evaluation import Evaluation, Samples
from fastprune.recover.freeze import make_optimizer, make_schedule, pace, rates_of, reschedule
from fastprune.recover.guard import LOSS_LIMIT, Guard, poison
from fastprune.recover.interrupt import Interrupt, Stopped
from fastprune.recover.loggers import Logger, open_logger, perplexity_key
from fastprune.recover.moments import take_over
from fastprune.recover.monitor import ADVICE, NAMES
from fastprune.recover.objective import Objective, synchronised, unsynchronised
from fastprune.recover.recipes import Stage
from fastprune.recover.reporter import Reporter
from fastprune.recover.state import State
from fastprune.recover.steps import StepCounts

LOG_LINES = 200  # of a stage, where --log-steps does not say

log = logging.getLogger("fastprune")

GradientHook = Callable[[int, nn.Module], None]
"""(optimizer step, model) -> None, called when the gradients of a step are complete."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls.

    ``line`` takes every line of the training log; ``sample`` the step when prompts are due;
    ``gradients`` step and model, to look at or tamper with them in tests and experiments; ``steps``
    the step and the seconds of training so far, and returns how many steps it is to be in all from
    now on, None where that does not change; ``save`` is called before a checkpoint is written.
    """

    line: Callable[[dict[str, Any]], None] = lambda line: None
    sample: Callable[[int], None] = lambda step: None
    gradients: GradientHook | None = None
    steps: Callable[[int, float], int | None] = lambda step, seconds: None
    save: Callable[[], None] = lambda: None


class Loop:
    """One stage of a recovery.

    Args:
        objective: the loss, and with it the model, whose parts that do not learn are frozen, and
            the processes that train it together.
        stage, config: settings.
        samples: what is learnt and measured.
        folder: for the checkpoints.
        hooks: what to call besides.
        moments: of AdamW, to begin with, by the name of a parameter.
    """

    def __init__(
        self,
        objective: Objective,
        stage: Stage,
        config: FinetuneConfig,
        samples: Samples,
        folder: Path,
        hooks: Hooks | None = None,
        moments: Moments | None = None,
    ) -> None:
        self.objective, self.stage, self.config = objective, stage, config
        self.samples, self.folder, self.hooks = samples, folder, hooks or Hooks()
        self.model, self.processes, self.state = objective.model, objective.processes, State()
        self.device = next(self.model.parameters()).device
        self.counts = StepCounts(stage, len(samples.train), self.processes)
        self.steps = self.counts.total
        self.pace = pace(stage, self.steps)
        self.log_steps = config.log_steps or math.ceil(self.steps / LOG_LINES)
        set_seed(config.seed)
        self.loss = synchronised(objective, self.device)
        master, seed = config.optimizer_master, config.seed
        self.optimizer = make_optimizer(objective, stage, master=master, seed=seed)
        if moments:
            take_over(self.optimizer, moments)
        self.schedule = make_schedule(stage, self.optimizer, self.steps)
        self.checkpoints = CheckpointFolder(
            folder, stage.keep_last, self.model, self.optimizer, self.schedule, self.processes
        )
        self.evaluation = Evaluation(objective, stage, samples)
        self.eval_steps = stage.eval_steps if self.evaluation.possible else None
        self.evaluated: dict[str, Any] = {}
        """the last evaluation, as the log has it"""
        self.interrupted = False
        self._interrupt = Interrupt()
        self._logger = Logger()
        self._checkpoint: Path | None = None  # whose random state is yet to be restored
        self._saved_step = -1
        self._save_later = False  # a checkpoint is due, but the state was not worth one
        self._start = time.perf_counter()
        self._step_loss = torch.zeros((), device=self.device)
        self._window = torch.zeros(2, device=self.device)  # summed loss, steps summed over
        self._epoch_sums = torch.zeros_like(self._window)  # the same since the epoch began

    # ------------------------------------------------------------------------ running

    def run(self, checkpoint: Path | None = None) -> None:
        """Train to the end, or to an interrupt (`interrupted` says which); the state is saved.

        `checkpoint` is a folder to continue from. Raises InputError when it is of other weights or
        the logger refuses, and NumericalError when the guard gives up.
        """
        if checkpoint is not None:
            self._resume(checkpoint)
        self._start = time.perf_counter()
        self.model.zero_grad()
        if self._over():  # it had ended when its process was killed
            return
        state = self.state
        if self.processes.first:
            self._logger = open_logger(self.config, self.stage, self.folder)
        self.guard = Guard(
            self.model,
            self.optimizer,
            self.schedule,
            patience=self.config.guard_steps,
            rollbacks=self.config.guard_rollbacks,
            delay=int(self.device.type != "cpu"),
            state=state.guard,
        )
        self.guard.keep(state.step)
        reporter = Reporter(self.stage.name, self.steps, state.step, state.guard.skipped)
        with closing(reporter) as self.reporter, self._interrupt:
            if state.unseen:
                self._look()
            while not self._over():
                self._epoch()

    def _over(self) -> bool:
        state = self.state
        return self.interrupted or state.stopped is not None or state.step >= self.steps

    def _epoch(self) -> None:
        """What is left of a pass over the data."""
        epoch, done = divmod(self.state.step, self.counts.per_epoch)
        taken = done * self.stage.grad_accum
        batches = self._batches(epoch, taken)
        per_epoch = self.counts.batches_per_epoch
        while taken < per_epoch and not self._over():
            chosen = list(islice(batches, self.stage.grad_accum))
            taken += len(chosen)
            self.passes = epoch + taken / per_epoch
            self._step(chosen)
            self._between_steps()
        if not self.interrupted:
            self._report_epoch()

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """The batches of `epoch` from number `first` on, with the random state as it was then.

        A state saved at the end of an epoch is one before the draw of the next one's loader.
        """
        train, stage = self.samples.train, self.stage
        if self._checkpoint and not first:
            self.checkpoints.restore_random_state(self._checkpoint)
        order = shuffled(len(train), self.config.seed + epoch)
        collate = Counted(self.samples.collate, aligned=self.objective.seq2seq)
        chosen = own_batches(order, stage.batch_size, self.processes)[first:]
        batches = load_batches(train, chosen, collate, self.device)
        if self._checkpoint and first:
            self.checkpoints.restore_random_state(self._checkpoint)
        self._checkpoint = None
        return batches

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.state.seconds + time.perf_counter() - self._start

    def stop(self, reason: str) -> None:
        """End the stage after this step."""
        self.state.stopped = reason
        progress_log.info(
            Message(
                "{stage}: stopped at step {step}: {reason}",
                stage=self.stage.name,
                step=self.state.step,
                reason=reason,
            )
        )

    # ------------------------------------------------------------------------ a step

    def _step(self, batches: list[Batch]) -> None:
        """One step of the optimizer over `batches`, the micro-batches of this process."""
        items = self._count(batches)
        for number, batch in enumerate(batches, 1):
            with nullcontext() if number == len(batches) else unsynchronised(self.loss):
                self._backward(batch, items)
        if self.hooks.gradients is not None:
            self.hooks.gradients(self.state.step, self.model)
        self._add_loss()
        self.optimizer.step()
        (self.rate, *_) = self.schedule.get_last_lr()
        self.schedule.step()
        self.model.zero_grad()
        self.state.step += 1

    def _count(self, batches: list[Batch]) -> int | Tensor:
        """The scored tokens in the micro-batches of a step on all processes."""
        state = self.state
        items = sum(batch.pop("items") for batch in batches)
        state.tokens += sum(batch.pop("tokens") for batch in batches)
        if not items:
            state.masked_batches += 1
            if state.masked_batches == 1:
                log.warning(
                    Message(
                        "a batch has no token to learn from (all labels are masked) and is "
                        "skipped; is --seq-len too short for the prompts?"
                    )
                )
        if not self.processes.several:
            return items
        scored = torch.tensor(items, device=self.device)
        self.processes.sum_(scored)
        return scored.clamp(min=1)

    def _backward(self, batch: Batch, items: int | Tensor) -> None:
        """Add the gradients of a micro-batch: its share of the mean loss over `items` tokens."""
        if isinstance(items, int) and not items:
            return  # no gradients: the optimizer changes nothing
        self.model.train()
        inputs = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        # DDP takes the mean over processes, but `items` counts the tokens of all.
        loss = self.loss(inputs, items) * self.processes.count
        self.optimizer.scale(poison(loss)).backward()
        self._step_loss += loss.detach()

    def _add_loss(self) -> None:
        """Add the loss of the step to the sums, where it is sound."""
        sound = self._step_loss <= LOSS_LIMIT  # false for NaN
        zero = torch.zeros_like(self._step_loss)
        seen = torch.stack([torch.where(sound, self._step_loss, zero), sound.float()])
        self._window += seen
        self._epoch_sums += seen
        self._step_loss = zero

    # ------------------------------------------------------------------------ between two steps

    def _between_steps(self) -> None:
        """The guard looks; lines, evaluations, prompts and checkpoints fall due."""
        stage, step = self.stage, self.state.step
        steps = self.hooks.steps(step, self.elapsed())
        if steps is not None:
            self._replan(steps)
        last = step >= self.steps
        save = last or step % stage.save_steps == 0
        try:
            returned = self.guard.look(step)
        except NumericalError as error:
            raise self._give_up(error) from None
        calm = not returned and self._sound()
        every = self.config.guard_snapshot_steps
        if calm and every and step % every == 0 and not save:
            self.guard.keep(step)
        if save and not calm and not last:
            save, self._save_later = False, True
        elif self._save_later and calm:
            save, self._save_later = True, False
        self.reporter.step()
        self.interrupted = self._stop_agreed()
        if step % self.log_steps == 0:
            self._log_step()
        self._look()
        if save or self.interrupted:
            self._save()
            if self._sound():
                self.guard.keep(step)  # what a resumed run begins with, too

    def _replan(self, steps: int) -> None:
        """Make it `steps` in all; the learning rate goes on from its place in their schedule."""
        begun = self.schedule.state_dict()
        self.steps, self.pace = steps, pace(self.stage, steps)
        self.schedule = make_schedule(self.stage, self.optimizer, steps)
        reschedule(self.schedule, self.optimizer, rates_of(self.optimizer), begun)
        self.guard.schedule = self.checkpoints.schedule = self.schedule
        self.reporter.plan(steps, self.state.step)

    def _look(self) -> None:
        """Continue the prompts and evaluate, where that is due after this step.

        An interrupt ends that at once; the run that goes on begins with it.
        """
        state, step = self.state, self.state.step
        samples, evaluates = self.stage.generate_steps, self.eval_steps
        state.unseen = True
        try:
            if samples is not None and step % samples == 0:
                with self._undisturbed():
                    self.hooks.sample(step)
            if evaluates is not None and step % evaluates == 0:
                self.evaluate()
        except Stopped:
            self.interrupted = True
        else:
            state.unseen = False

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Something is looked at in the block: torch's random state stays as it was, and an
        interrupt is heeded at once. Several processes end it together."""
        devices = [self.device] if self.device.type == "cuda" else []
        agreed = nullcontext() if self.processes.several else self._interrupt.at_once()
        with torch.random.fork_rng(devices), agreed:
            yield

    def _sound(self) -> bool:
        """Whether the state is worth coming back to."""
        return self.state.guard.in_a_row == 0 and self.state.monitor.sound()

    def _stop_agreed(self) -> bool:
        """Whether to stop now. Several processes ask each other, to stop at the same step."""
        if not self.processes.several:
            return self._interrupt.asked
        if self.state.step % self.config.guard_steps:
            return False
        return bool(self.processes.largest(int(self._interrupt.asked)))

    def _log_step(self) -> None:
        """A line of the log, of the steps since the last one; the monitor looks at it."""
        state, monitor = self.state, self.state.monitor
        loss = self._mean(self._window)
        norm = float(self.optimizer.grad_norm)
        self.hooks.line(
            {
                "step": state.step,
                "loss": loss,
                "lr": self.rate,
                "grad_norm": norm,
                "skipped": int(self.optimizer.skipped_steps),
                "seconds": round(self.elapsed(), 3),
                "tokens": state.tokens,
            }
        )
        self._say(monitor.train(state.step, loss))
        limit, smooth = self.stage.stop_loss, monitor.smooth
        if limit is not None and smooth is not None and smooth < limit:
            self.stop(Message("the mean loss is below {limit:g}", limit=limit))
        figures = {"loss": math.nan if loss is None else loss, "grad_norm": norm}
        figures |= {"learning_rate": self.rate, "epoch": self.passes}
        self._logger.log({f"train/{name}": x for name, x in figures.items()}, state.step)
        self.reporter.logged(state.step, loss, self.rate, state.guard.skipped)

    def _say(self, finding: str | None) -> None:
        if finding is not None:
            log.warning(
                Message(
                    "{finding}, step {step}: {advice}",
                    finding=NAMES[finding],
                    step=self.state.step,
                    advice=ADVICE[finding],
                )
            )

    def _report_epoch(self) -> None:
        """Say what the pass over the data came to. An interrupt ends that, with the state saved."""
        step = self.state.step
        measured = dict(self.evaluated) if self.evaluated.get("step") == step else {}
        if self.evaluation.validation is not None and "eval_loss" not in measured:
            try:
                with self._undisturbed():
                    measured["eval_loss"] = self.evaluation.validation_loss()
            except Stopped:
                self.interrupted = True
                if self._saved_step != step:
                    self._save()
                return
        measured["bleu"] = self.state.bleu
        self.reporter.epoch(self.passes, step, self._mean(self._epoch_sums), measured)

    def _mean(self, sums: Tensor) -> float | None:
        """The mean from (sum, count) of all processes, None where the count is 0; zeroes `sums`."""
        self.processes.sum_(sums)
        value, count = sums.tolist()
        sums.zero_()
        return value / count if count else None

    # ------------------------------------------------------------------------ evaluation

    def evaluate(self) -> dict[str, Any]:
        """Measure the model as it is now; the best weights go to the disk. A line of the log."""
        state, stage, step = self.state, self.stage, self.state.step
        with self._undisturbed():
            figures, bleu = self.evaluation.measure()
        state.evaluated_step = step
        if bleu is not None:
            state.bleu = {"step": step, **bleu}
        figure = figures["eval_loss" if "eval_loss" in figures else "eval_perplexity"]
        by_bleu = bleu is not None and stage.best_by == "bleu"
        best_by = -figures["eval_bleu"] if by_bleu else figure
        finding = state.monitor.validation(step, best_by, figure)
        if state.monitor.best_step == step:
            self.checkpoints.write_best(step)
        self.evaluated = {"step": step, **figures}
        self.hooks.line(self.evaluated)
        progress_log.info("%s: %s", stage.name, state.monitor.evaluation(step, self.evaluated))
        self._say(finding)
        logged = dict(figures)
        if "eval_perplexity" in figures:
            logged[perplexity_key(self.config.eval)] = figures["eval_perplexity"]
        self._logger.log({name.replace("_", "/", 1): x for name, x in logged.items()}, step)
        patience = stage.early_stop
        if patience is not None and state.monitor.since_best >= patience:
            self.stop(Message("no improvement in {patience} evaluations", patience=patience))
        return figures

    # ------------------------------------------------------------------------ the state

    def _save(self) -> None:
        state = self.state
        own = state.saved(self.pace, stage=self.stage.name, seconds=self.elapsed())
        self.hooks.save()
        self.checkpoints.write(state.step, own)
        self._saved_step = state.step

    def _resume(self, checkpoint: Path) -> None:
        self.state, rescheduled = State.resumed(own_state(checkpoint), self.pace)
        self.checkpoints.read(checkpoint, rescheduled=rescheduled)
        self._saved_step, self._checkpoint = self.state.step, checkpoint

    def finish(self) -> None:
        """After the last step an evaluation and a checkpoint of it, where they are missing.

        After an interrupt the state is saved already. The logged run ends.
        """
        step = self.state.step
        if not self.interrupted:
            if self.eval_steps is not None and self.state.evaluated_step != step:
                self.evaluate()
            if self._saved_step != step:
                self._save()
            self.checkpoints.drop_oldest()
        self._logger.close()

    def _give_up(self, error: NumericalError) -> NumericalError:
        """Save the good state that the guard has brought back; the error that says where."""
        self.state.gave_up = str(error)
        self._save()
        return NumericalError(f"{error}; the last good state is that of step {self._saved_step}")
