"""Stock models with every softmax under a boolean mask that a test makes by itself, for comparison with patterns."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch
from transformers import (
    AttentionInterface,
    DistilBertConfig,
    DistilBertForTokenClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5EncoderModel,
)
from transformers.masking_utils import AttentionMaskInterface

from hf_optim.testing.models import DECODER, _build, tiny_bert, tiny_llama, tiny_vit

NAME = "test_oracle"
LONG = 160  # tokens that the models below take


@contextmanager
def under(model, masks):
    """Compute attention in each layer by softmax over the pairs that ``masks(layer)`` holds, bool ``[B, H, N, N]``.

    A query that sees nothing gets zero.
    """
    calls = []

    def attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, **kwargs):
        seen = masks(len(calls))
        calls.append(module)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if position_bias is not None:
            scores = scores + position_bias
        weights = torch.softmax(scores.masked_fill(~seen, -1e30), -1).masked_fill(~seen, 0)
        return (weights @ value).transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda **kwargs: None)
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(NAME)
        AttentionMaskInterface._global_mapping.pop(NAME)


def by_blocks(monkeypatch, model):
    """Make a converted model compute lists of blocks for short rows, too."""
    code = sys.modules[type(model).__module__]
    monkeypatch.setattr(code, "SHORTEST", 1)
    monkeypatch.setattr(code, "LARGEST_SHARE", 2.0)


def bert(**changes):
    return tiny_bert(max_position_embeddings=LONG, **changes).double()


def roberta(**changes):
    config = {**DECODER, "pad_token_id": 1, "max_position_embeddings": LONG + 2, "type_vocab_size": 1}
    config.pop("num_key_value_heads", None)
    return _build(RobertaForMaskedLM, RobertaConfig(**{**config, **changes}), 0).double()


def distilbert():
    config = DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=LONG, num_labels=3
    )
    return _build(DistilBertForTokenClassification, config, 0).double()


def t5_encoder():
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return _build(T5EncoderModel, config, 0).double()


def vit():
    return tiny_vit(image_size=72, num_labels=3).double()


def llama():
    return tiny_llama(max_position_embeddings=LONG).double()


MODELS = {each.__name__: each for each in (bert, roberta, distilbert, t5_encoder, vit, llama)}


def batch(model, length=131, seed=0, padding=None):
    """Return a batch of two rows, and which of its tokens are not padding, bool ``[2, length]``.

    ``padding``: None, or the side on which the second row has 40 tokens of it.
    """
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name != "input_ids":
        size = model.config.image_size
        pixels = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
        tokens = (size // model.config.patch_size) ** 2 + 1
        return {"pixel_values": pixels}, torch.ones(2, tokens, dtype=torch.bool)
    ids = torch.randint(3, 60, (2, length), generator=generator)
    valid = torch.ones(2, length, dtype=torch.bool)
    if padding == "left":
        valid[1, :40] = False
    elif padding == "right":
        valid[1, -40:] = False
    ids = ids.masked_fill(~valid, model.config.pad_token_id or 0)
    return {"input_ids": ids, **({} if padding is None else {"attention_mask": valid.long()})}, valid


def outputs_and_gradient(model, inputs, valid):
    """Return the first output at tokens that are not padding, and the gradient of a weighted sum of it."""
    out = model(**inputs)
    out = out.logits if "logits" in out else out[0]
    if out.dim() == 3 and out.shape[1] == valid.shape[1]:
        out = out[valid]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    parameter = next(p for p in model.parameters() if p.dim() == 2)
    model.zero_grad(set_to_none=True)
    (out * weights).sum().backward()
    return out.detach(), parameter.grad.clone()


def assert_same(model, converted, masks, inputs, valid, more=None, tolerance=1e-9):
    """Compare a converted model with the stock one under masks: outputs and gradients.

    ``more`` are inputs of the converted model alone.
    """
    with under(model, masks):
        expected = outputs_and_gradient(model, inputs, valid)
    found = outputs_and_gradient(converted, {**inputs, **(more or {})}, valid)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))
