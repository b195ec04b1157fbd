"""Estimate the cost and the result of a recipe from the configuration of a model; no weights are read."""

from __future__ import annotations

from typing import Any

import torch

from ...compressed.step_scheme import packs_codes
from ...compressed.storability import takes_embeddings
from ...evaluation.reported import format_bytes
from ...recipes.config import OptimConfig
from ...recipes.contract import Reload
from ...recipes.traits import QUANTIZED
from ...runs.scope import Scope
from ...toolkit import topology
from ...toolkit.quantization import float4, stored_bits
from ...toolkit.quantization.grids import fit_group_size
from .calibration_cost import calibration_cost, calibration_tokens
from .plan import Plan
from .pruned_weights import pruned_weights
from .training_cost import training_cost

# Python, torch and transformers themselves, as measured; the estimates of host memory include it.
INTERPRETER = 600 * 2**20


def estimate(plan: Plan, model: Any, training_rows: int | None = None, tokens: int | None = None) -> dict[str, Any]:
    """Estimate size, memory and work of a plan.

    Args:
        plan: what is to be done.
        model: its model, which may be on the meta device.
        training_rows: the rows of the training data; None if they are not known.
        tokens: the tokens of the calibration data; None for those that the recipe asks for.

    Returns a mapping of JSON types, documented in docs/costs.md. ``bytes_after`` is None if a step changes the
    architecture, since the configuration then does not determine the result. ``stages`` has what each stage takes,
    ``pruned`` which weights the pruning steps choose from, and ``readable`` rows of text for a table.
    """
    recipe, width = plan.recipe, plan.width
    parameters = sum(p.numel() for p in model.parameters())
    changed = any(step.changes_architecture() for step in recipe.steps)
    stored = None if changed else _stored_bytes(recipe, model, width)
    block = max(
        (sum(p.numel() for p in b.module.parameters()) for b in topology.known_blocks(model)), default=parameters
    )
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": parameters,
        "bytes_before": parameters * width,
        "bytes_after": stored,
        "block_bytes": block * width,
        "calibration_tokens": calibration_tokens(plan) if tokens is None else tokens,
    }
    found["stages"] = [
        training_cost(plan, stage, model, training_rows)
        if stage.trains
        else calibration_cost(plan, stage, model, found)
        for stage in recipe.stages
    ]
    found["calibration_seconds"] = round(sum(stage.get("forward_seconds", 0.0) for stage in found["stages"]), 3)
    found["activation_bytes"] = max((stage.get("activation_bytes", 0) for stage in found["stages"]), default=0)
    found["required_bytes"] = INTERPRETER + max(stage["host_bytes"] for stage in found["stages"])
    # While a model is loaded its file is mapped: those pages are resident, but given back when memory is short.
    loading = 0 if recipe.driver == "streamed" else INTERPRETER + 2 * found["bytes_before"]
    found["host_bytes"] = max(found["required_bytes"], loading)
    found["device_bytes"] = max(stage["device_bytes"] for stage in found["stages"])
    found["device"] = plan.resolved_device.type
    found["pruned"] = pruned_weights(recipe, model)
    found["readable"] = _readable(found)
    return found


def _readable(found: dict[str, Any]) -> dict[str, str]:
    stored = found["bytes_after"]
    after = "depends on the new architecture" if stored is None else format_bytes(stored)
    rows = {
        "parameters": f"{found['parameters']:,}",
        "weights on disk": f"{format_bytes(found['bytes_before'])} -> {after}",
    }
    rows |= {f"{label} prunes": entry["text"] for label, entry in found["pruned"].items()}
    if found["device"] != "cpu":
        rows["device memory"] = f"about {format_bytes(found['device_bytes'])} at most"
    rows["host memory"] = f"about {format_bytes(found['host_bytes'])} at most"
    for number, stage in enumerate(found["stages"], 1):
        of = f" (stage {number})" if len(found["stages"]) > 1 else ""
        rows |= {f"{key}{of}": value for key, value in stage.pop("readable").items()}
    return rows


def _stored_bytes(recipe: OptimConfig, model: torch.nn.Module, width: int) -> int:
    total = sum(p.numel() for p in model.parameters()) * width
    step = next((s for s in reversed(recipe.steps) if QUANTIZED in s.contract().adds), None)
    planner = next((s for s in recipe.steps if getattr(s, "assign_only", False)), step)
    if step is None or planner is None or (bits := planner.code_bits()) is None:
        return total
    targets, skip = getattr(step, "targets", ("Linear",)), getattr(step, "skip", ())
    # Integer codes of a mixture are stored only with its experts packed too; in fp8 experts stay as they are.
    format = getattr(step, "format", "int")
    selected = Scope("", model, model).select(targets, skip, format == "int", takes_embeddings(step))  # type: ignore[arg-type]
    linear = [name for name, module in selected.items() if isinstance(module, torch.nn.Linear)]
    own_code = step.reload() is not Reload.STOCK_FORMAT
    packed = own_code or packs_codes(step, model, linear)
    zero_point = not getattr(step, "symmetric", True)
    for module in selected.values():
        if isinstance(module, topology.ExpertLinear):
            rows, columns = module.out_features, module.in_features
        elif isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            rows, columns = module.weight.shape
        else:
            continue
        group_size, scale_bits = getattr(step, "group_size", None), 8 * width
        group = fit_group_size(columns, group_size) if group_size else columns
        if format in float4.GROUPS:
            group, scale_bits = float4.GROUPS[format], 8
            if columns % group:
                continue  # left out
        elif getattr(step, "strategy", None) == "tensor":
            group = rows * columns
        table = isinstance(module, torch.nn.Embedding)  # a byte for each code
        of_weight = stored_bits(
            bits, columns, group, scale_bits, packed=packed and not table, zero_point=zero_point and not own_code
        )
        total += round(rows * columns * of_weight / 8) - rows * columns * width
    return total
