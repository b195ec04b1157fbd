"""Traits: what is true of a model's weights and structure, as techniques see it.

A contract (``techniques.Contract``) is written over traits, so that no technique ever names another one. A trait can be
checked in the tensors: ``trait.holds(run)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class Trait:
    """A named property of a model.

    Attributes:
        name: what error messages print.
        meaning: one line that completes "the model ...".
        fragile: True for a property of weight *values*, which any step that rewrites weights destroys unless its
            contract ``keeps`` it.
        remedy: what a user can do when the trait is missing and no technique adds it.
        check: the property, tested in the tensors of ``run.model``; None where the tensors cannot show it.
    """

    name: str
    meaning: str
    fragile: bool = False
    remedy: str = ""
    check: Callable[[Run], bool] | None = None

    def holds(self, run: Run) -> bool:
        """Whether ``run.model`` has the trait. True when the tensors cannot show it and the run claims it."""
        return self.check(run) if self.check is not None else self in run.traits

    def __str__(self) -> str:
        return self.name


def _has_float_weights(run: Run) -> bool:
    return not _has_stored_quantization(run)


def _has_stored_quantization(run: Run) -> bool:
    # A module of remote code that holds codes says so itself.
    return any(
        getattr(m, "quantization_scheme", None) is not None or getattr(m, "holds_codes", False)
        for m in run.model.modules()
    )


def _has_bit_plan(run: Run) -> bool:
    from .toolkit.topology import expert_linears

    known = {**dict(run.model.named_modules()), **expert_linears(run.model)}
    return bool(run.bit_plan) and run.bit_plan.keys() <= known.keys()


def _has_experts(run: Run) -> bool:
    from .toolkit.topology import has_experts

    return has_experts(run.model)


def _is_sparse(run: Run) -> bool:
    from .masking import stray_weights

    return bool(run.masks) and not stray_weights(run)


def _is_sparse_nm(run: Run) -> bool:
    from .toolkit.masks import follows_nm

    return bool(run.nm_patterns) and all(follows_nm(run.model, n, *pattern) for n, pattern in run.nm_patterns.items())


FLOAT_WEIGHTS = Trait(
    "float-weights",
    "computes with floating-point weights",
    remedy="start from the floating-point checkpoint: this one is quantized already",
    check=_has_float_weights,
)
QUANTIZED = Trait("quantized", "stores weights as codes on a grid", check=_has_stored_quantization)
BITS_ASSIGNED = Trait("bits-assigned", "has a width in bits assigned to each of its layers", check=_has_bit_plan)
SPARSE = Trait("sparse", "has weights that were pruned to zero", fragile=True, check=_is_sparse)
SPARSE_NM = Trait("sparse-nm", "keeps N of every M weights in a row", fragile=True, check=_is_sparse_nm)
MOE = Trait("moe", "routes tokens to experts", check=_has_experts)
LOCAL_ATTENTION = Trait("local-attention", "attends to a bounded part of the sequence")

BUILT_IN = (FLOAT_WEIGHTS, QUANTIZED, BITS_ASSIGNED, SPARSE, SPARSE_NM, MOE, LOCAL_ATTENTION)
