"""The kernels alone, in a training loop of your own: AdamW, and scores of what may be pruned.

    python kernels_only.py MODEL TEXT.txt --steps 100

`fastprune.AdamW` takes the place of torch.optim.AdamW. It keeps its moments in float32 under
weights of any dtype, clips the norm of the gradients inside the step, and leaves the weights alone
when a gradient is not finite. `fastprune.taylor_scores` makes one pass over a weight and its
gradient, and gives the first-order importance of every row and column.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastprune


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model and score its MLP channels.")
    parser.add_argument("model", help="Hugging Face folder or hub id of a Llama-like model")
    parser.add_argument("text", type=Path, help="text file to learn from")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // args.seq_len * args.seq_len].view(-1, args.seq_len)

    optimizer = fastprune.AdamW(model.parameters(), lr=args.lr, max_grad_norm=1.0)
    model.train()
    for step in range(args.steps):
        window = windows[step % len(windows)][None]
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        if step + 1 < args.steps:  # the last gradients are used below
            optimizer.step()
            optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    print(f"{int(optimizer.skipped_steps)} steps were skipped: a gradient was not finite")

    for index, layer in enumerate(model.model.layers):
        mlp = layer.mlp
        # A channel is a row of gate and up, and a column of down.
        gate, _ = fastprune.taylor_scores(
            mlp.gate_proj.weight, mlp.gate_proj.weight.grad, kind="first"
        )
        up, _ = fastprune.taylor_scores(mlp.up_proj.weight, mlp.up_proj.weight.grad, kind="first")
        _, down = fastprune.taylor_scores(
            mlp.down_proj.weight, mlp.down_proj.weight.grad, kind="first"
        )
        scores = gate + up + down
        least = torch.argsort(scores)[:5].tolist()
        print(f"layer {index}: the least important of {len(scores)} channels are {least}")


if __name__ == "__main__":
    main()
