"""Give the mixture layers of a model capacities that follow their load, and take them away again."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ...trust.text import one_line
from ..compat import set_experts_implementation
from . import registry
from .assignments import BATCH, Batch, returns_choices, skip_none, skip_stable, skipper_of
from .bucketed_layer import LAYER, BucketedLayer, buckets_of
from .buckets import Buckets, stored_buckets
from .capped_layer import layer_of
from .registry import NAME
from .routed_model import FORMER as FORMER_OF_ROUTING
from .routed_model import FORMER_OF_BUCKETS as FORMER
from .routed_model import bodies_of, require_routable
from .routers import router_beside

log = logging.getLogger(__name__)


def attach_buckets(model: PreTrainedModel, buckets: Buckets, label: str = "buckets of experts") -> list[str]:
    """Let capacities of every mixture layer follow its load, in place; return the names of the modules of experts.

    Nothing is dropped, and results are those without buckets. Raises ``ModelError`` as ``require_routable``.
    """
    layers = require_routable(model, label)
    detach_buckets(model)
    current = model.get_experts_implementation()
    vars(model)[FORMER] = vars(model).get(FORMER_OF_ROUTING, current)
    registry.use(model)
    try:
        set_experts_implementation(model, NAME)
    except (ValueError, RuntimeError) as error:
        detach_buckets(model)
        raise ModelError(f"{label}: {type(model).__name__} takes no function for its experts: {error}") from error
    for name, module in layers.items():
        vars(module)[LAYER] = BucketedLayer(name, buckets)
    if buckets.stable:
        try:
            _keep_assignments(model, layers, buckets.stable, label)
        except BaseException:
            detach_buckets(model)
            raise
    return list(layers)


def _keep_assignments(model: PreTrainedModel, layers: dict[str, Any], stable: int, label: str) -> None:
    """Let the routers of a model keep assignments that do not change in training."""
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ModelError(
            f"{label}: output_router_logits is set, and its load-balancing loss needs the logits of all tokens, which "
            "are not computed for assignments that are kept: set stable: 0, or output_router_logits to False"
        )
    batches = {}
    for body in dict.fromkeys(bodies_of(model, layers).values()):
        batches[body] = Batch()
        handle = body.register_forward_pre_hook(batches[body].note, with_kwargs=True)
        vars(body)[BATCH] = handle
    for name, body in bodies_of(model, layers).items():
        router, top_k = router_beside(model, name)
        if router is None or not returns_choices(router, int(router.get_parameter("weight").shape[1]), top_k):
            raise ModelError(
                f"{label}: the router of {one_line(name)} does not return logits, gates and choices, so that its "
                "assignments cannot be kept: set stable: 0"
            )
        skip_stable(router, stable, batches[body])


def attach_stored_buckets(model: nn.Module) -> None:
    """Let capacities follow the load as the configuration of a model says, if it does and they do not already."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        buckets = stored_buckets(part.config)
        if buckets is not None and buckets_in(part) != buckets:
            attach_buckets(part, buckets, "the buckets in config.json")
            log.info("capacities of experts follow their load, as config.json states (hf_optim.restore ends it)")
        return


def detach_buckets(model: nn.Module) -> None:
    """Undo ``attach_buckets``. A model without buckets is not changed."""
    for module in list(model.modules()):
        if (layer := vars(module).pop(LAYER, None)) is not None:
            registry.drop(layer)
        if skipper_of(module) is not None:
            skip_none(module)
        if (handle := vars(module).pop(BATCH, None)) is not None:
            handle.remove()
        former = vars(module).pop(FORMER, None)
        if former is None:
            continue
        if not any(layer_of(part) is not None for part in module.modules()):
            set_experts_implementation(module, former)
        registry.drop(module)


def buckets_in(model: nn.Module) -> Buckets | None:
    """Return the setting by which capacities follow the load at present, or None."""
    return next((layer.setting for module in model.modules() if (layer := buckets_of(module)) is not None), None)


def expert_buckets(model: nn.Module) -> dict[str, Any]:
    """Return by the name of each module of experts what its buckets did: the fields of ``Counts``, and ``padding``.

    ``capacities`` has the room of each expert, by the number of tokens of a forward. With ``stable``,
    ``sequences_routed`` and ``sequences_kept`` count what routers computed in training, and did not. Empty for a model
    without buckets.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        layer = buckets_of(module)
        if layer is not None:
            held = {str(tokens): list(watch.capacities or ()) for tokens, watch in layer.watches.items()}
            found[name] = {**layer.counts.to_dict(), "capacities": held}
            router, _ = router_beside(model, name) if layer.setting.stable else (None, None)  # type: ignore[arg-type]
            skipper = skipper_of(router) if router is not None else None
            if skipper is not None:
                found[name] |= {"sequences_routed": skipper.computed, "sequences_kept": skipper.skipped}
    return found
