r"""The least work that calibrating a block can take, in floating point operations.

With ``T`` calibration tokens, ``p`` passes of them through a block, linears ``l`` of ``out_l x in_l`` weights, and the
distinct inputs ``X_i`` that the linears read (query, key and value read one)::

    forward        p · Σ_l 2 · T · out_l · in_l
    moments        Σ_i T · in_i²                      X Xᵀ is symmetric: half of 2 · T · in_i²
    factorization  Σ_i 2/3 · in_i³                    Cholesky 1/3, and the inverse of a triangle 1/3
    recursion      Σ_l out_l · in_l²                  each column corrects those after it: half of 2 · out_l · in_l²

``forward`` is owed by every step that sees data, the rest by one that solves a layer-wise least squares problem column
by column. Products of activations run at the rate of the model's dtype, factorization and recursion at that of float32.
Attention's own products, norms and activations are left out: it is a bound from below.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..toolkit.topology.graph import Trace
from ..toolkit.topology.linear_layers import features


@dataclass(frozen=True)
class LowerBound:
    """Floating point operations for one block; ``forward`` is for one pass."""

    forward: float
    moments: float
    factorization: float
    recursion: float

    @property
    def second_order(self) -> float:
        """Everything but the passes."""
        return self.moments + self.solution

    @property
    def solution(self) -> float:
        """What is computed in float32: factorization and recursion."""
        return self.factorization + self.recursion

    def seconds(self, passes: float, rate: float, wide_rate: float) -> float:
        """Seconds at these rates, in operations a second: of the model's dtype, and of float32."""
        return (passes * self.forward + self.moments) / rate + self.solution / wide_rate


def block_lower_bound(trace: Trace, block: str, tokens: int) -> LowerBound:
    """The floor of the block of this qualified name for so many tokens; linears that it does not run cost nothing."""
    linears: dict[str, tuple[int, int]] = {}
    inputs: dict[int, int] = {}
    for op in trace.ops:
        if op.linear is None or not op.linear.startswith(f"{block}."):
            continue
        out, width = features(trace.modules[op.linear])
        linears[op.linear] = (out, width)
        inputs[op.reads[0]] = width
    return LowerBound(
        forward=float(sum(2 * tokens * out * width for out, width in linears.values())),
        moments=float(sum(tokens * width**2 for width in inputs.values())),
        factorization=sum(2 / 3 * width**3 for width in inputs.values()),
        recursion=float(sum(out * width**2 for out, width in linears.values())),
    )
