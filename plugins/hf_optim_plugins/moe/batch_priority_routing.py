"""Batch priority routing: the slots of an expert go to the tokens with the largest gates, wherever they stand.

    order = argsort(-s),    s[t] = max over j of g[t, j]   or   s[t] = sum over j of g[t, j]

Slots are given out as with ``capacity_routing``, but to tokens in this order: first choices by priority, then second
choices by priority. Tokens of equal priority keep the order of their positions. So which tokens are computed does not
depend on how the batch is arranged, and at a small capacity the router decides what is left out.

Riquelme et al., "Scaling Vision with Sparse Mixture of Experts", arXiv 2106.05974, section 4.1 (V-MoE).

Differences: V-MoE orders by gates before the renormalization of the top k; here the gates are those that the model
weights its experts with. In a class that normalizes them to one (Mixtral; Qwen3-MoE with ``norm_topk_prob``) the
largest of them is the share of the first choice, and their sum is the same for every token: ``priority: sum`` is
refused there. Everything else (capacity, padding, decoding, storage, causality) is as with ``capacity_routing``.
"""

from __future__ import annotations

from typing import Literal

from hf_optim import ModelError, Paper, Reload, Run, hookimpl, option, technique

from ._capacity import CONTRACT, CapacityTechnique
from ._gates import gates_sum_to_a_constant


@technique(
    "batch_priority_routing",
    family="moe",
    paper=Paper("2106.05974", "Scaling Vision with Sparse Mixture of Experts", 2021),
    contract=CONTRACT,
    reload=Reload.STOCK_ARCH,
)
class BatchPriorityRouting(CapacityTechnique):
    """Limit the tokens that each expert computes to those with the largest gates.

    Attributes:
        capacity: the capacity factor C. From E / k on nothing is dropped.
        train_capacity: the factor in training mode; null is the same.
        priority: of a token: its largest gate (``top1``), or the sum of its k gates (``sum``).
        rounding: how C k T / E becomes a number of slots, as in ``capacity_routing``.
        group: the tokens that compete: those of the ``batch``, or of each ``sequence``.
        renormalize: scale the gates that are left of a token to the sum that all had.
        min_slots: the least capacity of an expert.
        dropless_below: groups with fewer tokens drop nothing.
        measure: count on calibration data what is dropped, for record and card. Without, the step needs no data.
    """

    capacity: float = option(0.5, above=0.0, high=1e4)
    train_capacity: float | None = option(None, above=0.0, high=1e4)
    priority: Literal["top1", "sum"] = "top1"
    rounding: Literal["round", "ceil", "floor", "vmoe", "tutel", "nllb"] = "round"
    group: Literal["batch", "sequence"] = "batch"
    renormalize: bool = False
    min_slots: int = option(1, low=1, high=2**31 - 1)
    dropless_below: int = option(0, low=0, high=2**31 - 1)
    measure: bool = True

    @hookimpl
    def transform_model(self, run: Run) -> None:
        if self.priority == "sum" and gates_sum_to_a_constant(run.model, run.label(self)):
            raise ModelError(
                f"{run.label(self)}: {type(run.model).__name__} normalizes the gates of the chosen experts, so their "
                "sum is the same for every token and gives no order; set priority: top1"
            )
        super().transform_model(run)


@hookimpl
def register_techniques(register) -> None:
    register(BatchPriorityRouting)
