"""In which order the channels of one model's residual stream stand in another model that came from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of the embedding that are compared: more tell nothing new.
ROWS = 8192
# Mean cosine of the columns that belong together. Unrelated columns have about 1 / sqrt(rows).
ALIKE = 0.8


@torch.no_grad()
def find_residual_order(model: nn.Module, origin: nn.Module) -> Tensor | None:
    """``[width]`` int64: channel ``c`` of ``model`` is channel ``order[c]`` of ``origin``; None: they stand alike.

    Steps that permute the residual stream (``channel_permutation``, ``peg``) keep what a model computes, and even its
    checkpoint does not say that they ran. But the columns of the input embedding moved along, and training changes them
    far less than a permutation does. Also None where the embeddings have no columns in common that tell: of other
    sizes, of models that have none, or of models that were not made from each other.
    """
    ours, theirs = _table(model), _table(origin)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    rows = torch.linspace(0, len(ours) - 1, min(ROWS, len(ours)), device=ours.device).long()
    ours, theirs = (
        F.normalize(table[rows.to(table.device)].to(ours.device).float(), dim=0) for table in (ours, theirs)
    )
    alike, order = (ours.T @ theirs).max(1)
    here = torch.arange(len(order), device=order.device)
    told = torch.equal(order.sort().values, here) and float(alike.mean()) > ALIKE
    return order if told and not torch.equal(order, here) else None


def _table(model: nn.Module) -> Tensor | None:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return embedding.weight.detach() if isinstance(embedding, nn.Embedding) else None
