"""Layers over sets: attention among elements whose order means nothing, at a cost linear in their number.

    MAB(X, Y)  = O + relu(O W_o + b_o),      O = X' + concat over heads h of softmax(X'_h Y'_h^T / sqrt(w)) Y''_h
    SAB(X)     = MAB(X, X)
    ISAB_m(X)  = MAB(X, MAB(I, X)),          I in R^(m x w), learned: *inducing points*
    PMA_k(Z)   = MAB(S, rFF(Z)),             S in R^(k x w), learned: *seeds*

X', Y' and Y'' are projections of X and of Y to a width w. Lee, Lee, Kim, Kosiorek, Choi, Teh, "Set Transformer", arXiv
1810.00825, equations 6 to 11. As in the paper and in the authors' code, the residual is the *projected* X, and scores
are divided by the root of the whole width w, not by that of a head's. A layer norm after each of the two sums is an
option, off in the authors' models.

SAB and ISAB are equivariant to permutations of the elements, PMA is invariant. A padding mask leaves elements out, and
a set must have one: a row of padding alone is refused.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

SCALES = ("width", "head")


def attend_to_set(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Compute softmax attention over the elements of a set.

    Args:
        query: ``[B, H, n, D]``.
        key, value: ``[B, G, m, D]``; G divides H.
        mask: bool ``[B, m]``, False for padding; None if there is none.
        scale: of the scores.

    Returns:
        ``[B, H, n, D]``; zero in rows that are padding alone.
    """
    shared = key.shape[1] != query.shape[1]
    if mask is None:
        return functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=shared)
    empty = ~mask.any(-1, keepdim=True)
    seen = (mask | empty)[:, None, None]  # no softmax over nothing: it would be undefined
    out = functional.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=shared)
    return out.masked_fill(empty[:, None, None], 0)


def require_elements(mask: Tensor | None, shape: torch.Size) -> None:
    """Raise ``ValueError`` unless ``mask`` is bool ``[B, n]`` of ``shape`` with an element in each row.

    This waits for the device; the values of a tensor without data, or in a traced graph, are not looked at.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != shape[:2]:
        raise ValueError(
            f"the mask of a set is bool of the shape {tuple(shape[:2])}, True for elements; this one is {mask.dtype} "
            f"of the shape {tuple(mask.shape)}"
        )
    if mask.is_meta or type(mask).__name__ == "FakeTensor" or torch.compiler.is_compiling():
        return
    rows = mask.any(1)
    if not bool(rows.all()):
        raise ValueError(f"row {int(rows.long().argmin())} of the batch is padding alone: a set has an element")


class MAB(nn.Module):
    """Multihead attention block: elements of X attend to those of Y, then one linear layer with ReLU.

    Args:
        query_width, key_width: of the elements of X and of Y.
        width: of the output, w.
        heads: of the attention, a divisor of ``width``.
        layer_norm: normalize after each of the two sums.
        scale: ``width``, scores over sqrt(w), is the paper's; ``head``, over sqrt(w / heads), is that of transformers.
        about: ``device`` and ``dtype`` of the parameters.
    """

    def __init__(
        self,
        query_width: int,
        key_width: int,
        width: int,
        heads: int,
        layer_norm: bool = False,
        scale: str = "width",
        **about: Any,
    ) -> None:
        super().__init__()
        require_sizes(heads=heads, width=width, query_width=query_width, key_width=key_width)
        if width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        if scale not in SCALES:
            raise ValueError(f"scale is one of {', '.join(SCALES)}, not {scale!r}")
        self.heads, self.scale = heads, (width if scale == "width" else width // heads) ** -0.5
        self.query = nn.Linear(query_width, width, **about)
        self.key = nn.Linear(key_width, width, **about)
        self.value = nn.Linear(key_width, width, **about)
        self.feed_forward = nn.Linear(width, width, **about)
        norms = [nn.LayerNorm(width, **about) if layer_norm else nn.Identity() for _ in range(2)]
        self.attention_norm, self.output_norm = norms

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``[B, n, width]`` of ``x [B, n, query_width]`` and ``y [B, m, key_width]``.

        ``mask`` is bool ``[B, m]``, True for the elements of y and False for padding. Raises ``ValueError`` for a mask
        of another kind, or with a row without elements.
        """
        require_elements(mask, y.shape)
        query = self.query(x)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, self.key(y), self.value(y)))
        attended = attend_to_set(q, k, v, mask, self.scale).transpose(1, 2).flatten(2)
        out = self.attention_norm(query + attended)
        return self.output_norm(out + functional.relu(self.feed_forward(out)))


class SAB(nn.Module):
    """Set attention block: ``MAB(X, X)``, whose cost is quadratic in the number of elements."""

    def __init__(self, in_width: int, width: int, heads: int, **options: Any) -> None:
        super().__init__()
        self.block = MAB(in_width, in_width, width, heads, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``[B, n, width]`` of ``[B, n, in_width]``; ``mask`` as in ``MAB``. Outputs at padding mean nothing."""
        return self.block(x, x, mask)


class ISAB(nn.Module):
    """Induced set attention block: ``MAB(X, MAB(I, X))``, whose cost is that of n m pairs.

    Args:
        in_width: of the elements.
        width: of the output and of the inducing points.
        heads: of both attentions.
        points: m, the number of inducing points.
        options: ``layer_norm``, ``scale``, ``device`` and ``dtype`` of ``MAB``.
    """

    def __init__(self, in_width: int, width: int, heads: int, points: int, **options: Any) -> None:
        super().__init__()
        require_sizes(points=points)
        self.points = nn.Parameter(learned_elements(points, width, options))
        self.gather = MAB(width, in_width, width, heads, **options)
        self.spread = MAB(in_width, width, width, heads, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``[B, n, width]`` of ``[B, n, in_width]``; ``mask`` as in ``MAB``. Outputs at padding mean nothing."""
        return self.spread(x, self.gather(self.points.expand(len(x), -1, -1), x, mask))


class PMA(nn.Module):
    """Pooling by multihead attention: k vectors of a set, ``MAB(S, rFF(Z))``.

    Args:
        width: of the elements, the seeds and the output.
        heads: of the attention.
        seeds: k, the number of vectors.
        feed_forward: apply rFF, a linear layer with ReLU, to the elements first, as the paper says; the authors' code
            does not.
        options: ``layer_norm``, ``scale``, ``device`` and ``dtype`` of ``MAB``.
    """

    def __init__(self, width: int, heads: int, seeds: int = 1, feed_forward: bool = True, **options: Any) -> None:
        super().__init__()
        require_sizes(seeds=seeds)
        about = {name: value for name, value in options.items() if name in ("device", "dtype")}
        self.seeds = nn.Parameter(learned_elements(seeds, width, options))
        self.feed_forward = nn.Linear(width, width, **about) if feed_forward else None
        self.block = MAB(width, width, width, heads, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``[B, seeds, width]`` of ``[B, n, width]``; ``mask`` as in ``MAB``."""
        if self.feed_forward is not None:
            x = functional.relu(self.feed_forward(x))
        return self.block(self.seeds.expand(len(x), -1, -1), x, mask)


def learned_elements(count: int, width: int, options: dict[str, Any]) -> Tensor:
    """Return inducing points or seeds ``[count, width]``, with the device and dtype of ``options``.

    Xavier-uniform for a matrix of this shape. The authors' tensor has a dimension of size 1 in front, for which
    ``xavier_uniform_`` takes a range that is smaller, by a factor of about sqrt(count) for a large width.
    """
    about = {name: value for name, value in options.items() if name in ("device", "dtype")}
    return nn.init.xavier_uniform_(torch.empty(count, width, **about))


def require_sizes(**sizes: int) -> None:
    """Raise ``ValueError`` for sizes below 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, not {str(size)[:40]!r}")
