"""The numbers of channel permutations, recomputed for the conformance suite (``Technique.recompute``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_optim.toolkit import topology
from hf_optim.toolkit.permutation import find_sites


def channel_permutation(case: Any, step: Any) -> dict[str, Any]:
    """Return what masks keep before and after, from the weights; which layers moved, from the values in each column."""
    norms = _norms(case) if step.score == "activation" else {}
    kept: dict[str, list[float]] = {}
    for name in case.names:
        old, new = (case.weight(model, name).abs() for model in (case.before, case.after))
        if name in norms:
            old, new = old * norms[name], new * case.inputs(case.after, [name])[name].square().sum(0).sqrt()
        rows = float(old.topk(old.shape[1] // step.group * step.keep, dim=1).values.sum())
        kept[name] = [_by_groups(old, step), _by_groups(new, step), rows, float(old.sum())]
    old, new, rows, total = (sum(column) for column in zip(*kept.values(), strict=True))
    moved = [name for name in case.names if _moved(case, name, slice(None))]
    sites = [site for site in find_sites(case.before, step.where)[0] if site.width % step.group == 0]
    sites = [site for site in sites if set(site.readers) & set(case.names)]
    return {
        "pattern": f"{step.keep}:{step.group}",
        "orders_searched": len(sites),
        "orders_used": sum(
            any(_moved(case, name, columns) for name in site.readers if name in case.names for columns in site.columns)
            for site in sites
        ),
        "layers_permuted": len(moved),
        "kept_before": old / total,
        "kept_after": new / total,
        "efficacy": (new - old) / (rows - old),
        "output_difference": _difference(case),
        "kept_before_by_layer": {name: v[0] / v[3] for name, v in kept.items()},
        "kept_after_by_layer": {name: v[1] / v[3] for name, v in kept.items()},
        "efficacy_by_layer": {name: (v[1] - v[0]) / (v[2] - v[0]) for name, v in kept.items()},
    }


def _norms(case: Any) -> dict[str, Tensor]:
    return {name: x.square().sum(0).sqrt() for name, x in case.inputs(case.before, case.names).items()}


def _by_groups(scores: Tensor, step: Any) -> float:
    """Return the sum that the largest ``keep`` of every ``group`` neighbours have."""
    parts = scores.reshape(len(scores), -1, step.group).sort(-1, descending=True).values
    return float(parts[..., : step.keep].sum())


def _moved(case: Any, name: str, columns: Any) -> bool:
    """Return True if these columns of a layer are in another order; the order of its rows does not matter."""
    old, new = (case.weight(model, name).sort(0).values for model in (case.before, case.after))
    return not torch.equal(old[:, columns], new[:, columns])


def _difference(case: Any) -> float:
    inputs = topology.dummy_inputs(case.before)
    with torch.no_grad():
        old, new = (_main(model, inputs) for model in (case.before, case.after))
    return float((new - old).abs().max() / old.abs().max())


def _main(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    return out.logits if "logits" in out else out[0]


def nm_errors(case: Any, step: Any) -> dict[str, float]:
    """Return the error of pruning each layer alone, without ``compensate``: of its own output, or of the model's."""
    names = case.run.select(step.targets, step.skip)
    inputs = case.inputs(case.before, names)
    expected, errors = case.outputs(case.before), {}
    for name in names:
        weight = case.before.get_parameter(f"{name}.weight")
        dense, x = weight.detach().clone(), inputs[name]
        score = dense.abs() * (x.square().mean(0).sqrt().float() if step.score == "activation" else 1.0)
        groups = score.reshape(len(dense), -1, step.group)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(step.keep).indices, True)
        pruned = dense * kept.reshape(dense.shape)
        if step.sensitivity == "layer":
            change, old = ((value @ x.T).square().sum() for value in (pruned.double() - dense, dense.double()))
            errors[name] = float(change / old)
            continue
        with torch.no_grad():
            weight.copy_(pruned)
            found = case.outputs(case.before)
            weight.copy_(dense)
        errors[name] = sum(_divergence(a, b) for a, b in zip(expected, found, strict=True))
    return errors


def _divergence(old: Tensor, new: Tensor) -> float:
    p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
