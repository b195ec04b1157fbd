"""Compare the traits that the contracts of completed steps add with what the steps left in the run and the model.

A contract is a declaration. Later steps rely on it (a quantizer keeps the zeros of ``run.masks``), so a step that
declares a trait and does not produce it is named on the log and on the card. This looks at the state of the run only;
``hf_optim.testing.trait_checks`` checks traits in the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..recipes.technique import Technique
from ..recipes.traits import BITS_ASSIGNED, MOE, QUANTIZED, SPARSE, SPARSE_NM, Trait
from ..toolkit.topology import has_experts
from .run import Run


def has_codes(run: Run) -> bool:
    """Return True if a module of the model holds quantized weights."""
    # Modules of remote code that hold codes have the attribute holds_codes.
    return any(
        getattr(module, "quantization_scheme", None) is not None or getattr(module, "holds_codes", False)
        for module in run.model.modules()
    )


# Trait -> what shows it, and what is missing if it does not.
EVIDENCE: dict[Trait, tuple[Callable[[Run], bool], str]] = {
    SPARSE: (lambda run: bool(run.masks), "run.masks is empty, so nothing would keep weights at zero"),
    SPARSE_NM: (lambda run: bool(run.nm_patterns), "run.nm_patterns is empty, so nothing would keep the pattern"),
    BITS_ASSIGNED: (lambda run: bool(run.bit_plan), "run.bit_plan is empty"),
    QUANTIZED: (has_codes, "no layer has a quantization scheme"),
    MOE: (lambda run: has_experts(run.model), "the model has no experts"),
}


def warn_unfulfilled(run: Run, steps: Iterable[Technique]) -> None:
    """Warn, on the log and the card, about each trait that a step declares to add but did not produce."""
    for step in steps:
        for trait in sorted(step.contract().adds & EVIDENCE.keys(), key=str):
            shows, missing = EVIDENCE[trait]
            if not shows(run):
                run.warn(step, f"it declares that it adds {trait}, but {missing}")
