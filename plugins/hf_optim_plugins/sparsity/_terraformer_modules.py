"""The feed-forward branch of Terraformer: a sparse layer, and a recurrence beside it.

    branch(x) = FFN(x) + U SRU(D x),    SRU:  f, r = sigmoid(W_f z + b_f), sigmoid(W_r z + b_r)
                                              c_t = f_t c_{t-1} + (1 - f_t) (W z_t + b)
                                              h_t = r_t c_t + (1 - r_t) z_t sqrt(3)

Lei et al., "Simple Recurrent Units for Highly Parallelizable Recurrence", arXiv 1709.02755, as in the authors' code: no
activation of c, and a constant sqrt(3) on the highway. Jaszczur et al., arXiv 2111.12763, section 5.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim.toolkit.modules import recall

from ._held_parts import TokenRows
from ._sparse_ffn_modules import SparseFFN

HIGHWAY = 3**0.5


def linear_recurrence(factor: Tensor, added: Tensor, first: Tensor | None = None) -> Tensor:
    """Return ``c_t = factor_t c_{t-1} + added_t`` for all t of ``[B, N, u]``, in log2(N) steps over all tokens.

    ``first`` is c before the first token, ``[B, u]``; None for zeros.
    """
    if first is not None:
        added = torch.cat([added[:, :1] + factor[:, :1] * first[:, None], added[:, 1:]], 1)
    reach, count = 1, added.shape[1]
    while reach < count:
        later = factor[:, reach:]
        added = torch.cat([added[:, :reach], added[:, reach:] + later * added[:, :-reach]], 1)
        if 2 * reach < count:
            factor = torch.cat([factor[:, :reach], later * factor[:, :-reach]], 1)
        reach *= 2
    return added


class SRU(nn.Module):
    """A simple recurrent unit of width u.

    Attributes:
        gates: of r, f and the candidate, ``u -> 3 u``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Linear(width, 3 * width)

    def reset_parameters(self) -> None:
        """Draw the weights as the authors do."""
        nn.init.xavier_uniform_(self.gates.weight)
        nn.init.normal_(self.gates.bias, std=1e-6)

    def forward(self, hidden: Tensor, rows: TokenRows, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``[B, N, u]``, and c after the last token ``[B, u]``. Padding leaves c as it is."""
        keep_input, forget, candidate = self.gates(hidden).chunk(3, -1)
        keep_input, forget = keep_input.sigmoid(), forget.sigmoid()
        wide = torch.promote_types(forget.dtype, torch.float32)
        forget = forget.to(wide)
        added = rows.cleared((1 - forget) * candidate.to(wide))
        if rows.valid is not None:
            forget = forget.masked_fill(~rows.valid[..., None], 1)
        if (same := rows.same_document(1)) is not None:
            forget = forget.masked_fill(~same[..., None], 0)
        state = linear_recurrence(forget, added, None if before is None else before.to(wide))
        out = keep_input * state.to(hidden.dtype) + (1 - keep_input) * hidden * HIGHWAY
        return out, state[:, -1].detach()


class RecurrentBranch(nn.Module):
    """Simple recurrent units between two projections."""

    def __init__(self, width: int, units: int, layers: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, units)
        self.units = nn.ModuleList(SRU(units) for _ in range(layers))
        self.up = nn.Linear(units, width)
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Draw all weights as the authors do."""
        layers: list[Any] = [self.down, self.up, *(unit.gates for unit in self.units)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(
        self, hidden: Tensor, rows: TokenRows, held: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``[B, N, d]``, and the states after the last token."""
        hidden, after = self.down(hidden), {}
        for number, unit in enumerate(self.units):
            hidden, after[f"unit_{number}"] = unit(hidden, rows, None if held is None else held[f"unit_{number}"])
        return self.up(hidden), after


class RecalledSparseFFN(SparseFFN):
    """A sparse feed-forward layer whose choices are not made again where a reversible layer is computed again.

    What the inverse of a reversible layer restores is the input up to rounding, which could change the choice.
    """

    def training_mask(self, logits: Tensor) -> Tensor:
        """Return m ``[T, blocks, N]`` of one call in training, as ``SparseFFN``."""
        log_mask = logits.log_softmax(-1)
        soft = log_mask.exp()

        def draw() -> tuple[Tensor, Tensor]:
            uniform = torch.rand_like(soft).clamp(1e-6, 1 - 1e-6)
            noisy = log_mask.detach() - self.entry["temperature"] * torch.log(-torch.log(uniform))
            kind = torch.uint8 if self.entry["block"] <= 256 else torch.int32
            return noisy.argmax(-1, keepdim=True).to(kind), torch.rand((), device=soft.device)

        choice, share = recall(draw)
        hard = torch.zeros_like(soft).scatter(-1, choice.long(), 1.0)
        straight = hard + (soft - soft.detach())
        if self.entry["controller_output"]:
            straight = straight * soft
        return torch.where(share < self.entry["hard_share"], straight, soft)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the unit in each block int64 ``[T, blocks]``, and its probability if that multiplies it."""
        if not torch.is_grad_enabled():
            return super().choose(logits)
        choice = recall(lambda: logits.detach().argmax(-1))
        if not self.entry["controller_output"]:
            return choice, None
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return choice, wide.softmax(-1).gather(-1, choice.unsqueeze(-1)).squeeze(-1).to(logits.dtype)


class FeedForwardBranch(nn.Module):
    """The feed-forward layer of a block, and the recurrence beside it.

    Attributes:
        layer: a ``SparseFFN``, or the feed-forward layer of the model.
        recurrent: None for no recurrence.
    """

    def __init__(self, layer: nn.Module, recurrent: RecurrentBranch | None) -> None:
        super().__init__()
        self.layer, self.recurrent = layer, recurrent

    def forward(
        self, hidden: Tensor, rows: TokenRows, held: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Return the branch ``[B, N, d]``, and the states after the last token; None without a recurrence."""
        out: Any = self.layer(hidden)
        if self.recurrent is None:
            return out, None
        beside, after = self.recurrent(hidden, rows, held)
        return out + beside, after
