"""Recover a pruned model by finetuning all of its weights, from Python.

    python finetune.py PRUNED OUT --data alpaca-cleaned --lr 1e-5 --samples 2000

DATA is a file or folder (.jsonl, .json, .parquet, .csv, .txt), hf:NAME, or a short name. The
optimizer keeps its moments in float32, and a step whose loss or gradient is not finite changes
nothing, so that a model in half precision does not become NaN.
"""

import argparse
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fastprune  # also lets AutoModelForCausalLM load layers of different size


def main() -> None:
    parser = argparse.ArgumentParser(description="Finetune a model and save it.")
    parser.add_argument("model", help="Hugging Face folder or hub id")
    parser.add_argument("out", type=Path, help="folder for the result; must not exist")
    parser.add_argument("--data", default="builtin:c4", help="what to learn from")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--samples", type=int, help="of the data, at most so many")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--grad-accum", type=int, default=8)
    parser.add_argument("--freeze", default="none", help="none, most, half, ends, attention, mlp")
    parser.add_argument("--eval", default="builtin:wikitext2", help="text to measure perplexity on")
    args = parser.parse_args()
    args.out.mkdir(parents=True)

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = fastprune.FinetuneConfig(
        data=args.data,
        lr=args.lr,
        epochs=args.epochs,
        samples=args.samples,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        grad_accum=args.grad_accum,
        freeze=args.freeze,
        eval=args.eval,
    )
    try:
        result = fastprune.finetune(model, tokenizer, config)
    except (fastprune.GateError, fastprune.NumericalError) as error:
        args.out.rmdir()
        sys.exit(f"not saved: {error}")  # the model is worse than before, or the loss not finite

    for stage in result.metrics["stages"]:
        print(f"{stage['name']}: {stage['steps']} steps, {stage['skipped_steps']} skipped")
    perplexity = result.metrics["perplexity"][0]
    print(f"perplexity  {perplexity['before']:.2f} -> {perplexity['after']:.2f}")
    result.model.save_pretrained(args.out)
    result.tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
