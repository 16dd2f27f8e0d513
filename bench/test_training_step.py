"""A whole training step: ours against the default of transformers' Trainer.

    pytest bench/test_training_step.py --benchmark-json=step.json && python bench/table.py step.json

Ours is the loss in chunks, fastprune.AdamW and, where products are bf16, attention by the kernel;
the other is the model's own loss over whole logits, clip_grad_norm_ and
torch.optim.AdamW(fused=True), as Trainer does by default. Sizes as of SmolLM2-135M. The peak memory
of each (extra_info) is measured in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from fastprune.inspect.memory import peak_memory_bytes
from fastprune.kernels import AdamW
from fastprune.models.attention import use_attention
from fastprune.precision import bf16_is_fast
from fastprune.recover.objective import Objective

SIZES = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
BATCH = 2
SETTINGS = {"fp32": (None, 256), "bf16": (torch.bfloat16, 1024)}  # products, tokens a window


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float32).train()


def tokens(setting: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SIZES["vocab_size"], (BATCH, SETTINGS[setting][1]), generator=generator)


def fastprune(net: torch.nn.Module, setting: str):
    use_attention(net)
    optimizer = AdamW(list(net.named_parameters()), lr=1e-5, weight_decay=0.0, max_grad_norm=1.0)
    objective, ids = Objective(net, SETTINGS[setting][0]), tokens(setting)

    def step() -> None:
        objective({"input_ids": ids, "labels": ids}).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def trainer(net: torch.nn.Module, setting: str):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    dtype, ids = SETTINGS[setting][0], tokens(setting)

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            loss = net(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


PROVIDERS = {"fastprune": fastprune, "trainer": trainer}


def peak(name: str, setting: str) -> int:
    """Bytes at the peak of two steps of a process that does nothing else."""
    command = [sys.executable, __file__, name, setting, str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def described(setting: str) -> str:
    if setting == "bf16" and not bf16_is_fast(torch.device("cpu")):
        pytest.skip("no bf16 products on this processor")
    return f"of a training step, {setting} products, {BATCH} × {SETTINGS[setting][1]} tokens"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", PROVIDERS)
def test_step(measure, name, setting):
    group = f"time {described(setting)}"
    step = PROVIDERS[name](model(), setting)
    moved = 28 * sum(p.numel() for p in model().parameters())  # of the optimizer alone
    measure(step, group, moved)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", PROVIDERS)
def test_peak_memory(benchmark, name, setting):
    benchmark.group = f"peak memory {described(setting)}"
    benchmark.extra_info["bytes"] = 0
    found = benchmark.pedantic(peak, args=(name, setting), rounds=1, iterations=1)
    benchmark.extra_info["peak_memory_bytes"] = found
    print(f"{name}, {setting}: {found / 2**20:.0f} MiB at the peak")


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    step = PROVIDERS[sys.argv[1]](model(), sys.argv[2])
    for _ in range(2):
        step()
    print(peak_memory_bytes(torch.device("cpu")))
