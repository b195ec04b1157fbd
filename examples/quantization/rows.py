"""The rows of the quantization table: recipes by name, from the most bits per weight to the fewest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Step = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One recipe of the table.

    Attributes:
        name: as printed.
        bits: bits of weights and inputs, as printed.
        steps: the recipe; empty for the dense model.
        learning_rate: used by rows that train.
    """

    name: str
    bits: str
    steps: Sequence[Step] = ()
    learning_rate: float = 1e-4


def gptq(bits: int, **fields: Any) -> Step:
    """Return the strongest settings of gptq: groups of 32 with zero points and searched scales."""
    return {"technique": "gptq", "bits": bits, "group_size": 32, "symmetric": False, "observer": "mse", **fields}


def grouped(technique: str, bits: int, **fields: Any) -> Step:
    """Return a step with groups of 32."""
    return {"technique": technique, "bits": bits, "group_size": 32, **fields}


def lkd(bits: int) -> Step:
    """Return lkd on floating-point weights, with learned scales."""
    rate = 1e-3 if bits == 2 else 3e-4
    return grouped("lkd", bits, observer="mse", learning_rate=rate, learn_scales=True, steps=200, batch_size=8)


def qat(bits: int) -> Step:
    """Return qat with learned scales, initialized to the least squared error."""
    return grouped("qat", bits, observer="mse", learn_scales=True)


RTN_W8A8 = {"technique": "rtn", "bits": 8, "activations": "int8"}
KD = {"technique": "logit_kd", "temperature": 1.0, "alpha": 1.0}
# After a quantizer, lkd changes the codes on the quantizer's grid.
REFINE = {"technique": "lkd", "learning_rate": 3e-4, "steps": 200, "batch_size": 8}
BUDGET = {"technique": "qbert", "choices": [2, 3, 4, 8], "group_size": 32, "groups": None, "shards": 2, "rows": 4}

ROWS = (
    Row("dense", "32"),
    # eight bits
    Row("rtn", "W8", [{"technique": "rtn", "bits": 8}]),
    Row("rtn", "W8A8", [RTN_W8A8]),
    Row("zeroquant", "W8A8", [{"technique": "zeroquant"}]),
    Row("llm_int8", "W8A8", [{"technique": "llm_int8"}]),
    Row("smoothquant, rtn", "W8A8", [{"technique": "smoothquant"}, RTN_W8A8]),
    Row("peg", "W8A8", [{"technique": "peg"}]),
    Row("mixed_precision", "W8A8/16", [{"technique": "mixed_precision"}]),
    # four bits
    Row("rtn per channel", "W4", [{"technique": "rtn", "bits": 4}]),
    Row("rtn g32", "W4", [grouped("rtn", 4)]),
    Row("zeroquant", "W4A8", [{"technique": "zeroquant", "bits": 4}]),
    Row(
        "smoothquant, gptq per channel",
        "W4A8",
        [{"technique": "smoothquant"}, {"technique": "gptq", "bits": 4, "group_size": None, "activations": "int8"}],
    ),
    Row("gptq per channel", "W4", [{"technique": "gptq", "bits": 4, "group_size": None}]),
    Row("gptq g32", "W4", [gptq(4)]),
    Row("obq g32", "W4", [grouped("obq", 4, observer="mse")]),
    Row("qbert g32", "W4 mean", [{**BUDGET, "budget": 4.0}]),
    Row("lkd g32", "W4", [lkd(4)]),
    Row("qat g32", "W4", [qat(4)]),
    Row("gobo", "W4", [{"technique": "gobo", "bits": 4}]),
    # three bits
    Row("rtn per channel", "W3", [{"technique": "rtn", "bits": 3}]),
    Row("rtn g32", "W3", [grouped("rtn", 3)]),
    Row("gptq per channel", "W3", [{"technique": "gptq", "bits": 3, "group_size": None}]),
    Row("gptq g32", "W3", [gptq(3)]),
    Row("obq g32", "W3", [grouped("obq", 3, observer="mse")]),
    Row("qbert g32", "W3 mean", [{**BUDGET, "budget": 3.0}]),
    Row("qbert, gptq g32", "W3 mean", [{**BUDGET, "budget": 3.0, "assign_only": True}, gptq(3, symmetric=True)]),
    Row("lkd g32", "W3", [lkd(3)]),
    Row("gptq, lkd g32", "W3", [gptq(3), REFINE]),
    Row("qat g32", "W3", [qat(3)]),
    Row("qat, logit_kd g32", "W3", [qat(3), KD]),
    Row("gobo", "W3", [{"technique": "gobo", "bits": 3}]),
    # two bits
    Row("rtn per channel", "W2", [{"technique": "rtn", "bits": 2}]),
    Row("rtn g32", "W2", [grouped("rtn", 2)]),
    Row("gptq g32", "W2", [gptq(2)]),
    Row("lkd g32", "W2", [lkd(2)]),
    Row("gptq, lkd g32", "W2", [gptq(2), {**REFINE, "learning_rate": 1e-3, "learn_scales": True}]),
    Row("qat g32", "W2", [qat(2)], learning_rate=1e-3),
    Row("qat, logit_kd g32", "W2", [qat(2), KD], learning_rate=1e-3),
    Row("gobo", "W2", [{"technique": "gobo", "bits": 2}]),
)
