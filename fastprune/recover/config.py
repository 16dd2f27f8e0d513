"""The settings of the `finetune` command: flags, YAML keys and Python API at once.

A setting that a recipe may choose is left out (None, or empty) by default: what the user gives
applies to every stage, what is left out is the recipe's, and what neither says is in `Stage`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastprune.bounds import LENGTH, MINUTES, POSITIVE, RATE, SHARE, STEPS, Range, check_ranges
from fastprune.config import Group, Positional, TrustingConfig
from fastprune.data.builtin import EVALUATION_TEXT, TRAINING_TEXT
from fastprune.data.records import source_names
from fastprune.errors import InputError

DECAY = Range(0, 10, closed=(False, True))
Method = Literal["full", "lora"]
FROZEN = ("none", "most", "half", "ends", "attention", "mlp")
PROJECTS = ("wandb", "trackio")
"""Loggers that know projects."""
LAST = re.compile(r"last:([1-9]\d{0,8})")
"""What `--freeze` takes besides."""
Schedule = Literal["constant", "linear", "cosine", "one-cycle"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(kw_only=True)
class FinetuneConfig(TrustingConfig):
    """Recover the quality of a pruned model, or teach any model, by finetuning.

    For example:
        fastprune finetune small --out recovered --recipe recover --minutes 20
        fastprune finetune small --out taught --data answers.jsonl --recipe instruct
        fastprune finetune small --out recovered --teacher MODEL --max-steps 500
    """

    model: Positional[str] = ""
    """Hugging Face directory, hub id, .gguf file, or smollm2-135m"""
    data: str = TRAINING_TEXT
    """training text or instructions: a path, hf:NAME[:CONFIG[:SPLIT]], a short name, or a text in
    the package; several joined by commas"""
    out: Path | None = None
    """directory of the finetuned checkpoint (of the adapter with --method lora)"""
    overwrite: bool = False
    """replace what an earlier run left in --out; a run that was interrupted there is continued"""
    recipe: str = "plain"
    """plain, recover, ultra-low, staged, frozen, segmented, layer-lr, lora, instruct, sft-onecycle,
    distill, auto, or a recipe file; its settings replace the defaults below, and flags apply to all
    its stages"""

    method: Method | None = None
    """full trains the weights themselves (default), lora trains low-rank matrices added to them"""
    freeze: Annotated[str | None, Group.TRAINING] = None
    """what is not trained: most (all but the last 5 layers), last:N (all but the last N layers),
    half (the first half), ends (the outer quarters), attention, mlp; each freezes the embeddings
    and the head too (default: none)"""
    lr: Annotated[float | None, RATE] = None
    """learning rate (default: 2e-5)"""
    find_lr: Annotated[bool, Group.TRAINING] = False
    """choose the learning rate by a short range test on the model itself"""
    layer_lr_decay: Annotated[float | None, Group.TRAINING, DECAY] = None
    """each layer learns at this fraction of the rate of the one after it (default: 1)"""
    layer_lrs: Annotated[tuple[float, ...], Group.TRAINING, RATE] = ()
    """learning rates of equal parts of the depth, first layers first; instead of --lr"""
    schedule: Annotated[Schedule | None, Group.TRAINING] = None
    """how the learning rate changes after the warm-up (default: cosine)"""
    warmup_steps: Annotated[int | None, Group.TRAINING, Range(0, 10**9)] = None
    """steps until the learning rate is reached"""
    warmup_ratio: Annotated[float | None, Group.TRAINING, SHARE] = None
    """the same, as a share of all steps (default: 0.05)"""
    div_factor: Annotated[float | None, Group.TRAINING, Range(1)] = None
    """one-cycle starts at the learning rate divided by this (default: 25)"""
    weight_decay: Annotated[float | None, Group.TRAINING, Range(0)] = None
    """decoupled weight decay; never on norms and biases (default: 0)"""
    max_grad_norm: Annotated[float | None, Group.TRAINING, Range(0)] = None
    """clip the norm of the gradients to this; 0 for no clipping (default: 1)"""
    epochs: Annotated[float | None, Range(0, 10**6, closed=(False, True))] = None
    """passes over the data (default: 1)"""
    max_steps: Annotated[int | None, Group.TRAINING, STEPS] = None
    """stop after this many optimizer steps, whatever --epochs says"""
    minutes: Annotated[float | None, MINUTES] = None
    """train each stage for about this long; the number of steps is fixed before the first one, so
    that a continued run ends in the same way"""
    samples: Annotated[int | None, Group.DATA, STEPS] = None
    """use at most this many training samples (windows of text, or records)"""
    seq_len: Annotated[int | None, Group.DATA, LENGTH] = None
    """tokens of a training window, at most the model's maximum positions (default: 512, or that
    maximum)"""
    batch_size: Annotated[int | None, Group.TRAINING, Range(1, 2**16)] = None
    """samples per forward pass and device (default: 4)"""
    grad_accum: Annotated[int | None, Group.TRAINING, Range(1, 2**16)] = None
    """forward passes per optimizer step (default: 4)"""
    precision: Annotated[Precision | None, Group.TRAINING] = None
    """fp32: everything in fp32; half-precision weights are converted to fp32 and rounded when they
    are saved. bf16, fp16: matrix products in half precision, fp16 with a dynamic loss scale; fp32
    weights stay fp32, and half-precision weights are updated as --optimizer-master says. auto: bf16
    where the device multiplies bf16 much faster, else fp32 (default: auto)"""
    stop_loss: Annotated[float | None, Group.TRAINING, POSITIVE] = None
    """stop a stage when the mean training loss falls below this"""

    lora_r: Annotated[int | None, Group.LORA, Range(1, 2**14)] = None
    """rank of the LoRA matrices (default: 8)"""
    lora_alpha: Annotated[float | None, Group.LORA, POSITIVE] = None
    """LoRA scale, divided by the rank (default: 16)"""
    lora_dropout: Annotated[float | None, Group.LORA, Range(0, 1, closed=(True, False))] = None
    """dropout before the LoRA matrices (default: 0.05)"""
    lora_target_modules: Annotated[tuple[str, ...], Group.LORA] = ()
    """projections that get LoRA matrices (default: q, k, v, o, gate, up and down)"""

    teacher: Annotated[str | None, Group.TEACHER] = None
    """learn from this model's output (the dense model) besides the text"""
    distill_weight: Annotated[float | None, Group.TEACHER, SHARE] = None
    """weight of the loss against the teacher, 0 to 1; the loss on the text has the rest (default:
    0.5)"""
    distill_temperature: Annotated[float | None, Group.TEACHER, POSITIVE] = None
    """temperature that divides the logits of both models (default: 1)"""
    distill_hidden_weight: Annotated[float | None, Group.TEACHER, Range(0)] = None
    """weight of the distance between the hidden states of both models (default: 0, none)"""

    kind: Annotated[Literal["auto", "text", "instructions", "chat"], Group.DATA] = "auto"
    """what the data is; auto decides by its fields"""
    columns: Annotated[tuple[str, ...], Group.DATA] = ()
    """fields of the data whose names do not say what they hold: prompt=FIELD,answer=FIELD, and
    context=, system=, history= beside them; or messages=FIELD; or text=FIELD"""
    resize_embeddings: Annotated[bool, Group.DATA] = False
    """give the model's embedding (and head) a row for every token of the tokenizer, where it has
    too few; the new rows begin near the mean of the others"""
    val_size: Annotated[float | None, Group.DATA, Range(0, 10**9)] = None
    """samples held out for validation: a number, or a share below 1 (default: 0)"""
    val_data: Annotated[str | None, Group.DATA] = None
    """separate validation data, named as --data is; instead of --val-size"""
    test_data: Annotated[str | None, Group.DATA] = None
    """data to measure the finished model on, once, named as --data is"""
    eval: str = EVALUATION_TEXT
    """text whose perplexity is measured before, between the stages and after"""
    eval_seq_len: Annotated[int | None, Group.EVALUATION, LENGTH] = None
    """tokens of an evaluation window, at most the model's maximum positions (default: 1024, or that
    maximum)"""
    eval_windows: Annotated[int, Group.EVALUATION, Range(0, 10**6)] = 16
    """evaluation windows, from the start of the text; 0 measures nothing"""
    eval_steps: Annotated[int | None, Group.EVALUATION, STEPS] = None
    """measure the validation loss, or the perplexity where nothing is held out, every this many
    steps, and keep the best weights (default: only at the end of a stage)"""
    bleu_samples: Annotated[int | None, Group.EVALUATION, Range(0, 10**9)] = None
    """at every evaluation answer this many of the validation prompts, and report the BLEU-4 of the
    answers (default: 0)"""
    best_by: Annotated[Literal["loss", "bleu"] | None, Group.TRAINING] = None
    """which figure decides which evaluation is the best, whose weights are kept (default: loss)"""
    early_stop: Annotated[int | None, Group.TRAINING, STEPS] = None
    """stop a stage after this many evaluations without improvement"""
    gate_ppl_ratio: Annotated[float | None, Group.EVALUATION, POSITIVE] = None
    """exit 3 without writing a checkpoint when the perplexity becomes more than this many times
    what it was (default: 1)"""
    keep_worse: Annotated[bool, Group.EVALUATION] = False
    """write the result even if the perplexity rose, or the last stage was rolled back at its
    gate"""
    prompt: Annotated[str | None, Group.EVALUATION] = None
    """print how the model continues this prompt during training, in the template of the training
    data; a .txt file holds one prompt a line"""
    generate_steps: Annotated[int | None, Group.EVALUATION, STEPS] = None
    """continue --prompt every this many steps (default: only at the end)"""

    save_steps: Annotated[int | None, Group.LOGS, STEPS] = None
    """write a checkpoint to resume from every this many steps (default: 500)"""
    keep_last: Annotated[int | None, Group.LOGS, STEPS] = None
    """number of checkpoints to keep (default: 2)"""
    resume: Annotated[str, Group.LOGS] = "auto"
    """auto: continue what --out began, else start from MODEL (from random weights where it is only
    a config); never: start anew; or the checkpoint folder to continue from, with another --lr,
    --epochs or --max-steps if wanted"""
    log_steps: Annotated[int | None, Group.LOGS, STEPS] = None
    """steps per line of train_log.jsonl (default: at most 200 lines a stage)"""
    log_to: Annotated[Literal["none", "tensorboard", "wandb", "trackio"], Group.LOGS] = "none"
    """also send the log to this logger"""
    logger_project: Annotated[str | None, Group.LOGS] = None
    """the project of wandb or trackio that the run belongs to"""

    optimizer_master: Annotated[Literal["fp32", "stochastic", "none"], Group.TRAINING] = "fp32"
    """half-precision weights: an fp32 copy in the optimizer, stochastic rounding, or neither"""
    shard: Annotated[bool, Group.MACHINE] = False
    """under torchrun, spread weights, gradients and optimizer over the processes (FSDP) instead of
    a copy of all in each (DDP); with one process it changes nothing"""
    gradient_checkpointing: Annotated[bool, Group.MACHINE] = False
    """compute activations twice instead of keeping them: less memory, a third more time"""
    guard_steps: Annotated[int, Group.SAFETY, STEPS] = 5
    """after this many steps in a row with a non-finite loss or gradient, restore the last good
    state and halve the learning rate"""
    guard_rollbacks: Annotated[int, Group.SAFETY, Range(0, 10**9)] = 3
    """give up (exit 4) after restoring it this many times"""
    guard_snapshot_steps: Annotated[int, Group.SAFETY, Range(0, 10**9)] = 50
    """keep a copy of a good state every this many steps, in memory of the host (12 bytes for each
    parameter that learns, twice that until the next sound step); 0: only at the start and when
    saving"""
    read_back: Annotated[bool, Group.FILES] = True
    """load the result from its files and compare its logits before it counts as written"""

    def check(self) -> None:
        """InputError when a value is out of range; what a recipe may say too, `Stage` checks."""
        check_ranges(self)
        if self.gate_ppl_ratio is not None:
            if not self.eval_windows:
                raise InputError("--gate-ppl-ratio needs a perplexity: leave out --eval-windows 0")
            if self.keep_worse:
                raise InputError(
                    "--gate-ppl-ratio forbids what --keep-worse allows; give one of them"
                )
        if self.val_data is not None and self.val_size:
            raise InputError("--val-data is the validation set: leave out --val-size")
        if self.logger_project is not None and self.log_to not in PROJECTS:
            raise InputError(f"--logger-project needs --log-to {' or '.join(PROJECTS)}")

    def inputs(self) -> list[str | Path]:
        """What the command reads, as it was named; --out must lie apart from it.

        The checkpoint to resume from is not among them, for it may be the run's own.
        """
        data = [s for s in (self.data, self.val_data, self.test_data) if s is not None]
        texts = [name for spec in (*data, self.eval) for name in source_names(spec)]
        files = [name for name in (self.teacher, self.tokenizer) if name is not None]
        if self.prompt is not None and self.prompt.endswith(".txt"):
            files.append(self.prompt)
        if Path(self.recipe).expanduser().is_file():
            files.append(self.recipe)
        return [self.model, *texts, *files]
