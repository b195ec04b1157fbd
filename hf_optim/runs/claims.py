"""Compare what completed steps declare, traits and reload level, with what they left in the run and the model.

A contract is a declaration. Later steps rely on it (a quantizer keeps the zeros of ``run.masks``), so a step that
declares a trait and does not produce it is named on the log and on the card. This looks at the state of the run only;
``hf_optim.testing.trait_checks`` checks traits in the tensors.

The reload level of a step is what its own work requires. How the checkpoint is loaded also depends on the model that
the run was given, which may have code of its own or quantized weights, and on what other steps made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from ..recipes.contract import Reload
from ..recipes.technique import Technique
from ..recipes.traits import BITS_ASSIGNED, MOE, QUANTIZED, SPARSE, SPARSE_NM, Trait
from ..toolkit.topology import has_experts
from ..trust.code import is_stock
from .run import Run, has_codes

# Trait -> what shows it, and what is missing if it does not.
EVIDENCE: dict[Trait, tuple[Callable[[Run], bool], str]] = {
    SPARSE: (lambda run: bool(run.masks), "run.masks is empty, so nothing would keep weights at zero"),
    SPARSE_NM: (lambda run: bool(run.nm_patterns), "run.nm_patterns is empty, so nothing would keep the pattern"),
    BITS_ASSIGNED: (lambda run: bool(run.bit_plan), "run.bit_plan is empty"),
    QUANTIZED: (lambda run: has_codes(run.model), "no layer has a quantization scheme"),
    MOE: (lambda run: has_experts(run.model), "the model has no experts"),
}


def warn_unfulfilled(run: Run, steps: Iterable[Technique]) -> None:
    """Warn, on the log and the card, about each trait that a step declares to add but did not produce."""
    for step in steps:
        for trait in sorted(step.contract().adds & EVIDENCE.keys(), key=str):
            shows, missing = EVIDENCE[trait]
            if not shows(run):
                run.warn(step, f"it declares that it adds {trait}, but {missing}")


def settle_reload(run: Run) -> None:
    """Set the reload level on the record to that of the model as it is.

    Until then the record has the level that the recipe declares, or that a step has set. A class whose code is in
    the checkpoint is ``REMOTE_CODE``. Of a class of transformers, quantized weights are at least
    ``STOCK_FORMAT``, and floating-point ones are not that.
    """
    model, level = run.model, Reload[run.record.reload]
    if level is Reload.REMOTE_CODE and not _has_own_code(model):
        same = type(model).__name__ == run.record.base_model.get("class")
        level = Reload.STOCK_DENSE if same else Reload.STOCK_ARCH
    run.record.reload = reload_of(level, model, run.traits).name


def reload_of(level: Reload, model: Any, traits: Collection[Trait]) -> Reload:
    """Return the reload level of the result of a recipe.

    Args:
        level: that of the recipe (``OptimConfig.reload``).
        model: the result, or the model that the recipe is for, if no more is known; it may be on the meta device.
        traits: those of the result.
    """
    if _has_own_code(model):
        return Reload.REMOTE_CODE
    if level in (Reload.STOCK_DENSE, Reload.STOCK_FORMAT):
        return Reload.STOCK_FORMAT if QUANTIZED in traits else Reload.STOCK_DENSE
    return level


def _has_own_code(model: Any) -> bool:
    return not is_stock(model) and bool(getattr(model.config, "auto_map", None))
