"""Losses between the hidden states of student and teacher, averaged over the tokens that are not padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses


def cosine_losses(
    states: Sequence[Tensor], targets: Sequence[Tensor], masks: Sequence[Tensor | None], pooled: bool = False
) -> Tensor:
    """Return ``(1 - cos(h_s, h_t)) / n``, averaged over tokens, of each of ``n`` base models (encoder and decoder).

    Args:
        states, targets: hidden states of student and teacher, one ``[batch, tokens, width]`` per base model.
        masks: for each of them ``[batch, tokens]``, non-zero for tokens that count; None if all count.
        pooled: compare the mean state of each sequence, and average over sequences.

    Returns:
        ``[n]``; zero for a base model without tokens that count.
    """
    terms = []
    for ours, theirs, mask in zip(states, targets, masks, strict=True):
        ours, theirs = _computed(ours), _computed(theirs.to(ours.device))
        weight = _weight(ours, mask)
        if pooled:
            # The cosine does not depend on the norm of a vector, so sums replace means.
            ours, theirs = ((h * weight[..., None]).sum(1) for h in (ours, theirs))
            weight = weight.amax(1)
        distance = 1.0 - F.cosine_similarity(ours, theirs, dim=-1)
        terms.append((distance * weight).sum() / weight.sum().clamp_min(1.0))
    return torch.stack(terms) / len(terms)


def squarehead_losses(states: Sequence[Tensor], targets: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """Return ``MSE(h_t^l, h_s^l) / MSE(h_t^l, 0)`` of each layer ``l``: their sum is SquareHead, 2310.06927, section 2.

    The denominator gives all layers equal weight, although the magnitudes of their states differ widely.

    Args:
        states, targets: hidden states of student and teacher, one ``[batch, tokens, width]`` per layer.
        masks: for each of them ``[batch, tokens]``, non-zero for tokens that count; None if all count.

    Returns:
        ``[layers]``; zero if no token counts.
    """
    terms = []
    sizes = squared_sizes(targets, masks)
    for ours, theirs, mask, size in zip(states, targets, masks, sizes, strict=True):
        ours, theirs = _computed(ours), _computed(theirs.to(ours.device))
        weight = _weight(ours, mask)[..., None]
        terms.append((weight * (ours - theirs).square()).sum() / size.to(ours.device).clamp_min(1e-12))
    return torch.stack([term.to(terms[0].device) for term in terms])


def squared_sizes(targets: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the sum of squares of each layer's states over the tokens that count: the weights of SquareHead means."""
    return [
        (_weight(states, mask)[..., None] * states.square()).sum()
        for states, mask in zip(map(_computed, targets), masks, strict=True)
    ]


def count_tokens(model: Any, inputs: Mapping[str, Any], pooled: bool = False) -> list[Tensor]:
    """Return how many tokens ``cosine_losses`` averages over, of each base model; with ``pooled``, how many sequences.

    It is known from the inputs alone, before a forward. Without a mask all tokens of the batch count.
    """
    counts = []
    both = model.config.is_encoder_decoder
    for i, mask in enumerate(token_masks(inputs, both)):
        if mask is None or mask.dim() != 2:
            mask = losses.all_tokens(inputs, "decoder_" if both and i else "")
        scored = mask.ne(0)
        counts.append((scored.any(-1) if pooled else scored).sum())
    return counts


def token_masks(inputs: Mapping[str, Any], is_encoder_decoder: bool) -> list[Tensor | None]:
    """Return the padding mask ``[batch, tokens]``, or None, for each base model (encoder and decoder)."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 3:
        mask = mask.flatten(0, 1)  # the choices of a multiple-choice head are rows of the base model
    if not is_encoder_decoder:
        return [mask]
    labels, decoder = inputs.get("labels"), inputs.get("decoder_attention_mask")
    return [mask, decoder if decoder is not None else labels != -100 if labels is not None else None]


def _weight(states: Tensor, mask: Tensor | None) -> Tensor:
    return states.new_ones(states.shape[:2]) if mask is None or mask.shape != states.shape[:2] else mask.to(states)


def _computed(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()
