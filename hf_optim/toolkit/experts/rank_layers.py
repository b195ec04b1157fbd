"""Mixture layers across ranks: ``EPImplementation`` classes for the expert parallelism of transformers (from 5.23 on).

transformers shards the experts over a mesh, replaces the forward of each module of experts, and calls there the class
that ``DistributedConfig.ep_implementation`` names. These classes exist only if transformers has that registry.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..distributed.grid import ORDERS, Grid, grid_of
from .adaptive_layer import run_adaptive
from .capped_layer import layer_of
from .choices import Choices, ways_of
from .exchange import exchange_experts
from .exchange_settings import ADAPTIVE, HIERARCHICAL, Exchange

SETTING = "_hf_optim_exchange"


def setting_of(module: Any, kind: str) -> Exchange:
    """Return the setting of a module of experts; defaults if it has none."""
    found = vars(module).get(SETTING)
    return found if found is not None and found.kind == kind else Exchange(kind=kind)


@functools.cache
def implementations() -> dict[str, Any]:
    """Return the classes by kind of setting; empty if transformers has no registry."""
    parallel = compat.expert_parallel()
    if parallel is None:
        return {}

    class RankLayer(parallel.EPImplementation):  # type: ignore[name-defined, misc]
        """One module of experts on this rank."""

        kind = HIERARCHICAL

        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.module = experts
            self.setting = setting_of(experts, self.kind)
            self.experts = self.num_local_experts * ep_mesh.size()
            self.start()

        def start(self) -> None:
            """Make the sub-groups, once for all layers."""
            self.grid: Grid = self.grid_for(self.setting.order)

        def grid_for(self, order: str) -> Grid:
            return grid_of(self.ep_mesh.get_group(), order, self.setting.ranks_per_node, self.setting.timeout)

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            layer = layer_of(self.module)
            if layer is not None:
                # The sender sees all gates of its tokens, so that a capacity of its batch can be kept here.
                plan = layer.plan_for_all(self.module, hidden_states, top_k_index, top_k_weights, self.experts)
                top_k_index, top_k_weights = plan.experts, plan.weights
            rows = hidden_states.shape[0]
            if self.tp_mesh.size() == 1:
                return self.compute(hidden_states, top_k_index, top_k_weights)
            # The ranks of a tensor-parallel group have one batch: each takes a slice, and the results are gathered.
            own = [_own_slice(part, self.tp_mesh) for part in (hidden_states, top_k_index, top_k_weights)]
            return _whole(self.compute(*own), rows, self.tp_mesh)

        def compute(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            """Return the output for tokens that only this rank has: ``[T, d]``, ``[T, k]``, ``[T, k]``."""
            return exchange_experts(hidden, index, weights, self.experts_forward, self.num_local_experts, self.grid)

        def report(self) -> dict[str, Any]:
            """Return how tokens are exchanged, for ``expert_exchange``."""
            return {"kind": self.kind, **shape_report(self.grid)}

    class AdaptiveLayer(RankLayer):
        """One module of experts on this rank, run in the fastest of several ways."""

        kind = ADAPTIVE

        def start(self) -> None:
            self.grids = {grid.order: grid for grid in map(self.grid_for, ORDERS)}
            self.grid = self.grids["flat"]
            ways = ways_of(self.setting.parallelism, tuple(self.grids), self.setting.degrees)
            self.choices = Choices(ways, self.setting.trials, self.grid)

        def compute(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return run_adaptive(self, hidden, index, weights)

        def report(self) -> dict[str, Any]:
            ways = [str(way) for way in self.choices.ways]
            return {"kind": self.kind, **shape_report(self.grid), "ways": ways, "choices": self.choices.report()}

    return {HIERARCHICAL: RankLayer, ADAPTIVE: AdaptiveLayer}


def shape_report(grid: Grid) -> dict[str, Any]:
    """Return the shape of a grid and the messages that a rank sends in one exchange."""
    return {
        "nodes": grid.nodes,
        "ranks_per_node": grid.local,
        "order": grid.order,
        "messages": grid.messages,
    }


def _own_slice(tensor: Tensor, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return whole.redistribute(mesh, [Shard(0)]).to_local()


def _whole(part: Tensor, rows: int, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    width = part.shape[1]
    spread = DTensor.from_local(part.contiguous(), mesh, [Shard(0)], shape=torch.Size((rows, width)), stride=(width, 1))
    return spread.full_tensor()
