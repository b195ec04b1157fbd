"""What sparse_ffn puts on the record and the card, and the same numbers recomputed for the conformance suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_optim import Reload

from ._sparse_ffn_controller import Units, contributions, kept_share

if TYPE_CHECKING:
    from hf_optim import Card

Figures = dict[str, dict[str, Any]]
KEPT, AGREES = "kept", "agrees"


def computed_numbers(ffn: Any) -> int:
    """Return the parameters that one token reads in a ``SparseFFN``, its controller included."""
    own = ffn.entry
    columns = own["width"] * (1 + own["gated"]) + own["out"]
    vectors = own["bias"] * (1 + own["gated"])
    controller = sum(
        part.numel() for part in (ffn.controller_in, ffn.controller_out, ffn.controller_bias) if part is not None
    )
    rest = own["out"] if own["out_bias"] else 0
    return own["neurons"] // own["block"] * (columns + vectors) + controller + rest


@torch.no_grad()
def choice_figures(ffn: Any, x: Tensor) -> dict[str, float]:
    """Return how well the controller of a layer with float weights picks, for its inputs ``x`` ``[T, in]``.

    ``kept``: the share of the units' contributions in those that it picks; ``kept_at_best``: in the largest of each
    block; ``agrees``: the share of blocks in which it picks the largest; ``zeros``: of contributions that are zero.
    """
    gate = (ffn.gate, ffn.gate_bias) if ffn.entry["gated"] else None
    mass = contributions(x, Units((ffn.up, ffn.up_bias), gate, ffn.down), ffn.act_fn)
    mass = mass.view(len(x), -1, ffn.entry["block"])
    choice = ffn.logits(x).argmax(-1)
    # Where all units of a block are zero, none of them is the one to pick.
    largest = mass.gather(-1, choice.unsqueeze(-1)).squeeze(-1) >= mass.amax(-1)
    return {
        KEPT: round(kept_share(mass, choice), 6),
        "kept_at_best": round(kept_share(mass, mass.argmax(-1)), 6),
        AGREES: round(float(largest.double().mean()), 6),
        "zeros": round(float((mass == 0).double().mean()), 6),
    }


def totals(layers: Figures) -> dict[str, Any]:
    """Return the parameters of all sparse layers and those that a token reads, and means over the layers."""
    parameters, computed = (sum(own[key] for own in layers.values()) for key in ("parameters", "computed"))
    found = {
        "feed_forward_parameters": parameters,
        "computed_parameters": computed,
        "computed_share": round(computed / parameters, 6),
    }
    for key in (KEPT, "kept_at_best", AGREES, "zeros"):
        if all(key in own for own in layers.values()):
            found[key] = round(sum(own[key] for own in layers.values()) / len(layers), 6)
    return found


@torch.no_grad()
def recompute(case: Any, chosen: bool) -> dict[str, Any]:
    """Return what the step reports, from the checkpoint and inputs of the dense model.

    ``chosen``: the controllers were trained on the calibration data.
    """
    entries = {n: own for n, own in case.config["sparse_ffn"]["modules"].items() if "block" in own}
    inputs = case.inputs(case.before, {own["inlets"][0] for own in entries.values()}) if chosen else {}
    dense = dict(case.before.named_parameters())
    layers: Figures = {}
    for name, entry in entries.items():
        ffn = case.after.double().get_submodule(name)
        own = {n for n in dense if n.rpartition(".")[0] in {name, *entry["inlets"]}}
        layers[name] = {
            "units": entry["neurons"],
            "block": entry["block"],
            "rank": entry["rank"],
            "bits": entry["bits"],
            "parameters": sum(dense[n].numel() for n in own),
            "computed": computed_numbers(ffn),
        }
        if chosen and entry["block"] > 1:
            x = inputs[entry["inlets"][0]]
            layers[name] |= {"tokens": len(x), **choice_figures(ffn, x)}
    return {"layers": layers, **totals(layers)}


def write(figures: dict[str, Any], card: Card) -> None:
    """Write the paragraph and the table of the card."""
    layers: Figures = figures.get("layers") or {}
    if not layers:
        return
    own = card.when(
        "Its code comes with the checkpoint (`trust_remote_code=True`).",
        reload=[Reload.REMOTE_CODE],
    )
    chosen = ""
    if KEPT in figures:
        chosen = (
            f" Before any training, the picked units held {100 * figures[KEPT]:.1f} % of what the dense layers' units "
            f"contribute on the calibration data; the largest unit of each block held "
            f"{100 * figures['kept_at_best']:.1f} %, and {100 * figures['zeros']:.1f} % of the units were exactly zero."
        )
    card.paragraph(
        "Sparse feed-forward layers",
        f"In {len(layers)} feed-forward layers a controller picks one unit of each block. Of "
        f"{figures['feed_forward_parameters']:,} parameters of the dense layers a token reads "
        f"{figures['computed_parameters']:,} ({100 * figures['computed_share']:.1f} %), controllers "
        f"included.{chosen}{own}",
    )
    shown = [("units", "units"), ("block", "of a block"), ("rank", "rank"), ("bits", "bits"), ("computed", "read")]
    rows = [
        [f"`{name}`", *(one[key] for key, _ in shown)]
        + [f"{100 * one[key]:.1f}" if key in one else "" for key in (KEPT, "kept_at_best", AGREES)]
        for name, one in sorted(layers.items())
    ]
    titles = ["layer", *(title for _, title in shown), "kept %", "at best %", "picks the largest %"]
    card.table("Sparse feed-forward layers", titles, rows)
