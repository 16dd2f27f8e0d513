"""A tokenizer in the manner of SentencePiece, as Llama 2 and Mistral have it."""

from __future__ import annotations

import json
from functools import cache

from tiny import TEXT, VOCABULARY
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>"]


@cache
def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """BPE over characters with bytes to fall back on; a space before the text, `<s>` before all."""
    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    learnt.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    merges = []
    characters = sorted({*learnt.normalizer.normalize_str(TEXT)} - {"\n"})
    words = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocabulary = {word: number for number, word in enumerate(words)}
    for left, right in json.loads(learnt.to_str())["model"]["merges"]:
        if len(vocabulary) < VOCABULARY + 40 and {left, right} <= vocabulary.keys():
            vocabulary.setdefault(left + right, len(vocabulary))
            merges.append((left, right))
    made = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = learnt.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
