"""Sample the tokens that reach a mixture of experts, to calibrate experts that see too few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributed import collectives
from ..topology.experts import ExpertLinear, matrix_names
from .observers import GramMatrix, InputObserver


class TokenSample(InputObserver[Tensor]):
    """A sample of the tokens that a mixture reads, evenly spread over the data: stack name -> ``[n, H]``.

    It has between ``size`` and ``2 * size`` tokens where there are as many: all tokens are kept until there are more
    than ``2 * size``, then every second one, then every fourth, and so on. No random numbers are drawn.

    Args:
        layers: of which the ``ExpertLinear`` count; their stacks are watched.
        label: see ``InputObserver``.
        size: None takes the largest number of inputs that a matrix of the stack has.
    """

    def __init__(self, layers: Mapping[str, Any], label: str = "", size: int | None = None) -> None:
        views = [layer for layer in layers.values() if isinstance(layer, ExpertLinear)]
        super().__init__({view.experts_name: view.experts for view in views}, label)
        self.sizes = {view.experts_name: size or 1 for view in views}
        for view in views if size is None else ():
            self.sizes[view.experts_name] = max(self.sizes[view.experts_name], view.in_features)
        self._steps = dict.fromkeys(self.modules, 1)
        self._passed = dict.fromkeys(self.modules, 0)

    def update(self, name: str, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        first = -self._passed[name] % self._steps[name]
        self._passed[name] += len(rows)
        taken = rows[first :: self._steps[name]]
        self.check_finite(name, taken)
        kept = torch.cat([self.found[name], taken]) if name in self.found else taken.clone()
        while len(kept) > 2 * self.sizes[name]:
            kept = kept[::2].clone()
            self._steps[name] *= 2
        self.found[name] = kept

    def reduce(self) -> None:
        """The samples of all ranks one after another, thinned out again."""
        for name, stack in self.modules.items():
            mine = self.found.pop(name, None)
            lengths = torch.zeros(collectives.world_size(), dtype=torch.long)
            lengths[collectives.rank()] = 0 if mine is None else len(mine)
            begin = int(collectives.all_reduce_(lengths, "sum")[: collectives.rank()].sum())
            width = ExpertLinear(stack, name, matrix_names(stack)[0], 0).in_features
            joined = torch.zeros(int(lengths.sum()), width, device=self.device)
            if mine is not None:
                joined[begin : begin + len(mine)] = mine.float()
            collectives.all_reduce_(joined, "sum")
            while len(joined) > 2 * self.sizes[name]:
                joined = joined[::2].clone()
            if len(joined):
                self.found[name] = joined.to(next(stack.parameters()).dtype)


@torch.no_grad()
def augment_undersampled(
    layers: Mapping[str, Any], moments: dict[str, GramMatrix], sample: Mapping[str, Tensor]
) -> dict[str, int]:
    r"""Give experts that saw too few tokens the tokens of their layer, in place.

    Fewer tokens than a matrix has inputs leave its second moment singular. With ``n_e`` tokens seen, ``n =
    in_features`` and the layer's tokens ``T`` (a sample, most of which the router sent elsewhere)::

        X_eᵀX_e  +  (n - n_e) / |T| · X_e(T)ᵀ X_e(T)

    takes the place of ``X_eᵀX_e``: as if the expert had seen ``n - n_e`` more tokens, average ones of its layer.
    ``X_e(T)`` is what the matrix reads for these tokens; for ``down_proj`` that goes through the expert's own first
    matrix. An expert that saw no token at all is calibrated on those alone.

    Args:
        layers: name -> layer; only ``ExpertLinear`` are looked at.
        moments: what ``SecondMoment`` found for them; changed in place.
        sample: what ``TokenSample`` found.

    Returns:
        Name -> tokens that it saw, of the matrices that saw fewer than they have inputs.
    """
    scarce = {}
    dtypes = {moment.total.dtype for moment in moments.values()}
    for name, layer in layers.items():
        if not isinstance(layer, ExpertLinear) or layer.experts_name not in sample:
            continue
        moment = moments.get(name)
        seen = moment.count if moment is not None else 0
        if seen >= layer.in_features:
            continue
        rows = layer.inputs_for(sample[layer.experts_name]).to(dtypes.copy().pop() if dtypes else torch.float32)
        more = (rows.T @ rows) * ((layer.in_features - seen) / len(rows))
        total = more if moment is None else moment.total + more
        moments[name] = GramMatrix(total, layer.in_features, [name])
        scarce[name] = seen
    return scarce
