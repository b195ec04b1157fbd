"""Where scales can be moved out of the inputs of linear layers: into a norm, or into the linear layer before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_optim import Run, Scope
from hf_optim.toolkit import topology
from hf_optim.toolkit.topology import LinearPair, NormGroup

SHARED = "the norm that feeds it also feeds something that is not a linear layer (a residual sum, a router, experts)"
APART = "it shares its norm with layers that are not selected or lie in another block"
UNFED = "neither a norm nor a scalable layer feeds it alone"


@dataclass(frozen=True)
class Plan:
    """The norm groups and pairs of a scope that take a scale. One linear of a group is observed: all read one input."""

    groups: tuple[NormGroup, ...]
    pairs: tuple[LinearPair, ...]
    skipped: dict[str, set[str]]

    @property
    def observed(self) -> dict[str, nn.Module]:
        """The linears whose inputs are observed, by name."""
        readers = {name: module for group in self.groups for name, module in [next(iter(group.linears.items()))]}
        return readers | {pair.consumer: pair.consumer_module for pair in self.pairs}


def wiring(step: Any, run: Run, scope: Scope) -> tuple[list[NormGroup], list[LinearPair]]:
    """Return the norm groups and scalable pairs of a scope. The model is traced once, at a step's first scope."""
    state = run.state(step)
    if getattr(state, "model", None) is not scope.model:
        trace = topology.trace(scope.model)
        state.model = scope.model
        state.groups = topology.find_norm_groups(trace)
        state.pairs = [pair for pair in topology.find_linear_pairs(trace) if pair.scalable]
    groups = [group for group in state.groups if any(scope.holds(name) for name in group.linears)]
    return groups, [pair for pair in state.pairs if scope.holds(pair.producer) and scope.holds(pair.consumer)]


def make_plan(selected: dict[str, nn.Module], groups: Iterable[NormGroup], pairs: Iterable[LinearPair]) -> Plan:
    """Select the norm groups and pairs that take a scale, and give the reasons why other selected linears do not."""
    taken = tuple(pair for pair in pairs if pair.consumer in selected and pair.producer in selected)
    usable: list[NormGroup] = []
    skipped: dict[str, set[str]] = {}
    for group in groups:
        inside = set(group.linears) & set(selected)
        if not inside:
            continue
        if not group.exclusive:
            skipped.setdefault(SHARED, set()).update(inside)
        elif inside != set(group.linears):
            skipped.setdefault(APART, set()).update(inside)
        else:
            usable.append(group)
    done = {name for group in usable for name in group.linears} | {pair.consumer for pair in taken}
    explained = done.union(*skipped.values())
    if rest := set(selected) - explained:
        skipped[UNFED] = rest
    return Plan(tuple(usable), taken, {reason: names - done for reason, names in skipped.items() if names - done})
