"""Losses between the hidden states of student and teacher, averaged over the tokens that are not padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def cosine_loss(
    states: Sequence[Tensor], targets: Sequence[Tensor], masks: Sequence[Tensor | None], pooled: bool = False
) -> Tensor:
    """Return ``1 - cos(h_s, h_t)``, averaged over tokens and over base models (encoder and decoder).

    Args:
        states, targets: hidden states of student and teacher, one ``[batch, tokens, width]`` per base model.
        masks: for each of them ``[batch, tokens]``, non-zero for tokens that count; None if all count.
        pooled: compare the mean state of each sequence, and average over sequences.
    """
    terms = []
    for ours, theirs, mask in zip(states, targets, masks, strict=True):
        ours, theirs = ours.float(), theirs.to(ours.device).float()
        weight = _weight(ours, mask)
        if pooled:
            # The cosine does not depend on the norm of a vector, so sums replace means.
            ours, theirs = ((h * weight[..., None]).sum(1) for h in (ours, theirs))
            weight = weight.amax(1)
        distance = 1.0 - F.cosine_similarity(ours, theirs, dim=-1)
        terms.append((distance * weight).sum() / weight.sum().clamp_min(1.0))
    return sum(terms[1:], terms[0]) / len(terms)


def squarehead_loss(states: Sequence[Tensor], targets: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """Return ``Σ_l MSE(h_t^l, h_s^l) / MSE(h_t^l, 0)``, SquareHead of 2310.06927 (section 2): a sum over layers ``l``.

    The denominator gives all layers equal weight, although the magnitudes of their states differ widely.

    Args:
        states, targets: hidden states of student and teacher, one ``[batch, tokens, width]`` per layer.
        masks: for each of them ``[batch, tokens]``, non-zero for tokens that count; None if all count.
    """
    terms = []
    for ours, theirs, mask in zip(states, targets, masks, strict=True):
        ours, theirs = ours.float(), theirs.to(ours.device).float()
        weight = _weight(ours, mask)[..., None]
        size = (weight * theirs.square()).sum()
        terms.append((weight * (ours - theirs).square()).sum() / size.clamp_min(1e-12))
    return sum(terms[1:], terms[0])


def token_masks(inputs: Mapping[str, Any], is_encoder_decoder: bool) -> list[Tensor | None]:
    """Return the padding mask ``[batch, tokens]``, or None, for each base model (encoder and decoder)."""
    mask = inputs.get("attention_mask")
    if not is_encoder_decoder:
        return [mask]
    labels, decoder = inputs.get("labels"), inputs.get("decoder_attention_mask")
    return [mask, decoder if decoder is not None else labels != -100 if labels is not None else None]


def _weight(states: Tensor, mask: Tensor | None) -> Tensor:
    return states.new_ones(states.shape[:2]) if mask is None or mask.shape != states.shape[:2] else mask.to(states)
