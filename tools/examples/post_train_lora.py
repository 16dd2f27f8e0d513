"""Recover a pruned model with LoRA, save the adapter, and merge it into the model.

    python post_train_lora.py PRUNED OUT --data alpaca-cleaned

OUT/adapter is an adapter that peft loads beside PRUNED; OUT/merged is the model with it inside.
Several GPUs: `torchrun --nproc-per-node 4 -m fastprune finetune ...` does the same.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fastprune

PROJECTIONS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a LoRA adapter and merge it.")
    parser.add_argument("model", help="Hugging Face folder or hub id")
    parser.add_argument("out", type=Path, help="folder for the results; must not exist")
    parser.add_argument("--data", default="alpaca-cleaned", help="instructions or text")
    parser.add_argument("--num-epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=128, help="samples in one step")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples in one pass")
    parser.add_argument("--lora-r", type=int, default=8)
    parser.add_argument("--lora-alpha", type=int, default=16)
    parser.add_argument("--lora-target-modules", default=PROJECTIONS)
    parser.add_argument("--val-set-size", type=int, default=2000)
    parser.add_argument("--cutoff-len", type=int, default=256)
    parser.add_argument("--eval", default="builtin:wikitext2", help="text to measure perplexity on")
    args = parser.parse_args()
    args.out.mkdir(parents=True)

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = fastprune.FinetuneConfig(
        method="lora",
        data=args.data,
        epochs=args.num_epochs,
        lr=args.learning_rate,
        batch_size=args.micro_batch_size,
        grad_accum=max(1, args.batch_size // args.micro_batch_size),
        lora_r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_target_modules=tuple(args.lora_target_modules.split(",")),
        val_size=args.val_set_size,
        seq_len=args.cutoff_len,
        eval=args.eval,
        gradient_checkpointing=True,
    )
    result = fastprune.finetune(model, tokenizer, config)

    perplexity = result.metrics["perplexity"][0]
    print(f"perplexity  {perplexity['before']:.2f} -> {perplexity['after']:.2f}")
    result.model.save_pretrained(args.out / "adapter")
    merged = result.model.merge_and_unload()
    merged.save_pretrained(args.out / "merged")
    tokenizer.save_pretrained(args.out / "merged")


if __name__ == "__main__":
    main()
