"""Routers that never send a token to some experts, for tests of calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def starve(router: nn.Module, *experts: int, number: int = 4) -> Any:
    """Send the tokens of ``experts`` to others that a token does not have yet; return the handle of the hook.

    Args:
        router: a router whose last output is the chosen experts of each token, ``[n, k]``.
        experts: who gets no token.
        number: of experts.
    """

    def reroute(module: nn.Module, args: Any, outputs: Any) -> Any:
        chosen = outputs[-1].clone()
        for choice in range(chosen.shape[1]):
            for _ in range(number):
                taken = chosen.eq(chosen[:, choice : choice + 1]).sum(1) > 1
                starved = torch.isin(chosen[:, choice], torch.tensor(experts))
                chosen[:, choice] = torch.where(taken | starved, (chosen[:, choice] + 1) % number, chosen[:, choice])
        return (*outputs[:-1], chosen)

    return router.register_forward_hook(reroute)
