"""Attention of a whole model under a mask that a test writes down pair by pair, beside the attention of a technique."""

from __future__ import annotations

import copy
import sys

import torch
from tiny_models import TINY
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

import hf_optim

LENGTH = 150  # no block divides it
ENCODERS = ("bert", "vit")


def model_of(family, **fields):
    """Return a tiny model in float64, with GQA if it is a Llama, that reads more tokens than ``LENGTH``."""
    longer = {"image_size": 28, "patch_size": 4} if family == "vit" else {"max_position_embeddings": 256}
    return TINY[family](**{**longer, **fields}).double()


def inputs_of(family):
    """Return a batch of three rows: whole, padded left, padded right; and the first and one after the last token."""
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        pixels = torch.randn(2, 3, 28, 28, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels}, [(0, 50), (0, 50)]
    ids = torch.randint(3, 60, (3, LENGTH), generator=generator)
    rows = [(0, LENGTH), (37, LENGTH), (0, LENGTH - 80)]
    place = torch.arange(LENGTH)
    mask = torch.stack([(place >= low) & (place < high) for low, high in rows]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family in ("llama", "gpt2"):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return inputs, rows


def seen_by(formula, rows, layers, heads, causal):
    """Return bool ``[B, layers, H, N, N]``: ``formula(i, j, layer, head, count)`` for each pair of tokens."""
    length = max(high for _, high in rows)
    seen = torch.zeros(len(rows), layers, heads, length, length, dtype=torch.bool)
    for row, (low, high) in enumerate(rows):
        count = high - low
        for layer in range(layers):
            for head in range(heads):
                pairs = [
                    [formula(i, j, layer, head, count) and (j <= i or not causal) for j in range(count)]
                    for i in range(count)
                ]
                seen[row, layer, head, low:high, low:high] = torch.tensor(pairs)
    return seen


def under(model, inputs, seen):
    """Return the hidden states and the gradients of a stock model whose softmax has the mask ``seen``."""
    own = [module for module in model.modules() if hasattr(module, "is_causal")]
    layer_of = {id(module): index for index, module in enumerate(own)}

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        visible = seen[:, layer_of[id(module)]]
        scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~visible, -1e300)
        weights = scores.softmax(-1) * visible.any(-1, keepdim=True)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("pattern_oracle", attention)
    AttentionMaskInterface.register("pattern_oracle", AttentionMaskInterface._global_mapping["sdpa"])
    try:
        model.set_attn_implementation("pattern_oracle")
        return hidden_and_gradients(model, inputs)
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("pattern_oracle")


def hidden_and_gradients(model, inputs):
    """Return the last hidden states at tokens that are not padding, and the gradients of the body's parameters."""
    body = model.base_model
    extra = {} if "pixel_values" in inputs else {"use_cache": False}
    extra = extra if model.config.model_type.split("_")[-1] not in ("bert", "vit") else {}
    hidden = body(**inputs, **extra)[0]
    real = inputs.get("attention_mask", torch.ones(hidden.shape[:2])).bool()
    hidden = hidden[real]
    generator = torch.Generator().manual_seed(1)
    named = {name: p for name, p in body.named_parameters() if p.requires_grad}
    weights = torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)
    grads = torch.autograd.grad((hidden * weights).sum(), list(named.values()), allow_unused=True)
    return hidden.detach(), {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def use_blocks(monkeypatch, model):
    """Let short rows be computed over lists of blocks, in the code that the model runs."""
    function = AttentionInterface._global_mapping[model.config._attn_implementation]
    module = sys.modules[type(function.__self__).__module__]
    module = sys.modules[module.attend.__module__]
    monkeypatch.setattr(module, "SHORTEST", 0)
    monkeypatch.setattr(module, "LARGEST_SHARE", 2.0)
    calls = []
    flash = module.flash_attention
    monkeypatch.setattr(module, "flash_attention", lambda *args: calls.append(args) or flash(*args))
    return calls


def difference(found, expected):
    """Return the largest difference of hidden states and gradients, the latter relative to their size."""
    (hidden, grads), (wanted, others) = found, expected
    assert grads.keys() == others.keys()
    each = [float((g - others[n]).abs().max() / others[n].abs().max().clamp_min(1e-3)) for n, g in grads.items()]
    return max([float((hidden - wanted).abs().max()), *each])


def assert_follows(step, formula, family, monkeypatch):
    """Assert that a technique computes a formula, densely and over blocks, in outputs and gradients."""
    dense = model_of(family)
    inputs, rows = inputs_of(family)
    config = dense.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    seen = seen_by(formula, rows, layers, heads, family not in ENCODERS)
    expected = under(copy.deepcopy(dense), inputs, seen)
    model = hf_optim.optimize(dense, [step])
    assert difference(hidden_and_gradients(model, inputs), expected) < 1e-9
    calls = use_blocks(monkeypatch, model)
    assert difference(hidden_and_gradients(model, inputs), expected) < 1e-9
    assert len(calls) >= layers  # a pattern that reads the length is computed for each length
