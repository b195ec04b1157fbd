"""Check in the tensors that a model has the traits that its run claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..recipes.traits import BITS_ASSIGNED, FLOAT_WEIGHTS, MOE, QUANTIZED, SPARSE, SPARSE_NM, Trait
from ..runs.masking import stray_weights
from ..runs.run import has_codes
from ..toolkit.pruning.masks import parameter_has_nm_pattern
from ..toolkit.topology.experts import expert_linears, has_experts

if TYPE_CHECKING:
    from ..runs.run import Run


def holds(trait: Trait, run: Run) -> bool:
    """Return True if ``run.model`` has the trait, or if its tensors cannot show it and the run claims it."""
    check = CHECKS.get(trait, trait.check)
    return check(run) if check is not None else trait in run.traits


def _has_float_weights(run: Run) -> bool:
    return not has_codes(run.model)


def _has_bit_plan(run: Run) -> bool:
    known = {**dict(run.model.named_modules()), **expert_linears(run.model)}
    return bool(run.bit_plan) and run.bit_plan.keys() <= known.keys()


def _has_experts(run: Run) -> bool:
    return has_experts(run.model)


def _is_sparse(run: Run) -> bool:
    return bool(run.masks) and not stray_weights(run)


def _is_sparse_nm(run: Run) -> bool:
    return bool(run.nm_patterns) and all(
        parameter_has_nm_pattern(run.model, n, *pattern) for n, pattern in run.nm_patterns.items()
    )


CHECKS: dict[Trait, Callable[[Run], bool]] = {
    FLOAT_WEIGHTS: _has_float_weights,
    QUANTIZED: lambda run: has_codes(run.model),
    BITS_ASSIGNED: _has_bit_plan,
    SPARSE: _is_sparse,
    SPARSE_NM: _is_sparse_nm,
    MOE: _has_experts,
}
