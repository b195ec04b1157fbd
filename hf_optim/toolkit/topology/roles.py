"""Roles: what a layer does in its model, where that decides whether a step may change it.

Routers and the gates of shared experts are found on the traced graph (``routing``), and so are output heads, poolers
and projections of embeddings: they lie before or after the blocks. Roles are found once for a model, and kept while its
modules stay the same; a step that quantizes a layer does not change its role.

Poolers, projectors and the layers of vision and audio towers are told from other layers outside the blocks by class
and name (``towers``).

Where a part of a model is not reached by the traced forward, the role of its counterpart in another block counts, and
without one that of its class, name and size: these err toward leaving a layer alone. A model that cannot be traced at
all is judged that way too, with a warning; finding roles never fails.
"""

from __future__ import annotations

import enum
import logging
import re
from collections.abc import Iterable, Mapping
from weakref import WeakKeyDictionary

from torch import nn

from . import routing
from .block_lists import after_tracing, block_of, blocks
from .experts import expert_counts
from .graph import Trace
from .linear_layers import features, is_linear, linears
from .towers import VISION, is_pooler, is_projector, tower_of, towers
from .tracing import trace, trace_until_failure

log = logging.getLogger(__name__)


class Role(str, enum.Enum):  # enum.StrEnum is newer than Python 3.10
    """What a layer does; the value is the name of the role on the record."""

    __str__ = str.__str__

    ROUTER = routing.ROUTER
    SHARED_EXPERT_GATE = routing.SHARED_EXPERT_GATE
    OUTPUT_HEAD = "output head"
    VISION_TOWER = "vision tower"
    AUDIO_TOWER = "audio tower"
    PROJECTOR = "projector"
    POOLER = "pooler"
    OUTSIDE_BLOCKS = "other linear layer outside the blocks"


ROUTING = frozenset({Role.ROUTER, Role.SHARED_EXPERT_GATE})
"""Roles of layers that choose experts, or weigh them."""
BY_EXACT_NAME = ROUTING | {Role.OUTPUT_HEAD}
"""Roles of layers that a step changes only if a target is their exact name; other roles need a pattern that names them,
that is one which matches layers with roles only."""


_cache: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], dict[str, Role]]] = WeakKeyDictionary()
"""Model -> the identities of its modules, and the roles found for them."""


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
    return {name for name, role in roles(source).items() if role in ROUTING}


def output_heads(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of ``names`` that lie outside the blocks or are the output embedding: see ``is_output_head``."""
    found = roles(model)
    for name in (names := list(names)):
        model.get_submodule(name)
    return {name for name in names if found.get(name) not in {None, *ROUTING}}


def is_output_head(model: nn.Module, name: str) -> bool:
    """Return True if the linear layer ``name`` is the model's output embedding, or lies outside all blocks.

    False for any other module. Raises ``AttributeError`` if the model has no module of that name.
    """
    return name in output_heads(model, [name])


def _find(model: nn.Module, traced: Trace | None) -> dict[str, Role]:
    try:
        traced = traced or trace(model)
        found = blocks(traced)
        inside = [block.name for block in found]
        result = _outside(model, traced, [name for name in linears(model) if block_of(found, name) is None], inside)
        return result | _routing(model, traced, inside)
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
        name: Role.OUTPUT_HEAD if layer is embedding else _named_role(model, name) or Role.OUTSIDE_BLOCKS
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


def _outside(model: nn.Module, traced: Trace, names: list[str], main_blocks: list[str]) -> dict[str, Role]:
    """Return the roles of linear layers outside the blocks, and of the output embedding."""
    embedding = _output_embedding(model)
    found = towers(model, main_blocks)
    heads = _heads(traced)
    result: dict[str, Role] = {}
    for name in names:
        if model.get_submodule(name) is embedding:
            result[name] = Role.OUTPUT_HEAD
        elif role := _named_role(model, name):
            result[name] = role
        elif name in heads:
            result[name] = Role.OUTPUT_HEAD
        elif media := tower_of(found, name):
            result[name] = Role.VISION_TOWER if media == VISION else Role.AUDIO_TOWER
        else:
            result[name] = Role.OUTSIDE_BLOCKS
    if embedding is not None:
        result |= {name: Role.OUTPUT_HEAD for name, layer in linears(model).items() if layer is embedding}
    return result


def _named_role(model: nn.Module, name: str) -> Role | None:
    """Return the role that the names and classes around a layer outside the blocks say, if any."""
    if is_pooler(model, name):
        return Role.POOLER
    return Role.PROJECTOR if is_projector(model, name) else None


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
