"""Removal of units and blocks from a model: the slices of its parameters, and the check of the smaller model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.modules import main_output, relative_difference, rounding_tolerance
from hf_optim.toolkit.pruning import shrink
from hf_optim.toolkit.statistics import importance
from hf_optim.toolkit.topology import NEURONS, PrunableGroups, dummy_inputs


def slicing(model: nn.Module, prunable: Sequence[PrunableGroups], kept_units: Mapping[str, Tensor]) -> shrink.Slicing:
    """Return the parts of parameters to keep, and the new numbers of the configuration, for units of one kind."""
    kept: dict[str, dict[int, Tensor]] = {}
    sizes: dict[int, int] = {}
    for units in prunable:
        n_keep = len(kept_units[units.consumer])
        sizes |= {len(units): n_keep, len(units) * units.query_heads: n_keep * units.query_heads}
        removed = _complement(kept_units[units.consumer], len(units))
        for name, (dim, entries) in units.entries.items():
            left = torch.ones(model.get_parameter(name).shape[dim], dtype=torch.bool)
            left[entries[removed].flatten()] = False
            kept.setdefault(name, {})[dim] = left.nonzero().flatten()
    return shrink.Slicing(kept, sizes, n_keep if units.kind == NEURONS else units.width)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest scores ``[n]``, ascending; of equal ones the lower index."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _complement(indices: Tensor, size: int) -> Tensor:
    """Return a bool mask ``[size]`` that is False at ``indices``."""
    return torch.ones(size, dtype=torch.bool).index_fill(0, indices, False)


def outputs_without(
    model: PreTrainedModel,
    prunable: Sequence[PrunableGroups],
    kept_units: Mapping[str, Tensor],
    removed_blocks: set[str],
) -> Tensor:
    """Return the outputs of the original model for dummy inputs, with the gates of all removed parts closed."""
    columns = {
        units.consumer: units.columns[_complement(kept_units[units.consumer], len(units))].flatten()
        for units in prunable
    }

    def gate(name: str, tensor: Tensor) -> Tensor | None:
        if name in removed_blocks:
            return tensor.new_zeros(())
        return tensor.new_ones(tensor.shape[-1]).index_fill(0, columns[name].to(tensor.device), 0.0)

    consumers = {name: model.get_submodule(name) for name in columns}
    with importance.apply_gates(consumers, {name: model.get_submodule(name) for name in removed_blocks}, gate):
        return main_output(model, dummy_inputs(model))


def require_equal(model: PreTrainedModel, expected: Tensor, label: str) -> None:
    """Raise ``ModelError`` unless the smaller model's outputs are those of the original one with closed gates."""
    found = main_output(model, dummy_inputs(model))
    gap = relative_difference(found, expected)
    if not gap <= rounding_tolerance(model):
        raise ModelError(
            f"{label}: the smaller {type(model).__name__} does not compute what the original one computes without the "
            f"removed parts (relative difference {gap:.1e}): something in it depends on their number. Load the model "
            "again, and remove parts of another kind"
        )
