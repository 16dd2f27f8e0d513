"""Does vLLM serve a per-layer checkpoint as transformers computes it? Run it where vLLM is.

    python tools/check_vllm.py MODEL [--adapter DIR] [--backend plugin|transformers]
                               [--tensor-parallel N] [--pipeline-parallel N]

MODEL is a folder that prune wrote; fastprune and vLLM are installed in the same environment.
The likeliest tokens after five prompts are computed by transformers first, and then by vLLM: by
fastprune's plugin, or by vLLM's own Transformers backend and the code in MODEL. Where the texts
part, the two best logits of transformers are compared: a gap that bfloat16 rounds away is no
difference. Prints a table; exits 1 on any difference, 2 where vLLM is missing.
"""

import argparse
import importlib.util
import sys
from dataclasses import dataclass

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a miller who",
    "def fibonacci(n):",
    "The three primary colours are",
)
NEW = 32
GAP = 0.125  # bfloat16 keeps 8 bits: a logit between 16 and 32 is rounded to multiples of 1/8


@dataclass(frozen=True)
class Expected:
    """Token ids that follow one prompt, and the gap between the two best logits before each."""

    prompt: list[int]
    tokens: list[int]
    gaps: list[float]


def main() -> int:
    """Compare the two on every prompt and print the table; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--adapter", help="a LoRA adapter that peft wrote, put onto both")
    parser.add_argument("--backend", choices=("plugin", "transformers"), default="plugin")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    args = parser.parse_args()
    expected = by_transformers(args.model, args.adapter)
    found = by_vllm(args, [entry.prompt for entry in expected])
    wrong = 0
    for text, entry, tokens in zip(PROMPTS, expected, found, strict=True):
        verdict = compared(entry, tokens)
        wrong += verdict.startswith("DIFFERS")
        print(f"{text:42} {verdict}")
    return 1 if wrong else 0


def by_transformers(folder: str, adapter: str | None) -> list[Expected]:
    """The likeliest tokens after each prompt, on the CPU in float32."""
    import torch

    from fastprune.models.load import load_model

    model, tokenizer = load_model(folder, dtype="float32", adapter=adapter)
    result = []
    for text in PROMPTS:
        prompt = tokenizer(text).input_ids
        written = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(written.scores).topk(2).values
        gaps = (best[:, 0] - best[:, 1]).tolist()
        result.append(Expected(prompt, written.sequences[0, len(prompt) :].tolist(), gaps))
    return result


def by_vllm(args: argparse.Namespace, prompts: list[list[int]]) -> list[list[int]]:
    """The likeliest tokens after each prompt of token ids, as vLLM serves the model."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"trust_remote_code": True, "model_impl": "transformers"}
    engine = LLM(
        args.model,
        max_model_len=256,
        tensor_parallel_size=args.tensor_parallel,
        pipeline_parallel_size=args.pipeline_parallel,
        enable_lora=args.adapter is not None,
        **(options if args.backend == "transformers" else {}),
    )
    adapter = None if args.adapter is None else LoRARequest("adapter", 1, args.adapter)
    sampling = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = engine.generate(inputs, sampling, lora_request=adapter)
    return [list(output.outputs[0].token_ids) for output in outputs]


def compared(expected: Expected, tokens: list[int]) -> str:
    """One line on where `tokens` part from those of transformers, if they do."""
    pairs = zip(expected.tokens, tokens, strict=True)
    place = next((i for i, (own, other) in enumerate(pairs) if own != other), None)
    if place is None:
        return "the same"
    gap = expected.gaps[place]
    if gap <= GAP:
        return f"the same up to token {place}, where two logits are {gap:.2g} apart"
    return f"DIFFERS at token {place}, where the best logit leads by {gap:.2g}"


if __name__ == "__main__":
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: pip install vllm beside fastprune", file=sys.stderr)
        sys.exit(2)
    sys.exit(main())
