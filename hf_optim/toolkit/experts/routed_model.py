"""Give the mixture layers of a model a capacity, through transformers' interface for experts, and take it away again.

The function registered there under ``hf_optim`` computes every layer with a plan (``capped_layer``) and a product
(``product``). It is registered as long as a model uses it. A model changes in three places, none of them a weight: the
implementation of experts in its configuration, an attribute of each module of experts, and the class of the part of the
model that holds them (``tokens``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ...trust.text import one_line
from ..compat import set_experts_implementation
from ..topology.experts import expert_counts, expert_stacks, has_experts, interface_experts
from . import registry
from .bucketed_layer import buckets_of
from .capped_layer import LAYER, CappedLayer, layer_of
from .own_routing import require_limitable
from .product import expert_product
from .registry import NAME
from .routers import require_fitting_routers, router_facts
from .routing import Routing, stored_routing
from .tokens import forget_tokens, is_noting, note_tokens

log = logging.getLogger(__name__)

FORMER = "_hf_optim_former_experts"
FORMER_OF_BUCKETS = "_hf_optim_former_of_buckets"

WRONG_IN_TRANSFORMERS = {
    "nllb-moe": "transformers (5.17 to 5.24) runs only its experts 0 and 1, whatever the router chooses, so a capacity "
    "would limit choices that are not computed",
}


def experts_forward(self: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute the experts of one layer: hidden ``[T, d]``, index int64 and weights ``[T, k]``; returns ``[T, d]``."""
    layer = layer_of(self)
    if layer is None or layer.planned_before:
        complete = not getattr(self, "_is_expert_parallel", True)
        return product_of(self)(self, hidden, top_k_index, top_k_weights, complete)
    plan = layer.plan(self, hidden, top_k_index, top_k_weights)
    return product_of(self)(self, hidden, plan.experts, plan.weights, plan.complete)


def product_of(module: nn.Module) -> Callable[..., Tensor]:
    """Return the product of a module of experts: with buckets that follow its load, or without."""
    buckets = buckets_of(module)
    return expert_product if buckets is None else buckets.forward


# -- models -----------------------------------------------------------------------------------------------------------
def attach_routing(model: PreTrainedModel, routing: Routing, label: str = "a capacity") -> list[str]:
    """Give every mixture layer of ``model`` a capacity, in place; return the names of the modules of experts.

    Settings that it had before are replaced, and its counts start at 0. Raises ``ModelError`` as ``require_routable``
    and ``require_limitable``.
    """
    layers = require_routable(model, label)
    require_limitable(model, routing, label)
    detach_routing(model)
    bodies = bodies_of(model, layers)
    former = vars(model).get(FORMER_OF_BUCKETS, model.get_experts_implementation())
    tokens = {id(body): note_tokens(body) for body in dict.fromkeys(bodies.values())}
    vars(model)[FORMER] = former
    try:
        set_experts_implementation(model, NAME)
    except (ValueError, RuntimeError) as error:
        detach_routing(model)
        raise ModelError(f"{label}: {type(model).__name__} takes no function for its experts: {error}") from error
    for name, module in layers.items():
        body = bodies[name]
        count, top_k = router_facts(model, name)
        own = int(module.num_experts)
        with torch.inference_mode(False):
            counts = torch.zeros(2, own, dtype=torch.int64, device=_device_of(module))
        layer = CappedLayer(name, routing, tokens[id(body)], max(own, count or 0), top_k, counts)
        vars(module)[LAYER] = layer
    ignoring = [name for name, module in layers.items() if module.config._experts_implementation != NAME]
    if ignoring:
        detach_routing(model)
        raise ModelError(
            f"{label}: {type(model).__name__} runs {ignoring[0]} by its own forward, not through transformers' "
            "interface for experts, so no capacity reaches it"
        )
    return list(layers)


def attach_stored_routing(model: nn.Module) -> None:
    """Give a model the capacity that its configuration holds, if it does and the model has none yet."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        routing = stored_routing(part.config)
        if routing is not None and routing_of(part) is None:
            attach_routing(part, routing, "the capacity in config.json")
            log.info(
                "experts have a capacity, as config.json states: factor %g (hf_optim.restore removes it)",
                routing.capacity,
            )
        return


def detach_routing(model: nn.Module) -> None:
    """Take the capacities of a model away: it computes what stock transformers computes. Without any, do nothing."""
    for module in list(model.modules()):
        vars(module).pop(LAYER, None)
        if is_noting(module):
            forget_tokens(module)
        former = vars(module).pop(FORMER, None)
        if former is not None and FORMER_OF_BUCKETS not in vars(module):
            set_experts_implementation(module, former)


def routing_of(model: nn.Module) -> Routing | None:
    """Return the settings by which the mixture layers of a model run at present, or None."""
    return next((layer.routing for module in model.modules() if (layer := layer_of(module)) is not None), None)


def require_routable(model: PreTrainedModel, label: str) -> dict[str, Any]:
    """Return the modules of experts that a capacity can be given, by name. The model may be on the meta device.

    Raises ``ModelError`` for a model without experts, with experts that do not run through transformers' interface, or
    with a router that does not fit them.
    """
    kind, cls = model.config.model_type, type(model).__name__
    if kind in WRONG_IN_TRANSFORMERS:
        raise ModelError(f"{label}: {cls} is not supported: {WRONG_IN_TRANSFORMERS[kind]}")
    layers: dict[str, Any] = interface_experts(model)
    others = sorted(set(expert_stacks(model)) - set(layers))
    if not layers and not others and not has_experts(model) and not expert_counts(model):
        raise ModelError(f"{label}: {cls} has no experts; `upcycle` makes a mixture of experts of a dense model")
    if not layers or others:
        where = f" ({one_line(others[0])})" if others else ""
        raise ModelError(
            f"{label}: the experts of {cls}{where} do not run through transformers' interface for experts, so no "
            "capacity reaches them"
        )
    require_fitting_routers(model, layers, label)
    return layers


def _device_of(module: nn.Module) -> torch.device:
    """Return the device of a module of experts, whose matrices may be packed into buffers."""
    return next(itertools.chain(module.parameters(), module.buffers())).device


def bodies_of(model: PreTrainedModel, layers: dict[str, Any]) -> dict[str, PreTrainedModel]:
    """Return for each module of experts the innermost ``PreTrainedModel`` around it, whose forward has the mask."""
    parts = {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    around = {}
    for layer in layers:
        holding = [name for name in parts if not name or layer.startswith(name + ".")]
        around[layer] = parts[max(holding, key=len)]
    return around


registry.provide(experts_forward)
