"""The sound inputs, and all the malformed ones that are made of them."""

from __future__ import annotations

import random
from pathlib import Path

import data
import models
import settings
import torch
from case import Base, Case
from tiny import TEXT, tiny_checkpoint, tiny_model

KINDS = (models, settings, data)


def make_base(folder: Path) -> Base:
    """Fill `folder` with a tiny model, an adapter, a plan, a `.gguf` file and a text."""
    from adapters import settings as lora_settings
    from gguf_files import write_gguf

    from fastprune.models.families import geometries
    from fastprune.pruning.plan import keep_all
    from fastprune.recover.lora import attach, save_adapter

    torch.set_num_threads(1)
    model = tiny_model("llama", layers=2)
    tiny_checkpoint(folder / "model", layers=2)
    write_gguf(folder / "tiny.gguf", model)
    keep_all(geometries(model)).save(folder / "plan.json")
    (folder / "text.txt").write_text(TEXT * 12)
    adapted = attach(model, lora_settings())
    (folder / "adapter").mkdir()
    save_adapter(adapted, folder / "adapter", "tiny")
    return Base(folder)


def all_cases(base: Base, seed: int) -> list[Case]:
    """All cases; the same `seed` gives the same ones."""
    return [
        case for kind in KINDS for case in kind.cases(base, random.Random(f"{kind.__name__}{seed}"))
    ]
