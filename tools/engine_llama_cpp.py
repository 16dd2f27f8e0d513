"""llama.cpp, through whichever Python package has it inside, for check_engines.py and the tests.

`llama-cpp-python` is taken where it is installed, else `xllamacpp`, which is llama.cpp's server in
this process and comes as a wheel. Weights are computed with as the file has them, keys and values
are cached in fp32, so that what differs from transformers is the model's own.
"""

from __future__ import annotations

import json
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

MISSING = "llama.cpp is not installed here: pip install xllamacpp (or llama-cpp-python)"


class Engine(Protocol):
    """A `.gguf` file that is loaded; token ids are lists of int, of plain ASCII text."""

    def tokens(self, text: str) -> list[int]:
        """The tokens of `text`, with a start token where the file asks for one."""

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """At most `count` tokens that continue `ids`, each the likeliest, before an end token."""

    def likeliest(self, ids: list[int], count: int) -> dict[int, float]:
        """Log-probabilities of the `count` likeliest tokens after `ids`."""

    def log_probs(self, ids: list[int]) -> list[float]:
        """The log-probability of each token of `ids` but the first, after those before it."""

    def speed(self, ids: list[int], count: int) -> float:
        """Tokens per second at which `ids` is continued by `count` tokens."""


def installed() -> str | None:
    """The package with llama.cpp that `load` would use; None where there is none."""
    return next((name for name in ("llama_cpp", "xllamacpp") if find_spec(name)), None)


def load(path: Path, *, context: int = 512, threads: int = 1) -> Engine:
    """The file `path` in llama.cpp. Raises RuntimeError where it does not load, or none is here."""
    package = installed()
    if package is None:
        raise RuntimeError(MISSING)
    kind = LlamaCppPython if package == "llama_cpp" else XLlamaCpp
    return kind(path, context, threads)


class LlamaCppPython:
    """Through `llama-cpp-python`, which gives the logits themselves."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )

    def _logits(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities (tokens, vocabulary) after each token of `ids`."""
        self.model.reset()
        self.model.eval(ids)
        scores = np.asarray(self.model.scores[: len(ids)], dtype=np.float64)
        scores -= scores.max(-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    def tokens(self, text: str) -> list[int]:
        return self.model.tokenize(text.encode(), special=True)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        found = list(ids)
        self.model.reset()
        self.model.eval(ids)
        for _ in range(count):
            found.append(int(np.argmax(self.model.scores[len(found) - 1])))
            if found[-1] == self.model.token_eos():
                return found[len(ids) : -1]
            self.model.eval(found[-1:])
        return found[len(ids) :]

    def likeliest(self, ids: list[int], count: int) -> dict[int, float]:
        last = self._logits(ids)[-1]
        return {int(i): float(last[i]) for i in np.argsort(-last)[:count]}

    def log_probs(self, ids: list[int]) -> list[float]:
        found = self._logits(ids)
        return [float(found[i, token]) for i, token in enumerate(ids[1:])]

    def speed(self, ids: list[int], count: int) -> float:
        self.greedy(ids, 1)
        start = time.perf_counter()
        self.greedy(ids, count)
        return count / (time.perf_counter() - start)


class XLlamaCpp:
    """Through `xllamacpp`: requests to llama.cpp's server."""

    FORCED = 1e4
    """Added to a logit so that its token is chosen; the log-probabilities are those before that."""

    def __init__(self, path: Path, context: int, threads: int) -> None:
        import xllamacpp

        asked = xllamacpp.CommonParams()
        asked.model.path = str(path)
        asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = context, 1, 0
        asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
        asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        asked.warmup, asked.fit_params = False, False
        asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        asked.verbosity = -1
        self.server = xllamacpp.Server(asked)

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def _complete(self, ids: list[int], count: int, **more: Any) -> dict[str, Any]:
        asked = {"prompt": ids, "n_predict": count, "temperature": 0}
        return self._ask("completion", asked | {"return_tokens": True} | more)

    def tokens(self, text: str) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": True}
        return self._ask("tokenize", body)["tokens"]

    def greedy(self, ids: list[int], count: int) -> list[int]:
        answer = self._complete(ids, count)
        ended = answer["stop_type"] == "eos"
        return answer["tokens"][: answer["tokens_predicted"] - ended]

    def likeliest(self, ids: list[int], count: int) -> dict[int, float]:
        step = self._forced(ids, ids[-1], count)
        return {one["id"]: one["logprob"] for one in step["top_logprobs"]}

    def log_probs(self, ids: list[int]) -> list[float]:
        places = range(1, len(ids))
        return [self._forced(ids[:place], ids[place], 1)["logprob"] for place in places]

    def _forced(self, ids: list[int], token: int, count: int) -> dict[str, Any]:
        """The step after `ids` that chooses `token`, with the `count` likeliest tokens.

        One that ends within a character would come without its probabilities, so none is left to
        the model.
        """
        answer = self._complete(ids, 1, n_probs=count, logit_bias=[[token, self.FORCED]])
        (step,) = answer["completion_probabilities"]
        if step["id"] != token:
            raise RuntimeError(f"llama.cpp chose {step['id']} where {token} was forced")
        return step

    def speed(self, ids: list[int], count: int) -> float:
        self._complete(ids, 1)
        return self._complete(ids, count, ignore_eos=True)["timings"]["predicted_per_second"]
