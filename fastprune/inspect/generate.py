"""Text out of a model: a continuation of a prompt, or a conversation."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from fastprune.bounds import Range
from fastprune.config import Group, Positional, TrustingConfig
from fastprune.data.encode import Encoder
from fastprune.data.instruct import end_of_turn, has_template
from fastprune.errors import InputError, NumericalError
from fastprune.inspect.forward import finite_logits
from fastprune.models.adapter import read_fingerprint
from fastprune.models.checks import reason
from fastprune.models.gpt2 import learned_positions
from fastprune.models.load import load_model, load_tokenizer
from fastprune.models.quantised import quantise
from fastprune.models.quiet import quiet_libraries
from fastprune.models.seq2seq import is_seq2seq, with_end
from fastprune.models.vocabulary import check_largest, embedding_rows
from fastprune.readers import read_text

log = logging.getLogger("fastprune")

GENERATION_CONFIG = "the model's generation_config.json"
COUNTED = ("num_beams", "num_beam_groups", "num_return_sequences")
"""Its settings that count something, each at most MOST: that many texts are computed at once."""
MOST = 1000
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Its settings that name a token, or several."""
EXIT, CLEAR = "/exit", "/clear"


@dataclass(frozen=True)
class Generation:
    """What a model answered, and how fast."""

    prompt: str
    text: str
    """the continuation alone"""
    new_tokens: int
    seconds: float
    tokens_per_second: float


@dataclass(kw_only=True)
class SamplingConfig(TrustingConfig):
    """What `generate` and `chat` have in common."""

    model: Positional[str]
    """Hugging Face directory, hub id, .gguf file, .pt of a GPT-2, or smollm2-135m"""
    max_new_tokens: Annotated[int, Range(1, 2**24)] = 128
    """stop after this many tokens"""
    temperature: Annotated[float, Range(0, 1000)] = 0.0
    """0 takes the most likely token each time; larger values sample more freely"""
    adapter: Path | None = None
    """folder with a LoRA adapter, put onto the model without being merged"""
    quantize: Annotated[Literal[8, 4] | None, Group.FILES] = None
    """hold the weights of the layers in 8 or 4 bits: less memory, somewhat worse answers; needs
    fastprune[quantize]"""


@dataclass(kw_only=True)
class GenerateConfig(SamplingConfig):
    """Continue a prompt.

    For example:
        fastprune generate small --prompt "The capital of France is"
        fastprune generate small --prompt "Name three fruits." --chat
        fastprune generate small --prompt prompts.txt --temperature 0.7
    """

    prompt: str
    """text to continue; a .txt file holds one prompt a line"""
    chat: bool = False
    """put the prompt into the model's chat template instead of continuing it as it is; a model
    without one gets the template of finetune"""


@dataclass(kw_only=True)
class ChatConfig(SamplingConfig):
    """Talk to a model. /clear forgets what was said, /exit or Ctrl-D ends.

    For example:
        fastprune chat small
        fastprune chat small --system "Answer in one sentence."
    """

    system: str | None = None
    """system message"""


def run_generate(config: GenerateConfig) -> Generation | dict[str, Any]:
    """Load the model and print its continuation of the prompt, or of every prompt in a file.

    For a file the result is a mapping with the `generations`. Raises InputError.
    """
    prompts = read_prompts(config.prompt)
    model, tokenizer = _load(config)
    kind = "chat" if config.chat else "text"
    if config.chat:
        stop_at_end_of_turn(model, tokenizer)
    encoder = Encoder(tokenizer, is_seq2seq(model))
    results = []
    for prompt in prompts:
        result = generate(
            model,
            tokenizer,
            encoder.prompt(prompt, kind),
            config.max_new_tokens,
            temperature=config.temperature,
            seed=config.seed,
        )
        if prompts != [config.prompt]:
            print(f"> {prompt}")
        print(result.text)
        if why := nothing_said(result, tokenizer, chat=config.chat):
            log.warning("%s", why)
        results.append(result)
    if prompts == [config.prompt]:
        return results[0]
    return {"generations": [asdict(result) for result in results]}


def nothing_said(result: Generation, tokenizer: Any, *, chat: bool) -> str | None:
    """Why the continuation is empty; None where it is not. `chat`: the chat template was used."""
    if result.text.strip():
        return None
    if result.new_tokens == 1:
        why = "nothing was generated: the first token was one that ends a text"
    else:
        why = f"no text was generated: {result.new_tokens} blank or special tokens"
    if chat:
        return f"{why}; ask otherwise, or look at the model with fastprune diagnose"
    hint = "give --chat, for the model has a chat template" if has_template(tokenizer) else ""
    return f"{why}; {hint or 'a model that was tuned on instructions wants --chat'}"


def read_prompts(value: str) -> list[str]:
    """`value` itself, or the lines of the `.txt` file it names. Raises InputError."""
    if not value.endswith(".txt") or len(value.splitlines()) != 1 or not os.path.isfile(value):
        return [value]
    file = Path(value)
    lines = read_text(file).splitlines()
    if not any(map(str.strip, lines)):
        raise InputError(f"{file}: no prompts in it; write one a line")
    return [line for line in lines if line.strip()]


def run_chat(config: ChatConfig) -> None:
    """Load the model and talk until the user ends it. Raises InputError."""
    model, tokenizer = _load(config)
    chat(
        model,
        tokenizer,
        config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        system=config.system,
    )


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: Any = None,
) -> Generation:
    """Continue `prompt` with up to `max_new_tokens` tokens, using a KV cache; a T5 answers it.

    A text is tokenised as the tokenizer does by itself; token ids are taken as they are. Greedy at
    temperature 0; else drawn by `seed`, which leaves torch's own random state alone. `streamer` is
    given every token as it comes (`transformers.TextStreamer`). Raises InputError for settings out
    of range and NumericalError when the model's output is not finite.
    """
    settings = _settings(max_new_tokens, temperature)
    _check_own_settings(model)
    device = next(model.parameters()).device
    ids = _prompt_ids(tokenizer, prompt, seq2seq=is_seq2seq(model))
    check_largest(model, tokenizer, int(ids.max()), "the prompt")
    ids = ids.to(device)
    start_length = 1 if is_seq2seq(model) else ids.shape[1]  # a decoder's start token
    max_new_tokens = min(max_new_tokens, _room(model, start_length))
    training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        cards = [device] if device.type == "cuda" else []
        with quiet_libraries(), finite_logits(model), torch.random.fork_rng(cards):
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                max_length=None,
                pad_token_id=pad_token(model, tokenizer),
                streamer=streamer,
                tokenizer=tokenizer,  # which looks for `stop_strings`
                **settings,
            )
    except (ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{GENERATION_CONFIG}: broken: {reason(error)}") from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NumericalError(
            f"the logits are not finite once divided by the temperature {temperature:g}: raise it"
        ) from error
    finally:
        model.train(training)
    new = output[0, start_length:].tolist()
    seconds = time.perf_counter() - start
    return Generation(
        prompt=prompt if isinstance(prompt, str) else tokenizer.decode(prompt),
        text=tokenizer.decode(new, skip_special_tokens=True),
        new_tokens=len(new),
        seconds=seconds,
        tokens_per_second=len(new) / seconds,
    )


def _check_own_settings(model: nn.Module) -> None:
    """InputError where the model's own settings of generation are not what they must be."""
    for name in TOKENS:
        value = getattr(model.generation_config, name, None)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and -(2**63) <= token < 2**63 for token in tokens):
            raise InputError(
                f"{GENERATION_CONFIG}: broken: {name} must be the number of a token, or a list of "
                f"numbers, not {value!r:.40}"
            )
    for name in COUNTED:
        value = getattr(model.generation_config, name, None)
        if value is not None and not (type(value) is int and 0 < value <= MOST):
            raise InputError(
                f"{GENERATION_CONFIG}: broken: {name} must be a whole number from 1 to {MOST}, not "
                f"{value!r:.40}"
            )
    stop = model.generation_config.stop_strings
    words = stop if isinstance(stop, list) else [] if stop is None else [stop]
    if not all(isinstance(word, str) and word for word in words):
        raise InputError(
            f"{GENERATION_CONFIG}: broken: stop_strings must be a text or a list of texts, not "
            f"{stop!r:.40}"
        )


def _settings(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """How the library chooses tokens at `temperature`. InputError for what is out of range."""
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise InputError(f"temperature must not be negative, got {temperature}")
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def chat(
    model: nn.Module,
    tokenizer: Any,
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    system: str | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Talk to `model` on the terminal until `/exit` or the end of input.

    `read` shows its argument and returns one line; answers are printed token by token. The end of
    a turn becomes one of the tokens that end what `model` generates. Raises InputError where the
    chat template refuses the conversation.
    """
    from transformers import TextStreamer

    stop_at_end_of_turn(model, tokenizer)
    encoder = Encoder(tokenizer, is_seq2seq(model))
    beginning = [{"role": "system", "content": system}] if system else []
    messages = list(beginning)
    print(f"{CLEAR} forgets what was said, {EXIT} or Ctrl-D ends")
    while True:
        try:
            line = read("> ").strip()
            line.encode()
        except EOFError:
            print()
            return
        except UnicodeError:
            log.warning("that was not UTF-8 text; say it again")
            continue
        if line == EXIT:
            return
        if line == CLEAR:
            messages = list(beginning)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = generate(
                model,
                tokenizer,
                encoder.conversation(messages),
                max_new_tokens,
                temperature=temperature,
                seed=seed,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
            if why := nothing_said(answer, tokenizer, chat=True):
                log.warning("%s", why)
            messages.append({"role": "assistant", "content": answer.text})


def _load(config: SamplingConfig) -> tuple[nn.Module, Any]:
    model, tokenizer = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        allow_pickle=config.allow_pickle,
        trust_remote_code=config.trust_remote_code,
        adapter=config.adapter,
        tokenizer=config.tokenizer,
    )
    if config.quantize is not None:
        quantise(model, config.quantize)
    return model, tokenizer


def stop_at_end_of_turn(model: nn.Module, tokenizer: Any) -> None:
    """Let the token that ends a turn in the chat template end what `model` generates, too.

    It joins the end tokens of the generation settings, which are saved with the model. An
    encoder-decoder model has no turns.
    """
    settings: Any = getattr(model, "generation_config", None)
    end = None if settings is None or is_seq2seq(model) else end_of_turn(tokenizer)
    if end is None or end >= embedding_rows(model):
        return
    known = settings.eos_token_id
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if end not in ends:
        settings.eos_token_id = [*ends, end]


def take_wording(model: nn.Module, tokenizer: Any, adapter: Path) -> None:
    """Let `model`, into which the folder `adapter` is merged, ask and end as that was taught to.

    Where the base has no chat template, that of the tokenizer beside the adapter becomes its own.
    """
    if read_fingerprint(adapter) is None or not (adapter / "tokenizer.json").is_file():
        return  # not finetune's, which keeps a tokenizer beside it
    taught = load_tokenizer(adapter)
    if not has_template(taught):
        return
    stop_at_end_of_turn(model, taught)
    if not has_template(tokenizer):
        tokenizer.chat_template = taught.chat_template


def _prompt_ids(tokenizer: Any, prompt: str | Sequence[int], *, seq2seq: bool) -> torch.Tensor:
    """Token ids (1, n) of `prompt`; for an empty one the token that a text starts from."""
    if not isinstance(prompt, str):
        if not prompt:
            raise InputError(
                "the prompt is empty: the chat template makes no tokens of it; give some text"
            )
        return torch.tensor([prompt], dtype=torch.long)
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    # a chat template writes the start token itself; a second one would confuse the model
    ids = tokenizer(prompt, add_special_tokens=not begun, verbose=False)["input_ids"]
    if seq2seq:
        ids = with_end(ids, tokenizer.eos_token_id)
    elif not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise InputError(
            "the prompt is empty, and this model has no token to start from; give some text"
        )
    return torch.tensor([ids], dtype=torch.long)


def _room(model: nn.Module, used: int) -> int:
    """How many tokens fit behind `used` ones; InputError when none does."""
    positions = learned_positions(model)
    if positions is None:
        return sys.maxsize
    if used >= positions:
        raise InputError(
            f"the prompt has {used} tokens, and this model has {positions} positions; shorten it"
        )
    return positions - used


def pad_token(model: nn.Module, tokenizer: Any) -> int:
    """Any legal token: padding is masked, or is not there at all, but the library asks for one."""
    rows = embedding_rows(model)
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if isinstance(token, int) and token < rows)
