"""Roles: what a layer does in its model, where that decides whether a step may change it.

Routers and the gates of shared experts are found on the traced graph (``routing``), and so are output heads, poolers
and projections of embeddings: they lie before or after the blocks. Roles are found once for a model, and kept while its
modules stay the same; a step that quantizes a layer does not change its role.

Where a part of a model is not reached by the traced forward, the role of its counterpart in another block counts, and
without one that of its class, name and size: these err toward leaving a layer alone. A model that cannot be traced at
all is judged that way too, with a warning; finding roles never fails.
"""

from __future__ import annotations

import enum
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from . import routing
from .block_lists import after_tracing, block_of, blocks
from .experts import expert_counts
from .graph import Trace
from .linear_layers import features, is_linear, linears
from .selection import match
from .tracing import trace, trace_until_failure

log = logging.getLogger(__name__)


class Role(enum.StrEnum):
    """What a layer does; the value is the reason that a record gives for leaving it alone."""

    ROUTER = routing.ROUTER
    SHARED_EXPERT_GATE = routing.SHARED_EXPERT_GATE
    OUTPUT_HEAD = "output head"
    TOWER = "part of a vision or audio tower that the text does not pass"
    OUTSIDE_BLOCKS = "outside the blocks (a pooler, a projector, a projection of embeddings)"


_cache: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], dict[str, Role]]] = WeakKeyDictionary()
"""Model -> the identities of its modules, and the roles found for them."""

MEDIA_INPUTS = ("pixel_values", "input_features", "input_values", "audio_values")


def _remember(traced: Trace) -> None:
    """Find the roles of a model that was just traced for its blocks, so that it is not traced twice."""
    roles(traced)


after_tracing.append(_remember)


def roles(source: nn.Module | Trace) -> dict[str, Role]:
    """Return the role of each layer that has one by name; layers without a role are those that steps work on.

    The names are those of linear layers, and of modules with a bare weight that routes. Layers of the blocks have no
    role unless they route.
    """
    model = source.model if isinstance(source, Trace) else source
    state = tuple(id(module) for module in model.modules())
    if _cache.get(model, ((), {}))[0] != state:
        _cache[model] = (state, _find(model, source if isinstance(source, Trace) else None))
    return dict(_cache[model][1])


def routes(source: nn.Module | Trace) -> set[str]:
    """Return the names of the routers and of the gates of shared experts."""
    return {name for name, role in roles(source).items() if role in (Role.ROUTER, Role.SHARED_EXPERT_GATE)}


def left_alone(model: nn.Module, targets: Iterable[str], skip: Iterable[str] = ()) -> dict[str, list[str]]:
    """Return what a selection leaves alone because of its role, though a pattern of ``targets`` selects it, by role.

    A layer that a target names exactly is not left alone. Modules with a bare weight count if ``Linear`` is a target.
    """
    targets, skip = tuple(targets), tuple(skip)
    found = roles(model)
    modules = dict(model.named_modules())
    named: dict[str, Any] = {name: modules[name] for name in found}
    patterns = {*targets, *skip}
    chosen = set(match(named, targets, skip, optional=patterns))
    if "Linear" in targets:
        bare = [name for name, module in named.items() if not is_linear(module)]
        chosen |= set(bare) - set(match({name: named[name] for name in bare}, skip, optional=patterns))
    left: dict[str, list[str]] = {}
    for name in named:
        if name in chosen and name not in targets:
            left.setdefault(str(found[name]), []).append(name)
    return left


def output_heads(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of ``names`` that lie outside the blocks or are the output embedding: see ``is_output_head``."""
    found = roles(model)
    for name in (names := list(names)):
        model.get_submodule(name)
    return {name for name in names if found.get(name) not in (None, Role.ROUTER, Role.SHARED_EXPERT_GATE)}


def is_output_head(model: nn.Module, name: str) -> bool:
    """Return True if the linear layer ``name`` is the model's output embedding, or lies outside all blocks.

    False for any other module. Raises ``AttributeError`` if the model has no module of that name.
    """
    return name in output_heads(model, [name])


def _find(model: nn.Module, traced: Trace | None) -> dict[str, Role]:
    try:
        traced = traced or trace(model)
        found = blocks(traced)
        result = _outside(model, traced, [name for name in linears(model) if block_of(found, name) is None])
        return result | _routing(model, traced, [block.name for block in found])
    except Exception as error:  # whatever a forward raises: without weights, or for inputs that it cannot take
        return _without_blocks(model, error)


def _routing(model: nn.Module, traced: Trace | None, names: list[str]) -> dict[str, Role]:
    """Return what routes: on the trace, else as counterparts in other blocks, else by class, name and size."""
    modules = dict(model.named_modules())
    found: dict[str, str] = routing.find_routing(traced, names) if traced is not None else {}
    reached: set[str] = set()
    if traced is not None:
        reached = {call.name for call in traced.calls} - routing.unfinished(traced)
    counterparts = routing.siblings(found, modules, reached)
    found |= {name: role for name, role in counterparts.items() if role is not None}
    known = {*reached, *counterparts}
    hints = _hints(model, untraced=traced is None or traced.partial)
    found |= {name: role for name, role in hints.items() if name not in known and name not in found}
    return {name: Role(role) for name, role in found.items() if name in modules}


def _without_blocks(model: nn.Module, error: Exception) -> dict[str, Role]:
    """Return the roles in a model that cannot be traced, and warn if nothing of its forward is known.

    What lies in no numbered module counts as outside the blocks.
    """
    traced = None
    try:
        traced = trace_until_failure(model)  # type: ignore[arg-type]
        routes = _routing(model, traced, [])
    except Exception:  # there are no inputs to begin with
        traced, routes = None, _routing(model, None, [])
    embedding = _output_embedding(model)
    result = {
        name: Role.OUTPUT_HEAD if layer is embedding else Role.OUTSIDE_BLOCKS
        for name, layer in linears(model).items()
        if layer is embedding or not any(part.isdigit() for part in name.split("."))
    }
    if traced is None or not any(parameter.is_meta for parameter in model.parameters()):
        log.warning(
            "%s could not be traced (%s: %s): its routers and heads are recognized by class, name and size alone, and "
            "%d layers are left alone; if a layer that routes has another name, list it under skip",
            type(model).__name__,
            type(error).__name__,
            error,
            len(result | routes),
        )
    return result | routes


def _output_embedding(model: nn.Module) -> nn.Module | None:
    try:
        return getattr(model, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError):  # a composed model without a language model
        return None


def _outside(model: nn.Module, traced: Trace, names: list[str]) -> dict[str, Role]:
    """Return the roles of linear layers outside the blocks, and of the output embedding."""
    embedding = _output_embedding(model)
    towers = [name for name, module in model.named_modules() if name and _takes_media(module)]
    reached = {call.name for call in traced.calls}
    heads = _heads(traced)
    result = {}
    for name in names:
        if name in heads or model.get_submodule(name) is embedding:
            result[name] = Role.OUTPUT_HEAD
        elif name not in reached and any(name.startswith(tower + ".") for tower in towers):
            result[name] = Role.TOWER
        else:
            result[name] = Role.OUTSIDE_BLOCKS
    if embedding is not None:
        result |= {name: Role.OUTPUT_HEAD for name, layer in linears(model).items() if layer is embedding}
    return result


def _heads(traced: Trace) -> set[str]:
    """Return the linear layers whose outputs reach an output of the model without another linear layer."""
    alive, found = set(traced.outputs), set()
    for op in reversed(traced.ops):
        if alive.intersection(op.produces):
            if op.linear is not None:
                found.add(op.linear)
            else:
                alive.update(op.reads)
    return found


def _takes_media(module: nn.Module) -> bool:
    return getattr(module, "main_input_name", None) in MEDIA_INPUTS


def _hints(model: nn.Module, untraced: bool) -> Mapping[str, str]:
    """Return what seems to route by class, name and size; the caller uses it where no trace tells.

    In a model that was not traced, a layer with one output for each expert counts under any name, and a name that says
    so counts without a number of experts in the config.
    """
    counts = expert_counts(model)
    found: dict[str, str] = {}
    if not counts and not untraced:
        return found
    for name, module in model.named_modules():
        parts = name.split(".")
        near = [type(module).__name__, type(model.get_submodule(".".join(parts[:-1]))).__name__, parts[-1]]
        routing_name = any(re.search(r"rout|gating", part, re.IGNORECASE) for part in (*near, *parts[-2:]))
        weight = module._parameters.get("weight")
        if is_linear(module):
            rows = features(module)[0]
            named = re.search(r"gate$|^wg$|classifier", parts[-1])
            if routing_name or (rows in counts and (named or untraced)):
                found[name] = Role.ROUTER
            elif rows == 1 and "gate" in parts[-1]:
                found[name] = Role.SHARED_EXPERT_GATE
        elif weight is not None and weight.dim() == 2 and len(weight) in counts and "mbedding" not in near[0]:
            found[name] = Role.ROUTER
    return found
