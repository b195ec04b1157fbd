"""How often each expert was chosen, and how often it had no slot left: counted on the device, without waiting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .capped_layer import layer_of


@dataclass(frozen=True)
class ExpertLoad:
    """The load of the experts of one layer since the counts were last set to zero.

    Attributes:
        chosen: for each expert, how many tokens chose it. Padding does not count.
        dropped: for each expert, how many of these it did not compute.
    """

    chosen: tuple[int, ...]
    dropped: tuple[int, ...]

    @property
    def dropped_share(self) -> float:
        """The pairs of token and expert that were not computed, as a share of all; 0 if there were none."""
        return sum(self.dropped) / max(1, sum(self.chosen))

    @property
    def dropped_shares(self) -> tuple[float, ...]:
        """``dropped_share`` of each expert."""
        return tuple(lost / max(1, all_) for lost, all_ in zip(self.dropped, self.chosen, strict=True))


def expert_load(model: nn.Module, reset: bool = False) -> dict[str, ExpertLoad]:
    """Return the load of each mixture layer that has a capacity, by the name of the module of its experts.

    It counts every forward in this process since the capacity was set, or since the last call with ``reset=True``;
    recomputed activations (gradient checkpointing) count again. Empty for a model without capacities.
    """
    found = {}
    for name, module in model.named_modules():
        layer = layer_of(module)
        if layer is None:
            continue
        found[name] = ExpertLoad(*(tuple(map(int, row)) for row in layer.counts.tolist()))
        if reset:
            layer.counts.zero_()
    return found


def dropped_share(loads: Iterable[ExpertLoad]) -> float:
    """Return the pairs of token and expert that several layers did not compute, as a share of all of theirs."""
    pairs = [(sum(load.dropped), sum(load.chosen)) for load in loads]
    return sum(dropped for dropped, _ in pairs) / max(1, sum(chosen for _, chosen in pairs))
