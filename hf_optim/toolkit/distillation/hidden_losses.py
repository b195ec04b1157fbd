"""Distances of a student's hidden states from its teacher's, means over the tokens that are no padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def cosine_loss(
    states: Sequence[Tensor], wanted: Sequence[Tensor], masks: Sequence[Tensor | None], pooled: bool = False
) -> Tensor:
    """``1 - cos(h_s, h_t)``, the mean over tokens (``pooled``: of mean states, over sequences), and over bodies.

    Args:
        states, wanted: the student's and the teacher's, one or more of ``[batch, tokens, width]``.
        masks: for each of them ``[batch, tokens]``, non-zero where a token counts; None where all do.
    """
    terms = []
    for ours, theirs, mask in zip(states, wanted, masks, strict=True):
        ours, theirs = ours.float(), theirs.to(ours.device).float()
        weight = _weight(ours, mask)
        if pooled:
            # The length of a vector is nothing to its direction: sums serve for means.
            ours, theirs = ((h * weight[..., None]).sum(1) for h in (ours, theirs))
            weight = weight.amax(1)
        distance = 1.0 - F.cosine_similarity(ours, theirs, dim=-1)
        terms.append((distance * weight).sum() / weight.sum().clamp_min(1.0))
    return sum(terms[1:], terms[0]) / len(terms)


def squarehead_loss(states: Sequence[Tensor], wanted: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """``Σ_l MSE(h_t^l, h_s^l) / MSE(h_t^l, 0)``, SquareHead of 2310.06927 (section 2): a sum over the layers ``l``.

    Dividing by the teacher's own square makes all layers count alike, whose states differ in size by far.

    Args:
        states, wanted: the student's and the teacher's, one ``[batch, tokens, width]`` for each layer.
        masks: for each of them ``[batch, tokens]``, non-zero where a token counts; None where all do.
    """
    terms = []
    for ours, theirs, mask in zip(states, wanted, masks, strict=True):
        ours, theirs = ours.float(), theirs.to(ours.device).float()
        weight = _weight(ours, mask)[..., None]
        size = (weight * theirs.square()).sum()
        terms.append((weight * (ours - theirs).square()).sum() / size.clamp_min(1e-12))
    return sum(terms[1:], terms[0])


def token_masks(inputs: Mapping[str, Any], encodes: bool) -> list[Tensor | None]:
    """Which tokens of a model's bodies are no padding."""
    mask = inputs.get("attention_mask")
    if not encodes:
        return [mask]
    labels, decoder = inputs.get("labels"), inputs.get("decoder_attention_mask")
    return [mask, decoder if decoder is not None else labels != -100 if labels is not None else None]


def _weight(states: Tensor, mask: Tensor | None) -> Tensor:
    return states.new_ones(states.shape[:2]) if mask is None or mask.shape != states.shape[:2] else mask.to(states)
