"""The recipes of the sweep, in the order of the table's columns."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, list[dict[str, Any]]] = {
    "w4a16": [{"technique": "rtn", "bits": 4, "group_size": 16}],
    "w8a8": [{"technique": "rtn", "bits": 8, "activations": "int8"}],
    "gptq": [{"technique": "gptq", "bits": 4, "group_size": 16}],
    "nm": [{"technique": "nm", "keep": 2, "group": 4, "score": "activation"}],
    "magnitude": [{"technique": "magnitude", "sparsity": 0.5}],
}
