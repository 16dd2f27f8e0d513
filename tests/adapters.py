"""Tiny models whose layers differ in size, and LoRA adapters that have learnt a little on them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny import tiny_model, tiny_tokenizer, token_ids

from fastprune.models.checkpoint import save_checkpoint
from fastprune.models.conform import conform
from fastprune.models.families import geometries
from fastprune.models.forward import decoder_and_head
from fastprune.models.load import load_model
from fastprune.models.modeling import remove_sublayer
from fastprune.recover.lora import attach, save_adapter
from fastprune.recover.loss import next_token_loss

SIZES = {0: 32, 1: 64, 2: 50, 3: 0}
"""Channels of each layer of the per-layer model; layer 1 has no attention, layer 2 half of it."""


def settings(**changes):
    fields = {
        "lora_r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "lora_target_modules": (),
    }
    return SimpleNamespace(**fields | changes)


def per_layer_model(family="llama", **options):
    """A model whose layers differ in size and lack sublayers, as pruning leaves it."""
    model = tiny_model(family, **options)
    for index, layer in enumerate(model.model.layers):
        cut(layer.mlp, ("gate_proj", "up_proj"), "down_proj", SIZES[index])
    attention = model.model.layers[2].self_attn
    cut(attention, ("q_proj",), "o_proj", 4 * 16)
    cut(attention, ("k_proj", "v_proj"), None, 2 * 16)
    remove_sublayer(model.model.layers[1], "attention", "llama")
    remove_sublayer(model.model.layers[3], "mlp", "llama")
    conform(model, geometries(model))
    return model


def cut(parent, rows, columns, size):
    for name in rows:
        module = getattr(parent, name)
        module.weight.data = module.weight.data[:size].clone()
        module.out_features = size
        if module.bias is not None:
            module.bias.data = module.bias.data[:size].clone()
    if columns:
        module = getattr(parent, columns)
        module.weight.data = module.weight.data[:, :size].clone()
        module.in_features = size


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits


def trained(model, steps=3, seed=0):
    """`model` with an adapter that has learnt a little; every matrix of it has moved."""
    torch.manual_seed(seed)
    adapted = attach(model, settings()).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        training_loss(adapted).backward()
        optimizer.step()
    return adapted.eval()


def training_loss(adapted):
    ids = token_ids()
    decoder, head = decoder_and_head(adapted)
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    return next_token_loss(hidden, head, ids)


def saved(tmp_path, model=None, *, dtype="auto"):
    """A checkpoint, an adapter trained on it (read in `dtype`), and the adapted model's logits."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_checkpoint(model or per_layer_model(), tiny_tokenizer(), base)
    adapted = trained(load_model(base, dtype=dtype)[0])
    save_adapter(adapted, adapter, str(base))
    return base, adapter, logits(adapted)
