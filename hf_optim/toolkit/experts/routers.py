"""The routers of a model's mixture layers: where they are, how many experts they know, and how many they choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ...trust.bounds import shown
from ...trust.text import one_line

TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def require_fitting_routers(model: PreTrainedModel, layers: Mapping[str, Any], label: str = "") -> None:
    """Raise ``ModelError`` for a router with fewer outputs than experts, or one that chooses none or more than all.

    More outputs than experts are refused, too, unless the router's class makes them of its configuration: those of all
    ranks, or of a shared expert. A pair that chooses one of them would be computed by no expert, without a word.

    Args:
        model: the model; it may be on the meta device.
        layers: its modules of experts, by name.
        label: the beginning of the message.
    """
    begin = f"{label}: " if label else ""
    for name, module in layers.items():
        count, top_k = router_facts(model, name)
        experts = int(module.num_experts)
        if count is None and getattr(module, "_is_expert_parallel", False):
            continue  # it holds the experts of one rank, and nothing says how many there are
        # The gate of a shared expert has one output.
        if count is not None and (1 < count < experts or (count > experts and not _is_as_built(model, name, count))):
            raise ModelError(f"{begin}the router of {one_line(name)} has {count} outputs for {experts} experts")
        if top_k is not None and not 1 <= top_k <= max(experts, count or 0):
            only = "only " if top_k > experts else ""
            raise ModelError(f"{begin}tokens of {one_line(name)} choose {shown(top_k)} of {only}{experts} experts")


def _is_as_built(model: PreTrainedModel, name: str, count: int) -> bool:
    """Return True if the router beside a module of experts has the outputs its class gives it, or that is unknown."""
    router, _ = router_beside(model, name)
    try:
        with torch.device("meta"):
            made: Any = type(router)(model.config.get_text_config())  # type: ignore[call-arg, misc]
        return len(made.weight) == count
    except Exception:
        return True


def router_facts(model: PreTrainedModel, name: str) -> tuple[int | None, int | None]:
    """Return the outputs of the router beside a module of experts, and how many it chooses; None if unknown."""
    router, top_k = router_beside(model, name)
    if router is not None:
        return len(router.get_parameter("weight")), top_k
    config = model.config.get_text_config()
    top_k = next((value for key in TOP_K if isinstance(value := getattr(config, key, None), int)), None)
    return None, top_k


def router_beside(model: PreTrainedModel, name: str) -> tuple[nn.Module | None, int | None]:
    """Return the router beside a module of experts, and how many experts it chooses; None if there is none."""
    block: Any = model.get_submodule(name.rpartition(".")[0])
    for module in block.children():
        top_k = getattr(module, "top_k", getattr(block, "top_k", None))
        if (
            _is_matrix(module._parameters.get("weight"))
            and isinstance(top_k, int)
            and not isinstance(module, nn.Embedding)
        ):
            return module, top_k
    return None, None


def _is_matrix(weight: Any) -> bool:
    """Return True for a matrix."""
    return weight is not None and weight.dim() == 2
