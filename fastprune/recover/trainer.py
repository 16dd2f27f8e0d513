"""transformers' Trainer with our optimizer, loss, guard, monitor and checkpoints inside.

The loop, gradient accumulation, schedules' stepping, data order, DDP, loggers, and the
saving and restoring of random states are the library's. Ours are: what a step does about non-finite
numbers, how a checkpoint gets onto the disk whole, and what is said and logged.

A sharded model (FSDP2) is trained as it is given. Its checkpoints hold whole tensors, which all
processes gather and the first one writes: they continue on any number of processes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from fastprune.errors import InputError, NumericalError
from fastprune.inspect.perplexity import evaluate
from fastprune.kernels.optim import AdamW
from fastprune.models.script_optimizer import Moments
from fastprune.progress import log as progress_log
from fastprune.recover.callbacks import Watch
from fastprune.recover.checkpoints import OPTIMIZER, OWN_STATE, SCHEDULE, WEIGHTS, checkpoints
from fastprune.recover.collate import Counted
from fastprune.recover.config import FinetuneConfig
from fastprune.recover.freeze import make_schedule, pace, parameter_groups, rates_of, reschedule
from fastprune.recover.guard import LOSS_LIMIT, Guard, GuardState, poison
from fastprune.recover.held_out import bleu_of
from fastprune.recover.loggers import as_input_error, end_run, keep_events, perplexity_key
from fastprune.recover.moments import take_over
from fastprune.recover.monitor import ADVICE, Monitor
from fastprune.recover.objective import Objective, loss_inside
from fastprune.recover.recipes import Stage
from fastprune.report.run import write_json
from fastprune.sharding import collected, is_sharded, local, shard_of

BEST = "best.safetensors"

log = logging.getLogger("fastprune")

GradientHook = Callable[[int, nn.Module], None]
"""(optimizer step, model) -> None, called when the gradients of a step are complete."""


class FinetuneTrainer(Trainer):
    """One stage of a recovery.

    Args:
        objective: the loss, and with it the model.
        stage, config: settings; the model's parts that do not learn are frozen already.
        args: made by `training_arguments`.
        train, validation: map-style data sets of {"input_ids", "labels"}.
        collate: samples to a batch; see `Counted`.
        tokenizer: to read answers with, where BLEU is measured.
        windows: (n, s) token ids whose perplexity stands in where there is no validation set.
        on_line: called with every line of the training log.
        on_sample: called with the step when prompts are due.
        gradient_hook: to look at or tamper with gradients, for tests and experiments.
        moments: of AdamW, to begin with, by the name of a parameter.
    """

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        objective: Objective,
        stage: Stage,
        config: FinetuneConfig,
        args: TrainingArguments,
        *,
        train: Any,
        collate: Callable[..., Any],
        tokenizer: Any = None,
        validation: Any = None,
        windows: Tensor | None = None,
        on_line: Callable[[dict[str, Any]], None] = lambda line: None,
        on_sample: Callable[[int], None] = lambda step: None,
        gradient_hook: GradientHook | None = None,
        moments: Moments | None = None,
    ) -> None:
        self.objective, self.stage, self.config = objective, stage, config
        self.monitor, self.guard_state = Monitor(), GuardState()
        self.guard: Guard | None = None
        self.windows, self.on_line, self.on_sample = windows, on_line, on_sample
        self.gradient_hook, self.tokenizer, self.moments = gradient_hook, tokenizer, moments
        self.tokens = self.masked_batches = 0
        self.seconds = 0.0
        """spent before this process took over"""
        self.stopped: str | None = None
        """why the stage ended early; None while it runs and when it went to its end"""
        self.interrupted = False
        self.bleu: dict[str, Any] | None = None
        """the last one measured, with the step it is of"""
        self._rescheduled = False  # whether it continues at other rates, or to another last step
        self._gave_up: str | None = None  # the guard's last words
        self._writing: str | None = None
        self._saved_step = self._evaluated_step = -1
        self.evaluated: dict[str, Any] = {}
        """the last evaluation, as the log has it"""
        self._start = time.perf_counter()
        keeps_cache = getattr(objective.model.config, "use_cache", None)
        super().__init__(
            model=objective.model,
            args=args,
            data_collator=Counted(collate, aligned=objective.seq2seq),
            train_dataset=train,
            eval_dataset=validation if validation is not None and len(validation) else None,
        )
        if self.is_fsdp_enabled:
            raise InputError(
                "accelerate is set up to shard the model itself, which saves and measures it in "
                "parts only: leave its FSDP settings out and give --shard"
            )
        if is_sharded(self.model):
            self.model._is_accelerate_prepared = True  # it would put DDP around it
        objective.model.config.use_cache = keeps_cache  # it is saved; our calls say what they want
        self.remove_callback(PrinterCallback)
        keep_events(self.callback_handler.callbacks, Path(args.output_dir))
        self._watch = Watch(self)
        self.add_callback(self._watch)
        self._step_loss = torch.zeros((), device=args.device)
        self._window = torch.zeros(2, device=args.device)  # summed loss, steps summed over
        self.epoch_sums = torch.zeros_like(self._window)  # the same since the epoch began

    # ------------------------------------------------------------------------ running

    def run(self, checkpoint: Path | None = None) -> None:
        """Train to the end, or to an interrupt (`interrupted` says which); the state is saved.

        `checkpoint` is a folder to continue from. Raises NumericalError when the guard gives up.
        """
        if checkpoint is not None:
            self._read_own_state(checkpoint)
        self._start = time.perf_counter()
        with loss_inside(self.objective):
            try:
                # At its last step the library would do one more.
                if self.stopped is None and self.state.global_step < self.args.max_steps:
                    self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                elif checkpoint is not None:  # it had ended when its process was killed
                    self._load_from_checkpoint(str(checkpoint))
            except Exception as error:
                if told := as_input_error(self.config.log_to, error):
                    raise told from error
                raise
            finally:
                self._watch.close()
        self.model.zero_grad(set_to_none=True)

    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds + time.perf_counter() - self._start

    def stop(self, reason: str) -> None:
        """End the stage after this step."""
        self.stopped = reason
        self.control.should_training_stop = True
        name, step = self.stage.name, self.state.global_step
        progress_log.info("%s: stopped at step %d: %s", name, step, reason)

    # ------------------------------------------------------------------------ a step

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """fastprune.AdamW, clipping inside; the loss scale where fp16 takes part."""
        if self.optimizer is None:
            learning = model or self.model
            groups = parameter_groups(learning, self.stage)
            half = any(p.dtype == torch.float16 for g in groups for _, p in g["params"])
            scaled = half or self.objective.dtype == torch.float16
            self.optimizer = AdamW(
                groups,
                max_grad_norm=self.stage.max_grad_norm,
                master=self.config.optimizer_master,
                loss_scale="dynamic" if scaled else None,
                seed=self.config.seed,
            )
            if self.moments:
                take_over(self.optimizer, self.moments)
                self.moments = None  # they take memory
        return self.optimizer

    @property
    def adamw(self) -> AdamW:
        """Our optimizer, without what accelerate wraps around it."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(inner, AdamW)
        return inner

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the stage."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(
                self.stage, optimizer or self.optimizer, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, and the scored tokens in all of them on all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        items: Any = sum(batch.pop("items") for batch in batches)
        self.tokens += sum(batch.pop("tokens") for batch in batches)
        if batches and not items:
            self.masked_batches += 1
            if self.masked_batches == 1:
                log.warning(
                    "a batch has no token to learn from (all labels are masked) and is skipped; "
                    "is --seq-len too short for the prompts?"
                )
        if self.args.world_size > 1:
            count = torch.tensor(items, device=device, dtype=torch.int64)
            items = self.accelerator.reduce(count, "sum").clamp(min=1)
        return batches, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; its share of the step's mean loss."""
        if isinstance(num_items_in_batch, int) and num_items_in_batch == 0:
            return self._step_loss.new_zeros(())  # no gradients: the optimizer changes nothing
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), False, num_items_in_batch)
        self.accelerator.backward(self.adamw.scale(poison(loss)))
        self._step_loss += loss.detach()
        return self._step_loss.new_zeros(())  # our own sums are logged, see log()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a micro-batch over the tokens of the whole step."""
        loss = model(**inputs, items=num_items_in_batch)["loss"]
        # DDP takes the mean over processes, but `items` counts the tokens of all
        loss = loss * self.args.world_size
        return (loss, None) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Called when the gradients of a step are complete. The norm itself is the optimizer's."""
        if self.gradient_hook is not None:
            self.gradient_hook(self.state.global_step, model)
        sound = self._step_loss <= LOSS_LIMIT  # false for NaN
        zero = torch.zeros_like(self._step_loss)
        seen = torch.stack([torch.where(sound, self._step_loss, zero), sound.float()])
        self._window += seen
        self.epoch_sums += seen
        self._step_loss = zero

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Complete a line of the log, show it to the monitor, and pass it on."""
        if "loss" in logs:
            if self.args.world_size > 1:
                self._window = self.accelerator.reduce(self._window, "mean")
            total, steps = self._window.tolist()
            self._window.zero_()
            loss = total / steps if steps else None
            logs["loss"] = float("nan") if loss is None else loss
            logs["grad_norm"] = float(self.adamw.grad_norm)
            step = self.state.global_step
            self.on_line(
                {
                    "step": step,
                    "loss": loss,
                    "lr": logs["learning_rate"],
                    "grad_norm": logs["grad_norm"],
                    "skipped": int(self.adamw.skipped_steps),
                    "seconds": round(self.elapsed(), 3),
                    "tokens": self.tokens,
                }
            )
            self._say(self.monitor.train(step, loss))
            smooth = self.monitor.smooth
            limit = self.stage.stop_loss
            if limit is not None and smooth is not None and smooth < limit:
                self.stop(f"the mean loss is below {limit:g}")
        super().log(logs, start_time)

    def _say(self, finding: str | None) -> None:
        if finding is not None:
            log.warning("%s, step %d: %s", finding, self.state.global_step, ADVICE[finding])

    # ------------------------------------------------------------------------ evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validation loss, or perplexity of the windows; the best weights go to the disk."""
        step = self.state.global_step
        self._evaluated_step = step
        line: dict[str, Any] = {"step": step}
        if self.eval_dataset is not None:
            line["eval_loss"] = self.validation_loss()
        if self.windows is not None:
            line["eval_perplexity"] = evaluate(self.model, self.windows).perplexity
        name = "eval_loss" if self.eval_dataset is not None else "eval_perplexity"
        figure = line[name]  # Watch asks only where there is something to measure
        if (bleu := self._measure_bleu()) is not None:
            line["eval_bleu"] = bleu
        by_bleu = bleu is not None and self.stage.best_by == "bleu"
        best_by = -bleu if by_bleu and bleu is not None else figure
        finding = self.monitor.validation(step, best_by, figure)
        if self.monitor.best_step == step:
            self._write_learning(Path(self.args.output_dir) / BEST, {"step": str(step)})
        self.evaluated = line
        self.on_line(line)
        progress_log.info("%s: %s", self.stage.name, self.monitor.evaluation(step, line))
        self._say(finding)
        metrics = {key: value for key, value in line.items() if key != "step"}
        if self.windows is not None:
            metrics[perplexity_key(self.config.eval)] = line["eval_perplexity"]
        super().log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        patience = self.stage.early_stop
        if patience is not None and self.monitor.since_best >= patience:
            self.stop(f"no improvement in {patience} evaluations")
        return metrics

    def validation_loss(self) -> float:
        """Mean negative log-likelihood of the scored tokens of the validation set."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self.get_eval_dataloader():
            batch.pop("items"), batch.pop("tokens")
            total, count = self.objective.plain(batch)
            sums[0] += total
            sums[1] += count
        self.model.train()
        sums = self.accelerator.reduce(sums, "sum")
        return float(sums[0] / sums[1].clamp(min=1))

    def _measure_bleu(self) -> float | None:
        """BLEU-4 on the first validation prompts, where asked for; alike in all processes."""
        if not self.stage.bleu_samples or self.eval_dataset is None:
            return None
        measured = bleu_of(
            self.objective.model,
            self.tokenizer,
            self.eval_dataset,
            samples=self.stage.bleu_samples,
            batch_size=self.stage.batch_size,
        )
        self.bleu = {"step": self.state.global_step, **measured.to_dict()}
        return measured.bleu

    def load_best(self) -> int:
        """Put the best evaluated weights back; the step they are of."""
        self._put(load_file(Path(self.args.output_dir) / BEST, device="cpu"))
        return self.monitor.best_step

    # ------------------------------------------------------------------------ checkpoints

    def _learning(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        """Give what learns the whole tensors `weights`."""
        for name, parameter in self._learning().items():
            local(parameter).copy_(shard_of(weights[name], parameter))

    def _write_learning(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write what learns to `path`, whole or not at all. All processes must call it."""
        tensors = collected(self._learning(), keep=self.args.should_save)
        if self.args.should_save:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}")
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, beside, metadata=metadata)
            os.replace(beside, path)

    def _get_output_dir(self, trial: Any) -> str:
        return self._writing or self.args.output_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint aside, rename it when it is complete, and drop the oldest."""
        folder = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        work = folder / "writing"
        if self.args.should_save:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._writing = str(work)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing = None
        if self.args.should_save:
            write_json(work / name / OWN_STATE, self._own_state())
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            old = [folder / name] if (folder / name).exists() else []
            for path in old:
                path.rename(work / "old")
            (work / name).rename(folder / name)
            for number, path in enumerate(checkpoints(folder)[: -self.stage.keep_last]):
                path.rename(work / f"old-{number}")
            shutil.rmtree(work, ignore_errors=True)
        self._saved_step = self.state.global_step

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights that learn; the others are where they came from."""
        self._write_learning(Path(output_dir or self.args.output_dir) / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = collected(self.adamw.state_dict(), keep=self.args.should_save)
        if self.args.should_save:
            torch.save(optimizer, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:  # mapped, for it is whole: a process may need a part of it only
            read = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
            rates = rates_of(self.adamw)
            self.adamw.load_state_dict(read(Path(checkpoint) / OPTIMIZER))
            begun = read(Path(checkpoint) / SCHEDULE)
            if self._rescheduled:
                reschedule(self.lr_scheduler, self.adamw, rates, begun)
            else:
                self.lr_scheduler.load_state_dict(begun)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS, device="cpu")
        expected = set(self._learning())
        if set(weights) != expected:
            raise InputError(
                f"{resume_from_checkpoint}: it holds {len(weights)} weights, this run learns "
                f"{len(expected)} others; was it begun from another model or method?"
            )
        self._put(weights)

    def _own_state(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "step": self.state.global_step,
            "monitor": self.monitor.to_dict(),
            "guard": asdict(self.guard_state),
            "gave_up": self._gave_up,
            "tokens": self.tokens,
            "masked_batches": self.masked_batches,
            "seconds": self.elapsed(),
            "stopped": self.stopped,
            "evaluated_step": self._evaluated_step,
            "bleu": self.bleu,
            "pace": pace(self.stage, self.args.max_steps),
        }

    def _read_own_state(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / OWN_STATE).read_text(encoding="utf-8"))
        self.monitor = Monitor(**state["monitor"])
        self.guard_state = GuardState(**state["guard"])
        if state.get("gave_up"):  # who goes on from there wants it to be tried again
            self.guard_state.rollbacks = self.guard_state.in_a_row = 0
        now = pace(self.stage, self.args.max_steps)
        self._rescheduled = state.get("pace", now) != now
        if self._rescheduled:
            self.guard_state.rate_factor = 1.0  # the rates are those asked for now
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.masked_batches, self.bleu = state["masked_batches"], state["bleu"]
        self.stopped, self._evaluated_step = state["stopped"], state["evaluated_step"]
        self.state.global_step = self._saved_step = state["step"]

    def finish(self) -> None:
        """After the last step: an evaluation and a checkpoint of it, where they are missing."""
        step = self.state.global_step
        if self.stage.eval_steps is not None and self._evaluated_step != step:
            self.evaluate()
        if self._saved_step != step:
            self._save_checkpoint(self.model)
        end_run(self.config.log_to)

    def give_up(self, error: NumericalError) -> NumericalError:
        """Save the good state that the guard has brought back; the error that says where."""
        self._gave_up = str(error)
        self._save_checkpoint(self.model)
        return NumericalError(f"{error}; the last good state is that of step {self._saved_step}")
