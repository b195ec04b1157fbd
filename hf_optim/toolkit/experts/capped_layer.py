"""One mixture layer with a capacity: from what its router chose to the plan of what is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ..topology import valid_rows
from .capacity import capacity, is_dropless
from .plan import Plan, count_pairs, renormalized, slot_positions
from .routing import Routing
from .tokens import BatchTokens

LAYER = "_hf_optim_capped"


class CappedLayer:
    """The settings and the counts of one module of experts.

    Attributes:
        name: of the module in its model.
        routing: the settings.
        tokens: where the part of the model around it notes its batch.
        experts: how many experts the layer has on all ranks.
        top_k: how many of them a token chooses, as the router states it; None if it states nothing.
        counts: int64 ``[2, E]``: chosen, and dropped of these, for each expert of this rank; after ``plan_for_all``,
            for each expert of all ranks, of the tokens of this rank.
        planned_before: the capacity is applied by the ranks that send tokens, and not to what arrives.
    """

    def __init__(
        self, name: str, routing: Routing, tokens: BatchTokens, experts: int, top_k: int | None, counts: Tensor
    ) -> None:
        self.name, self.routing, self.tokens = name, routing, tokens
        self.experts, self.top_k, self.counts = experts, top_k, counts
        self.planned_before = False

    def plan(self, module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Plan:
        """Return what is computed. hidden ``[T, d]``, chosen int64 ``[T, k]``, weights ``[T, k]``."""
        own = module.num_experts
        return self._plan(
            module, hidden, chosen, weights, own, getattr(module, "_is_expert_parallel", own < self.experts)
        )

    def plan_for_all(self, module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, experts: int) -> Plan:
        """Return what is computed of tokens whose choices among all ``experts`` this rank has, before an exchange.

        From then on the experts of this rank compute whatever the exchange brings them; see ``planned_before``.
        """
        if self.counts.shape[1] != experts:
            with torch.inference_mode(False):
                self.counts = torch.zeros(2, experts, dtype=torch.int64, device=chosen.device)
        self.planned_before, self.experts = True, experts
        return self._plan(module, hidden, chosen, weights, experts, split=False)

    def _plan(self, module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, own: int, split: bool) -> Plan:
        routing = self.routing
        top_k = self._require_whole_batch(chosen, split)
        real = self._real_rows(module, hidden)
        counted = chosen < own
        if real is not None:
            counted = counted & real[:, None]
        if self.counts.device != chosen.device:
            with torch.inference_mode(False):
                self.counts = self.counts.to(chosen.device)
        factor = routing.factor(module.training)
        if len(chosen) <= routing.min_slots or is_dropless(routing.rounding, factor, top_k, self.experts):
            count_pairs(self.counts, chosen, counted, None)
            return Plan(chosen, weights, not split)
        groups, sizes = self._groups(chosen, real)
        slots = capacity(routing.rounding, factor, sizes, top_k, self.experts).clamp(min=routing.min_slots)
        slots = torch.where(sizes < routing.dropless_below, sizes, slots)
        positions = slot_positions(
            chosen,
            counted,
            own,
            groups=groups,
            choices=None if split else weights,
            priority=self._priority(weights),
        )
        limit = slots[:, None] if groups is None else slots[groups][:, None]
        kept = counted & (positions < limit)
        count_pairs(self.counts, chosen, counted, kept)
        left = renormalized(weights, kept) if routing.renormalize else torch.where(kept, weights, 0)
        return Plan(torch.where(kept, chosen, own), left, False)

    def _require_whole_batch(self, chosen: Tensor, split: bool) -> int:
        """Return k. Raises ``ModelError`` if this rank does not see what the capacity depends on."""
        top_k = int(chosen.shape[1])
        if not split:
            return top_k
        rest = "use ep_implementation='all_reduce' with first-come slots, or remove the capacity (hf_optim.restore)"
        if (self.top_k is not None and top_k != self.top_k) or self._is_part(chosen):
            raise ModelError(
                f"{self.name}: this exchange between ranks brings experts single pairs of tokens, so a capacity of the "
                f"batch cannot be kept; {rest}"
            )
        if self.routing.priority != "position" or self.routing.renormalize:
            what = "a priority" if self.routing.priority != "position" else "renormalization"
            raise ModelError(
                f"{self.name}: {what} needs all gates of a token, and each rank of expert parallelism sees only those "
                f"of its own experts; {rest}"
            )
        return top_k

    def _is_part(self, chosen: Tensor) -> bool:
        shape = self.tokens.shape
        return shape is not None and shape[0] * shape[1] != len(chosen)

    def _real_rows(self, module: Any, hidden: Tensor) -> Tensor | None:
        """Return bool ``[T]``, True for tokens; None if all are. Raises ``ModelError`` if it cannot be told."""
        batch = None if torch.compiler.is_compiling() else valid_rows.current()
        if batch is not None:  # calibration may run a block by itself
            mask = batch.mask_of(module, hidden)
            return None if mask is None else mask.reshape(-1).to(hidden.device)
        real = self.tokens.real
        if real is None:
            return None
        if real.numel() != len(hidden):
            if bool(real.all()):
                return None
            raise ModelError(
                f"{self.name} gets {len(hidden)} of the {real.numel()} positions of the batch, so padding cannot be "
                "told from tokens: pass batches without padding, or remove the capacity (hf_optim.restore)"
            )
        return real.reshape(-1).to(hidden.device)

    def _groups(self, chosen: Tensor, real: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Return the group of each token, int64 ``[T]`` (None if there is one), and the tokens of each, ``[G]``."""
        count = len(chosen)
        if self.routing.group == "batch":
            return None, torch.full((1,), count, device=chosen.device) if real is None else real.sum().view(1)
        if self.tokens.shape is None or self._is_part(chosen):
            raise ModelError(
                f"{self.name}: the sequences of the batch are unknown to its experts, which get {count} tokens: set "
                "group: batch"
            )
        rows, positions = self.tokens.shape
        groups = torch.arange(rows, device=chosen.device).repeat_interleave(positions, output_size=count)
        if real is None:
            return groups, torch.full((rows,), positions, device=chosen.device)
        return groups, real.view(rows, positions).sum(1)

    def _priority(self, weights: Tensor) -> Tensor | None:
        if self.routing.priority == "position":
            return None
        gates = weights.detach()
        return gates.amax(1) if self.routing.priority == "top1" else gates.sum(1)


def layer_of(module: nn.Module) -> CappedLayer | None:
    """Return what is kept for a module of experts with a capacity, or None for another module."""
    return vars(module).get(LAYER)
