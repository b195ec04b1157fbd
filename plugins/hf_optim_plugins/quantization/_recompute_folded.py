"""The numbers that steps before rounding report, recomputed (``Technique.recompute``): what was scaled or rotated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_optim.toolkit import topology


def smoothquant(case: Any, step: Any) -> dict[str, Any]:
    """Return the counts of ``smoothquant`` and its largest ratios, from the norms and the inputs of every block."""
    norms = pairs = 0
    before, after = [], []
    trace = topology.trace(case.before)
    groups = [group for group in topology.find_norm_groups(trace) if group.exclusive]
    found = [pair for pair in topology.find_linear_pairs(trace) if pair.scalable] if step.pairs else []
    for block, mixed in case.sequential():
        for pair in (pair for pair in found if block.holds(pair.consumer)):
            peak = case.inputs(mixed, [pair.consumer])[pair.consumer].abs().amax(0)
            weight = case.weight(case.before, pair.consumer).abs().amax(0)
            own, columns = _per_channel(pair, peak), _per_channel(pair, weight)
            scale = own**step.alpha / columns ** (1 - step.alpha)
            wide = torch.ones_like(peak)
            for channel, members in enumerate(pair.columns):
                wide[members] = scale[channel]
            pairs += 1
            before.append(_over_median(peak))
            after.append(_over_median(peak / wide))
        for group in (group for group in groups if any(block.holds(name) for name in group.linears)):
            reader = next(iter(group.linears))
            peak = case.inputs(mixed, [reader])[reader].abs().amax(0)
            old, new = (model.get_parameter(f"{group.name}.weight").double() for model in (case.before, case.after))
            norms += 1
            before.append(_over_median(peak))
            after.append(_over_median(peak * (new / old).detach()))
    return {
        "norms": norms,
        "pairs": pairs,
        "peak_over_median_before": max(before),
        "peak_over_median_after": max(after),
    }


def awq(case: Any, step: Any) -> dict[str, Any]:
    """Return the counts of ``awq``, and the largest ratio of two scales of a norm, from the gains before and after."""
    trace = topology.trace(case.before)
    blocks = topology.blocks(case.before)
    inside = [name for name in topology.linears(case.before) if any(block.holds(name) for block in blocks)]
    groups = [g for g in topology.find_norm_groups(trace) if g.exclusive and set(g.linears) <= set(inside)]
    pairs = [pair for pair in topology.find_linear_pairs(trace) if pair.scalable] if step.pairs else []
    ratios = [1.0]
    for group in groups:
        old, new = (model.get_parameter(f"{group.name}.weight").double() for model in (case.before, case.after))
        scale = (old / new).detach()
        ratios.append(float(scale.max() / scale.min()))
    return {"norms": len(groups), "pairs": len(pairs), "largest_ratio": max(ratios)}


def _per_channel(pair: Any, values: Tensor) -> Tensor:
    return torch.stack([values[members].max() for members in pair.columns])


def _over_median(peak: Tensor) -> float:
    return float(peak.max() / peak.median())


def rotation(case: Any, step: Any) -> dict[str, Any]:
    """Return how many streams and attentions were rotated, by the weights that changed, and if the head was untied.

    A stream has been rotated if the embedding's columns have other values but the same inner products; an attention if
    its output projection's columns have, or its values' rows where the stream is rotated too.
    """
    old, new = (model.get_input_embeddings() for model in (case.before, case.after))
    turned = old is not None and hasattr(old, "weight") and not torch.allclose(old.weight, new.weight, atol=1e-5)
    heads = [
        pair for pair in topology.find_value_heads(topology.trace(case.before)) if not _same_gram(case, pair, turned)
    ]
    tied = [bool(getattr(model.config, "tie_word_embeddings", False)) for model in (case.before, case.after)]
    return {"streams": int(turned), "attentions": len(heads), "head_untied": tied[0] and not tied[1]}


def _same_gram(case: Any, heads: Any, turned: bool) -> bool:
    """Return True if the values of an attention were not rotated: inner products over the other dimension are kept."""
    old, new = (case.weight(model, heads.producer)[heads.rows.flatten()] for model in (case.before, case.after))
    one, other = (weight @ weight.T for weight in (old, new)) if turned else (old, new)
    return torch.allclose(one, other, atol=1e-5)
