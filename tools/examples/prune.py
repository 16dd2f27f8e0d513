"""Prune a model from Python, look at the result, and save it as a Hugging Face folder.

    python prune.py MODEL OUT --ratio 0.2
    python prune.py Qwen/Qwen2.5-0.5B small --ratio 0.15 --structures mlp --eval mine.txt

The result loads with `AutoModelForCausalLM.from_pretrained(OUT)` after `import fastprune`, and with
`trust_remote_code=True` where fastprune is not installed.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fastprune


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune a model and save it.")
    parser.add_argument("model", help="Hugging Face folder or hub id")
    parser.add_argument("out", type=Path, help="folder for the pruned model; must not exist")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the blocks to remove")
    parser.add_argument("--structures", default="attention,mlp", help="what may be removed")
    parser.add_argument("--calib", default="builtin:c4", help="text that importance is measured on")
    parser.add_argument("--calib-samples", type=int, default=128, help="windows of that text")
    parser.add_argument("--calib-seq-len", type=int, default=256, help="tokens in a window")
    parser.add_argument("--eval", default="builtin:wikitext2", help="text to measure perplexity on")
    parser.add_argument("--effort", default="balanced", choices=("fast", "balanced", "thorough"))
    args = parser.parse_args()
    args.out.mkdir(parents=True)  # fails before the work where the folder exists

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = fastprune.PruneConfig(
        ratio=args.ratio,
        structures=tuple(args.structures.split(",")),
        calib=args.calib,
        calib_samples=args.calib_samples,
        calib_seq_len=args.calib_seq_len,
        eval=args.eval,
        effort=args.effort,
    )
    # The model is cut in place. Raises fastprune.GateError where the result is of no use.
    result = fastprune.prune(model, tokenizer, config)

    for layer in result.metrics["layers"]:
        heads = f"{layer['query_heads']}:{layer['kv_heads']} heads"
        print(f"layer {layer['index']}: {heads}, {layer['channels']} channels")
    params, perplexity = result.metrics["params"], result.metrics["perplexity"][0]
    print(f"parameters  {params['before']:,} -> {params['after']:,}")
    print(f"perplexity  {perplexity['before']:.2f} -> {perplexity['after']:.2f}")

    result.model.save_pretrained(args.out)
    result.tokenizer.save_pretrained(args.out)
    (args.out / "metrics.json").write_text(json.dumps(result.metrics, indent=1))


if __name__ == "__main__":
    main()
