"""Attention by random features written from the formulas, over all pairs of tokens: what linear attention must give."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "tests_feature_oracle"


def by_pairs(products, value, causal):
    """Return ``sum_s a_ts v_s`` and ``sum_s a_ts`` of products ``[B, H, N, N]``."""
    if causal:
        products = products.tril()
    return products @ value, products.sum(-1, keepdim=True)


def performer(query, key, value, weight, scale, causal, kernel="softmax"):
    """FAVOR+, without any maximum: float64 does not overflow here. weight: ``[G, M, D]``."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    weight = weight.repeat_interleave(group, 0)
    q, k = query * scale**0.5, key * scale**0.5
    dots = [torch.einsum("hmd,bhnd->bhnm", weight, part) for part in (q, k)]
    if kernel == "relu":
        phi = [dot.clamp_min(0) + 0.001 for dot in dots]
    else:
        halves = [part.pow(2).sum(-1, keepdim=True) / 2 for part in (q, k)]
        if kernel == "softmax_authors":
            tops = [dots[0].detach().amax(-1, keepdim=True), dots[1].detach().amax((-1, -2), keepdim=True)]
        else:
            tops = [0, 0]
        epsilon = 1e-4 if kernel == "softmax_authors" else 0
        phi = [(d - h - t).exp() + epsilon for d, h, t in zip(dots, halves, tops, strict=True)]
    out, total = by_pairs(phi[0] @ phi[1].mT, value, causal)
    return out / total


def rfa(query, key, value, weight, causal, floor, gate=None):
    """RFA; gate: g ``[B, G, N]``."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    weight = weight.repeat_interleave(group, 0)
    angles = [
        torch.einsum("hmd,bhnd->bhnm", weight, part / (part.norm(dim=-1, keepdim=True) + 1e-3)) for part in (query, key)
    ]
    products = (angles[0][:, :, :, None] - angles[1][:, :, None]).cos().mean(-1)  # sin sin + cos cos
    times = torch.ones_like(products)
    if gate is not None:
        gate = gate.repeat_interleave(group, 1)
        for t in range(gate.shape[2]):
            for s in range(t + 1):
                times[:, :, t, s] = (1 - gate[:, :, s]) * gate[:, :, s + 1 : t + 1].prod(-1)
    if causal:
        times = times.tril()
    out, total = by_pairs(products * times, value, causal)
    return out / torch.maximum(total, floor * times.sum(-1, keepdim=True))


@contextmanager
def attending(model, compute):
    """Run a dense model with ``compute(module, query, key, value, scale)`` as its attention; the mask says all."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return compute(module, query, key, value, scale).transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda **kwargs: None)
    try:
        model.set_attn_implementation(NAME)
        yield model
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(NAME, None)


def assert_same_outputs_and_gradients(model, dense, compute, ids, extra=()):
    """Compare logits and gradients of a converted model with those of its dense one under the oracle, in float64.

    ``extra`` are pairs of a parameter of ``model`` and the tensor with gradients that the oracle has in its place.
    """
    found = model(ids).logits
    found.square().sum().backward()
    with attending(dense, compute):
        expected = dense(ids).logits
        expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    named = dict(model.named_parameters())
    pairs = [(named[name].grad, p.grad) for name, p in dense.named_parameters() if p.grad is not None]
    pairs += [(own.grad, other.grad) for own, other in extra]
    assert len(pairs) > 10
    for own, other in pairs:
        scale = other.abs().max().clamp_min(1.0)
        torch.testing.assert_close(own / scale, other / scale, rtol=0, atol=1e-10)
