"""A model of 2 billion parameters, 4.2 GB in bf16, pruned in 2.5 GB of address space.

    python bench/stream_2b.py [--folder DIR] [--layers 32] [--limit 2.5] [--threads 2]

Makes a random Llama (once, kept in the folder), lets the ordinary run plan without a limit, then
prunes with --stream under RLIMIT_AS, compares the two plans, and prints time and peak memory. The
ordinary run under the same limit is tried too: it must fail. Exits 1 when something is not so.

RLIMIT_AS bounds all addresses a process may use: code, libraries, stacks, heap and mapped files,
touched or not. What is resident is a part of that, so the kernel keeps it below the limit too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

GB = 10**9
SETTINGS = {
    "--ratio": "0.2",
    "--allocation": "global",
    "--calib-samples": "10",
    "--calib-seq-len": "128",
    "--eval-seq-len": "128",
    "--eval-windows": "2",
    "--device": "cpu",
}


LAYER = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""The sizes of the model, of which a tensor takes 131 MB at most."""


def random_llama(folder: Path, **sizes: int) -> None:
    """Write a random checkpoint of these `sizes`, as LlamaConfig names them, tensor by tensor into
    shards of 1 GB; one tensor is in memory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from fastprune.models.shards import ShardWriter
    from fastprune.models.skeleton import skeleton

    config = LlamaConfig(
        **sizes,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    layout = skeleton(config, torch.bfloat16).state_dict()
    with ShardWriter(folder, layout, max_bytes=GB) as out:
        for name, empty in layout.items():
            value = torch.empty(empty.shape, dtype=empty.dtype)
            if "norm" in name:
                value.fill_(1.0)
            else:
                value.normal_(std=0.02, generator=generator)
            out.write(name, value)
    total = sum(tensor.numel() for tensor in layout.values())
    print(f"random Llama of {total / 1e9:.2f} billion parameters, {2 * total / GB:.2f} GB in bf16")


def prune(folder: Path, out: Path, threads: int, *flags: str, limit: int | None = None) -> float:
    """Run the command in a process of its own; its seconds, or -1 when it failed."""
    settings = [text for pair in SETTINGS.items() for text in pair]
    command = [sys.executable, "-m", "fastprune", "prune", str(folder), "--out", str(out)]
    command += ["--overwrite", "--quiet", "--threads", str(threads), *settings, *flags]
    # An arena of glibc's malloc reserves 64 MB of addresses for each thread; one for all will do.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": str(threads)}

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    start = time.perf_counter()
    done = subprocess.run(command, env=environment, preexec_fn=restrict, capture_output=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        lines = done.stderr.decode().strip().splitlines()
        print(f"  exit status {done.returncode}: {lines[-1] if lines else ''}"[:160])
        return -1.0
    metrics = json.loads((out / "fastprune" / "metrics.json").read_text())
    stages = ", ".join(f"{name} {spent:.0f}" for name, spent in metrics["seconds"].items())
    print(f"  {seconds:.0f} s ({stages})")
    print(f"  peak resident {metrics['peak_memory_bytes'] / GB:.2f} GB")
    for measured in metrics["perplexity"]:
        print(f"  perplexity {measured['before']:.0f} -> {measured['after']:.0f}")
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/stream-2b"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--limit", type=float, default=2.5, help="GB of address space")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make", action="store_true", help="make the checkpoint and stop")
    options = parser.parse_args()
    model, limit = options.folder / "model", int(options.limit * GB)
    if options.make:
        random_llama(model, **LAYER, num_hidden_layers=options.layers)
        return 0
    if not (model / "config.json").is_file():
        # In a process of its own: a child's peak starts from what its parent holds.
        again = [sys.executable, __file__, "--make", "--folder", str(options.folder)]
        subprocess.run([*again, "--layers", str(options.layers)], check=True)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"{model}: {size / GB:.2f} GB of weights; limit {limit / GB:.2f} GB of address space")

    plain, streamed = options.folder / "plain", options.folder / "streamed"
    print("in memory, no limit, plan only:")
    whole = prune(model, plain, options.threads, "--dry-run") >= 0
    print("in memory, under the limit, plan only (must fail):")
    refused = prune(model, plain / "limited", options.threads, "--dry-run", limit=limit) < 0
    print("streamed, under the limit:")
    done = prune(model, streamed, options.threads, "--stream", limit=limit) >= 0
    plans = [folder / "fastprune" / "plan.json" for folder in (plain, streamed)]
    same = whole and done and plans[0].read_bytes() == plans[1].read_bytes()
    print(f"plans {'are equal' if same else 'DIFFER'}")
    return 0 if same and refused else 1


if __name__ == "__main__":
    sys.exit(main())
