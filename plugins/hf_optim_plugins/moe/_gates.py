"""What the routers of a model do with the gates of the chosen experts, found by running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_optim.toolkit.experts import require_routable
from hf_optim.toolkit.modules import eval_mode
from hf_optim.toolkit.topology import dummy_inputs

TOLERANCE = 1e-2
"""Relative: sums of gates in 16 bits differ by less if they are the same number."""


def gates_sum_to_a_constant(model: PreTrainedModel, label: str) -> bool:
    """Return True if the gates of a token have the same sum for every token, in every layer, on a dummy input."""
    sums: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        sums.append(args[2].detach().double().sum(1))

    handles = [experts.register_forward_pre_hook(keep) for experts in require_routable(model, label).values()]
    try:
        with eval_mode(model), torch.no_grad():
            model(**dummy_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    return bool(sums) and all(float(s.max() - s.min()) <= TOLERANCE * float(s.abs().max()) for s in sums)
