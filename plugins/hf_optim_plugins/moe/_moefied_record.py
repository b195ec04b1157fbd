"""What moefication puts on the record and the card, and the same numbers recomputed for the conformance suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_optim import Reload

if TYPE_CHECKING:
    from hf_optim import Card

MOST = 0.95  # of the magnitude of a token's activations
Figures = dict[str, dict[str, Any]]


def activity(mass: Tensor) -> dict[str, float]:
    """Return how sparse activations are, from magnitudes ``[T, neurons]``.

    ``zeros``: the share that is exactly zero. ``neurons_for_95``: the smallest share of a token's neurons that carries
    95 % of its magnitude, mean over tokens.
    """
    ordered = mass.double().sort(dim=1, descending=True).values.cumsum(1)
    needed = (ordered < MOST * ordered[:, -1:]).sum(1) + 1
    return {
        "zeros": round(float((mass == 0).double().mean()), 6),
        "neurons_for_95": round(float(needed.double().mean()) / mass.shape[1], 6),
    }


def totals(layers: Figures) -> dict[str, Any]:
    """Return parameters of all divided layers, those a token reads, and means over the layers."""
    parameters, computed = (sum(own[key] for own in layers.values()) for key in ("parameters", "computed"))
    keys = ("covered", "covered_at_best", "zeros", "neurons_for_95")
    return {
        "feed_forward_parameters": parameters,
        "computed_parameters": computed,
        "computed_share": round(computed / parameters, 6),
        **{key: round(sum(own[key] for own in layers.values()) / len(layers), 6) for key in keys},
    }


@torch.no_grad()
def recompute(case: Any) -> dict[str, Any]:
    """Return what the step reports, from the experts in the checkpoint and inputs of the dense model."""
    entries = case.config["moefication"]["modules"]
    divided = {name: entry for name, entry in entries.items() if "experts" in entry}
    inputs = case.inputs(case.before, {entry["inlets"][0] for entry in divided.values()})
    dense = dict(case.before.named_parameters())
    layers: Figures = {}
    for name, entry in divided.items():
        ffn = case.after.double().get_submodule(name)
        x = inputs[entry["inlets"][0]]
        experts, active = entry["experts"], entry["active"]
        per_neuron = torch.stack([ffn.experts.neurons(x, e).abs() for e in range(experts)], 1)  # [T, E, neurons]
        mass = per_neuron.sum(2)
        chosen = ffn.router(x).topk(active, dim=-1).indices
        best = mass.sort(dim=-1, descending=True).values[:, :active]
        flat = per_neuron.flatten(1).sort(dim=1, descending=True).values
        reached = flat.cumsum(1) >= MOST * flat.sum(1, keepdim=True)
        own = {n for n in dense if n.rpartition(".")[0] in {name, *entry["inlets"]}}
        matrices = sum(p.numel() for p in ffn.experts.parameters()) * active // experts
        extra = [*ffn.router.parameters()] if active < experts else []
        extra += [] if ffn.bias is None else [ffn.bias]
        parameters, computed = sum(dense[n].numel() for n in own), matrices + sum(p.numel() for p in extra)
        layers[name] = {
            "experts": experts,
            "active": active,
            "tokens": len(x),
            "zeros": float((per_neuron == 0).double().mean()),
            "neurons_for_95": float((reached.double().argmax(1) + 1).double().mean()) / flat.shape[1],
            "covered": float(mass.gather(1, chosen).sum() / mass.sum()),
            "covered_at_best": float(best.sum() / mass.sum()),
            "unused": experts - len(set(chosen.flatten().tolist())),
            "parameters": parameters,
            "computed": computed,
            "share": computed / parameters,
        }
    return {"layers": layers, **totals(layers)}


def write(figures: dict[str, Any], card: Card) -> None:
    """Write the paragraph and the table of the card."""
    layers: Figures = figures.get("layers") or {}
    if not layers:
        return
    own = card.when(
        "Its code comes with the checkpoint (`trust_remote_code=True`); the experts run on any experts implementation "
        "of transformers.",
        reload=[Reload.REMOTE_CODE],
    )
    card.paragraph(
        "MoEfication",
        f"The neurons of {len(layers)} feed-forward layers were divided into experts. Of the "
        f"{figures['feed_forward_parameters']:,} parameters of these layers a token reads "
        f"{figures['computed_parameters']:,} ({100 * figures['computed_share']:.1f} %, routers included). "
        f"On the calibration data the chosen experts held {100 * figures['covered']:.1f} % of the magnitude of the "
        f"activations; the best choice would hold {100 * figures['covered_at_best']:.1f} %. How well that works "
        f"depends on how sparse activations are: {100 * figures['zeros']:.1f} % were exactly zero, and "
        f"{100 * figures['neurons_for_95']:.1f} % of the neurons carried 95 % of the magnitude.{own}",
    )
    card.table(
        "Divided feed-forward layers",
        ["layer", "activation", "experts", "active", "zeros %", "neurons for 95 %", "covered %", "at best %", "unused"],
        [
            [f"`{name}`", own["activation"], own["experts"], own["active"], f"{100 * own['zeros']:.1f}",
             f"{100 * own['neurons_for_95']:.1f}", f"{100 * own['covered']:.1f}",
             f"{100 * own['covered_at_best']:.1f}", own["unused"]]
            for name, own in sorted(layers.items())
        ],
    )  # fmt: skip
