"""Give the layers of a model that transformers spreads over ranks another exchange, and take it away again.

A model that was loaded with ``distributed_config=DistributedConfig(ep_size=...)`` has experts with a forward of
transformers, which calls an ``EPImplementation``. ``attach_exchange`` installs that forward again with our class, and
``detach_exchange`` puts the former one back. A model of one process has nothing to exchange and is not changed.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ...trust.text import one_line
from .. import compat
from ..distributed import collectives
from ..topology.experts import fused_experts
from .capped_layer import layer_of
from .exchange_settings import Exchange, stored_exchange
from .rank_layers import SETTING, implementations
from .routed_model import require_routable

log = logging.getLogger(__name__)

FORMER = "_hf_optim_former_exchange"

_users: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_kept: set[str] = set()


def attach_exchange(model: PreTrainedModel, exchange: Exchange, label: str = "an exchange") -> list[str]:
    """Let the experts of ``model`` exchange tokens as ``exchange`` says; return the names of those that do.

    Empty for a model that is not spread over ranks: it computes as stock transformers. Raises ``ModelError`` for a
    model without experts on transformers' interface, for ranks that form no grid, and for a version of transformers
    that has no door for exchanges.
    """
    layers = require_routable(model, label)
    detach_exchange(model)
    spread = {name: module for name, module in layers.items() if compat.ep_implementation_of(module) is not None}
    if not spread:
        _say_why_not(layers, label)
        return []
    cls = implementations()[exchange.kind]
    for module in spread.values():
        former = compat.ep_implementation_of(module)
        vars(module)[SETTING], vars(module)[FORMER] = exchange, vars(module)["forward"]
        _use(module)
        try:
            compat.install_ep_implementation(module, former, name_of(exchange.kind), cls)
        except BaseException:
            detach_exchange(model)
            raise
    return list(spread)


def _say_why_not(layers: dict[str, Any], label: str) -> None:
    ranks = collectives.world_size()
    if ranks == 1:
        log.info("%s: one process holds all experts, so that nothing is exchanged: computed as by stock", label)
        return
    if compat.expert_parallel() is None:
        raise ModelError(
            f"{label}: transformers {compat.VERSION[0]}.{compat.VERSION[1]} has no door for exchanges between ranks "
            "(5.23 has): update it, or call hf_optim.toolkit.experts.exchange_experts"
        )
    log.info(
        "%s: %d ranks, each with all experts of %s: nothing is exchanged. Spread them with "
        "from_pretrained(..., distributed_config=DistributedConfig(ep_size=...))",
        label,
        ranks,
        one_line(next(iter(layers), "")),
    )


def attach_stored_exchange(model: nn.Module) -> None:
    """Let the experts of a model exchange as its configuration says, if it does and they do not already."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        exchange = stored_exchange(part.config)
        if exchange is not None and exchange_of(part) != exchange:
            names = attach_exchange(part, exchange, f"the {exchange.kind} exchange in config.json")
            if names:
                log.info("experts exchange tokens between ranks (%s), as config.json states", exchange.kind)
        return


def detach_exchange(model: nn.Module) -> None:
    """Let the experts of a model exchange as transformers does. Without an exchange of ours, do nothing."""
    for module in list(model.modules()):
        held = vars(module)
        held.pop(SETTING, None)
        former = held.pop(FORMER, None)
        if former is not None:
            held["forward"] = former
            _users.discard(module)
            if (layer := layer_of(module)) is not None:
                layer.planned_before = False
    _remove_unused()


def exchange_of(model: nn.Module) -> Exchange | None:
    """Return the setting by which the experts of a model exchange at present, or None."""
    return next((found for module in model.modules() if (found := vars(module).get(SETTING)) is not None), None)


def register_exchanges() -> tuple[str, ...]:
    """Register our names for ``DistributedConfig(ep_implementation=...)``, until ``unregister_exchanges``.

    They then work with stock ``from_pretrained``, with the default settings. Returns the names. Raises ``ModelError``
    for a version of transformers without that registry.
    """
    classes = implementations()
    if not classes:
        raise ModelError("transformers before 5.23 has no registry of exchanges between ranks: update it")
    for kind, cls in classes.items():
        compat.register_ep_implementation(name_of(kind), cls)
        _kept.add(kind)
    return tuple(map(name_of, classes))


def unregister_exchanges() -> None:
    """Undo ``register_exchanges``. A name stays while a model that was given an exchange uses it."""
    _kept.clear()
    _remove_unused()


def expert_exchange(model: nn.Module) -> dict[str, Any]:
    """Return by the name of each module of experts how its tokens are exchanged on this rank.

    Each entry has ``kind``, ``nodes``, ``ranks_per_node``, ``order``, ``messages``; ``adaptive`` has ``choices``, one
    for each bucket of tokens and load, with the times in milliseconds. Empty for a model without our exchange.
    """
    found: dict[str, Any] = {}
    for name, module in fused_experts(model).items():  # type: ignore[arg-type]
        layer: Any = compat.ep_implementation_of(module)
        if type(layer) in implementations().values():
            found[name] = layer.report()
    return found


def name_of(kind: str) -> str:
    """Return the name of a kind of exchange in transformers' registry."""
    return f"hf_optim_{kind}"


def _use(module: nn.Module) -> None:
    for kind, cls in implementations().items():
        compat.register_ep_implementation(name_of(kind), cls)
    if module not in _users:
        _users.add(module)
        weakref.finalize(module, _remove_unused)


def _remove_unused() -> None:
    if any(True for _ in _users):
        return
    for kind in implementations():
        if kind not in _kept:
            compat.register_ep_implementation(name_of(kind), None)
