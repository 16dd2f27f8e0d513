"""The whole way from Python: prune, recover, measure, in a given number of minutes.

    python compress.py

The settings are the constants below. Given an output folder, a run that was interrupted goes on
when the script is started again.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fastprune

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OUT = Path("smollm2-small")
CONFIG = fastprune.CompressConfig(ratio=0.2, minutes=30, out=OUT)


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    small, tokenizer, metrics = fastprune.compress(model, tokenizer, CONFIG)

    for name in ("dense", "pruned", "recovered"):
        perplexity = metrics[name]["perplexity"][0]["perplexity"]
        print(f"{name:9}  perplexity {perplexity:.2f}")
    prompt = tokenizer("The river", return_tensors="pt")
    answer = small.generate(**prompt, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(answer[0], skip_special_tokens=True))
    print(f"checkpoint and report in {OUT}")


if __name__ == "__main__":
    main()
