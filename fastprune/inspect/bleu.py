"""BLEU-4 of a model's answers: how much of the references' wording they share.

Corpus-level BLEU by sacrebleu (Post, arXiv 1804.08771), whose signature is kept with the figure.
Chinese is split into characters, anything else into words.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.errors import InputError
from fastprune.inspect.forward import finite_logits
from fastprune.inspect.generate import pad_token
from fastprune.kernels.reference import IGNORED
from fastprune.models.gpt2 import learned_positions
from fastprune.models.quiet import quiet_libraries
from fastprune.models.seq2seq import is_seq2seq
from fastprune.progress import track

HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
CHINESE_SHARE = 0.1
"""Share of Han characters from which a text counts as Chinese; what is Latin in it stays words."""
BATCH = 16


@dataclass(frozen=True)
class Bleu:
    """A corpus BLEU-4 and everything that must be said with it."""

    bleu: float
    """0 to 1"""
    precisions: tuple[float, ...]
    """of 1- to 4-grams, 0 to 1"""
    brevity_penalty: float
    tokenizer: str
    """sacrebleu's: zh, or 13a"""
    pairs: int
    signature: str
    """sacrebleu's own account of how it measured"""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them."""
        return asdict(self) | {"precisions": list(self.precisions)}


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt, beside what it should have said."""

    prompt: str
    reference: str
    answer: str


def check_installed() -> None:
    """InputError, saying what to install, where sacrebleu is missing."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise InputError("BLEU needs the package sacrebleu: pip install 'fastprune[train]'")


def bleu(answers: Sequence[str], references: Sequence[str]) -> Bleu:
    """Corpus BLEU-4 of `answers` against one reference each. Raises InputError for none at all."""
    check_installed()
    from sacrebleu.metrics import BLEU

    if not references:
        raise InputError("BLEU needs at least one answer and its reference")
    name = "zh" if _is_chinese(references) else "13a"
    metric = BLEU(tokenize=name, force=True)  # force: texts that look tokenised are no error here
    score = metric.corpus_score(list(answers), [list(references)])
    return Bleu(
        bleu=score.score / 100,
        precisions=tuple(precision / 100 for precision in score.precisions),
        brevity_penalty=score.bp,
        tokenizer=name,
        pairs=len(references),
        signature=str(metric.get_signature()),
    )


def measure_bleu(
    model: nn.Module,
    tokenizer: Any,
    examples: Iterable[Mapping[str, Tensor]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = BATCH,
) -> tuple[Bleu, list[Answer]]:
    """BLEU-4 of the greedy answers of `model` to `examples`, and the answers.

    An example is one of a training set: `input_ids` (s,) and `labels` (s,), -100 on the prompt;
    for an encoder-decoder model prompt and response. Of a conversation the first answer counts.
    Examples without a prompt or a response are left out; InputError when none is left.
    """
    seq2seq = is_seq2seq(model)
    pairs = [pair for example in examples if all(pair := _split(example, seq2seq=seq2seq))]
    if not pairs:
        raise InputError("BLEU needs prompts with responses; this data has none")
    said = answer(
        model,
        tokenizer,
        [prompt for prompt, _ in pairs],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    answers = [
        Answer(_text(tokenizer, prompt), _text(tokenizer, reference), text)
        for (prompt, reference), text in zip(pairs, said, strict=True)
    ]
    return bleu([a.answer for a in answers], [a.reference for a in answers]), answers


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = BATCH,
) -> list[str]:
    """The greedy continuations of the token ids `prompts`, in their order.

    Prompts of like length share a batch. Where a model has learnt only so many positions, the
    beginning of a prompt that leaves no room for an answer is dropped.
    """
    device = next(model.parameters()).device
    seq2seq = is_seq2seq(model)
    positions = learned_positions(model)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions // 2)
        prompts = [prompt[max_new_tokens - positions :] for prompt in prompts]
    pad = pad_token(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    said = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for batch in track(batches, "answering"):
            ids, mask = _padded([prompts[i] for i in batch], pad, left=not seq2seq)
            with quiet_libraries(), finite_logits(model):
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    max_length=None,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=pad,
                )
            new = output[:, 1 if seq2seq else ids.shape[1] :].tolist()
            for index, tokens in zip(batch, new, strict=True):
                said[index] = _text(tokenizer, tokens)
    finally:
        model.train(training)
    return said


def _split(example: Mapping[str, Tensor], *, seq2seq: bool) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the response, empty where there is none."""
    ids, labels = torch.as_tensor(example["input_ids"]), torch.as_tensor(example["labels"])
    scored = labels != IGNORED
    if seq2seq:
        prompt, response = ids, labels[scored]
    else:
        first = int(scored.int().argmax())
        length = int(scored[first:].int().cumprod(0).sum())  # up to the next prompt, if any
        prompt, response = ids[:first], labels[first : first + length]
    return prompt.tolist(), response.tolist()


def _padded(prompts: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (n, longest); a decoder continues on the right, so pads left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        where = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, where] = torch.tensor(prompt, dtype=torch.long)
        mask[row, where] = 1
    return ids, mask


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def _is_chinese(texts: Iterable[str]) -> bool:
    text = "".join("".join(texts).split())
    return len(HAN.findall(text)) >= CHINESE_SHARE * len(text) > 0
