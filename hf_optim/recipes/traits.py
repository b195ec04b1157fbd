"""Traits: properties of a model's weights and structure, in which contracts are written.

A contract (``recipes.contract.Contract``) is written in traits, so that no technique names another one. A trait can be
checked in the tensors: ``hf_optim.testing.trait_checks.holds(trait, run)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trait:
    """A named property of a model.

    Attributes:
        name: its name in error messages.
        meaning: completes the phrase "a model that ...".
        fragile: True for a property of weight *values*, which any step that rewrites weights destroys unless its
            contract ``keeps`` it.
        remedy: what a user can do if the trait is missing and no technique adds it, as a command: "start from ...".
        check: for traits of third parties: tests the property in the tensors of ``run.model``. The built-in ones are
            checked by ``hf_optim.testing.trait_checks``.
        step: what a step that adds the trait is called in messages, with its article: "a quantization step".
    """

    name: str
    meaning: str
    fragile: bool = False
    remedy: str = ""
    check: Callable[[Any], bool] | None = None
    step: str = ""

    def __str__(self) -> str:
        return self.name


FLOAT_WEIGHTS = Trait(
    "float-weights",
    "has floating-point weights",
    remedy="start from the floating-point checkpoint instead of a quantized one",
)
QUANTIZED = Trait("quantized", "has quantized weights", step="a quantization step")
BITS_ASSIGNED = Trait(
    "bits-assigned", "has a bit width assigned to each of its layers", step="a step that assigns bits"
)
SPARSE = Trait("sparse", "has weights that were pruned to zero", fragile=True, step="a pruning step")
SPARSE_NM = Trait("sparse-nm", "keeps N of every M weights in a row", fragile=True, step="an N:M pruning step")
MOE = Trait("moe", "routes tokens to experts", step="a step that makes a mixture of experts")
LOCAL_ATTENTION = Trait("local-attention", "attends to a bounded part of the sequence", step="a local-attention step")
SPARSE_ATTENTION = Trait(
    "sparse-attention", "computes attention for a part of all pairs of tokens", step="a sparse-attention step"
)
TIED_BLOCKS = Trait("tied-blocks", "applies shared blocks in steps", step="a step that ties blocks")

BUILT_IN = (
    FLOAT_WEIGHTS,
    QUANTIZED,
    BITS_ASSIGNED,
    SPARSE,
    SPARSE_NM,
    MOE,
    LOCAL_ATTENTION,
    SPARSE_ATTENTION,
    TIED_BLOCKS,
)
