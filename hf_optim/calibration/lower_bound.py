r"""A lower bound on the floating-point operations of calibrating one block, for comparison with the measured time.

With ``T`` calibration tokens, ``p`` passes of them through a block, linears ``l`` with weights ``[out_l, in_l]``, and
the distinct inputs ``X_i`` that the linears read (query, key and value share one)::

    forward        p · Σ_l 2 · T · out_l · in_l
    moments        Σ_i T · in_i²                      X Xᵀ is symmetric: half of 2 · T · in_i²
    factorization  Σ_i 2/3 · in_i³                    Cholesky 1/3, inverse of a triangular matrix 1/3
    recursion      Σ_l out_l · in_l²                  each column corrects those after it: half of 2 · out_l · in_l²

Every step that needs data has at least the cost of ``forward``. The other terms apply to a step that solves a
layer-wise least-squares problem column by column. Products of activations run at the rate of the model's dtype,
factorization and recursion at the float32 rate. Attention products, norms and activation functions are left out, so
this is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..toolkit.topology.graph import Trace
from ..toolkit.topology.linear_layers import features


@dataclass(frozen=True)
class LowerBound:
    """Floating-point operations of one block, by the terms of the module docstring; ``forward`` is for one pass."""

    forward: float
    moments: float
    factorization: float
    recursion: float

    @property
    def second_order(self) -> float:
        """Everything except the forward passes."""
        return self.moments + self.solution

    @property
    def solution(self) -> float:
        """The float32 part: factorization and recursion."""
        return self.factorization + self.recursion

    def seconds(self, passes: float, rate: float, float32_rate: float) -> float:
        """Return the seconds at these rates, in operations per second: of the model's dtype, and of float32."""
        return (passes * self.forward + self.moments) / rate + self.solution / float32_rate


def block_lower_bound(trace: Trace, block: str, tokens: int) -> LowerBound:
    """Compute the lower bound of the block with this qualified name for ``tokens`` calibration tokens.

    Linears that the traced forward does not run cost nothing.
    """
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
