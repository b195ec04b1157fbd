"""Which layers the patterns of a step select: layers of the blocks by any pattern, layers with a role by their names.

A class name (``Linear``) and a pattern that also matches layers of the blocks leave layers with a role alone. A name
pattern that matches layers with a role only (``*vision_tower*``) selects them, except routers, gates of shared experts
and output heads: those, only an exact name selects. Embeddings are selected by a pattern that matches no linear layer,
if the technique takes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .experts import ExpertLinear, expert_linears, expert_stacks, fused_experts
from .linear_layers import is_linear, linears, parameter_names
from .roles import BY_EXACT_NAME, Role, roles
from .selection import match, matches_class

NAMED = 3  # names that a message gives
Takes = Callable[[Any], bool]


def select_layers(
    model: nn.Module,
    targets: Iterable[str],
    skip: Iterable[str] = (),
    *,
    experts: bool = False,
    embeddings: bool = False,
) -> dict[str, Any]:
    """Return the layers of a model that ``targets`` select and ``skip`` does not, by name.

    Args:
        model: the model.
        targets, skip: patterns (see ``match``).
        experts: include the matrices of experts (``ExpertLinear``).
        embeddings: include ``nn.Embedding`` modules that a pattern names.

    Raises ``ValueError`` if a pattern matches no layer of these kinds.
    """
    targets, skip = tuple(targets), tuple(skip)
    layers: dict[str, Any] = dict(linears(model))
    if experts:
        layers |= expert_linears(model)
    tables = _embeddings(model) if embeddings else {}
    for_tables = [pattern for pattern in targets if tables and _names_tables(pattern, layers, tables)]
    for_layers = [pattern for pattern in targets if pattern not in for_tables]
    # A pattern of ``skip`` may match either.
    optional = {pattern for pattern in skip if tables and match(tables, [pattern], optional=[pattern])}
    chosen = {name: layers[name] for name in match(layers, for_layers, skip, optional)}
    chosen |= {name: tables[name] for name in match(tables, for_tables, skip, skip)} if for_tables else {}
    if all(name in targets or not isinstance(layer, nn.Module) for name, layer in chosen.items()):
        return chosen
    taken = set(targets)
    found = roles(model)
    for pattern in for_layers:
        taken |= _effective(pattern, layers, found)
    return {name: layer for name, layer in chosen.items() if name in taken or name in tables}


def unprunable_experts(
    model: nn.Module, targets: Iterable[str], skip: Iterable[str] = (), why: str = "", inside: str = ""
) -> dict[str, list[str]]:
    """Return the modules with experts that ``targets`` select and a step leaves alone, by reason.

    Args:
        model: the model.
        targets, skip: patterns (see ``match``); ``Linear`` selects experts.
        why: why the step leaves experts alone; ``""`` for a step that takes those on transformers' interface, and
            leaves only experts with a layout of their own.
        inside: the qualified name of the block that the step works on; ``""`` for the model.
    """
    targets, skip = tuple(targets), tuple(skip)
    views = expert_linears(model)
    named: dict[str, Any] = {**linears(model), **views}
    patterns = {*targets, *skip}
    chosen = {views[name].experts_name for name in match(named, targets, skip, patterns) if name in views}
    left: dict[str, list[str]] = {}
    native = fused_experts(model)
    for name, module in expert_stacks(model).items():
        if inside and not f"{name}.".startswith(f"{inside}."):
            continue
        if name in native:
            if why and name in chosen:
                left.setdefault(why, []).append(name)
        elif "Linear" in targets and not match({name: module}, skip, optional=skip):
            kind = type(module).__name__
            reason = f"{kind} stores its experts in a layout of its own; experts on transformers' interface are pruned"
            left.setdefault(why or reason, []).append(name)
    return left


def left_alone(model: nn.Module, targets: Iterable[str], skip: Iterable[str] = ()) -> dict[str, list[str]]:
    """Return what a selection leaves alone because of its role, though a pattern of ``targets`` matches it, by role.

    Modules with a bare weight that routes count if ``Linear`` is a target.
    """
    targets, skip = tuple(targets), tuple(skip)
    found = roles(model)
    modules = dict(model.named_modules())
    named: dict[str, Any] = {name: modules[name] for name in found}
    patterns = {*targets, *skip}
    matched = set(match(named, targets, skip, optional=patterns))
    if "Linear" in targets:
        bare = [name for name, module in named.items() if not is_linear(module)]
        matched |= set(bare) - set(match({name: named[name] for name in bare}, skip, optional=patterns))
    layers = linears(model)
    taken = set(targets).union(*(_effective(pattern, layers, found) for pattern in targets))
    left: dict[str, list[str]] = {}
    for name in named:
        if name in matched and name not in taken:
            left.setdefault(str(found[name]), []).append(name)
    return left


def ineffective_pattern(model: nn.Module, targets: Iterable[str], skip: Iterable[str], takes: Takes) -> str:
    """Return why a pattern has no effect although it matches names, or ``""`` if every pattern has one.

    Args:
        model: the model.
        targets, skip: patterns (see ``match``).
        takes: returns True for a module, or an ``ExpertLinear``, of a kind that the step works on.

    Raises ``ValueError`` for a pattern that matches nothing in the model.
    """
    targets, skip = tuple(targets), tuple(skip)
    everything: dict[str, Any] = {**dict(model.named_modules()), **expert_linears(model)}
    everything.pop("", None)
    match(everything, targets, skip)
    found = roles(model)
    for pattern in targets:
        matched = {name: everything[name] for name in match(everything, [pattern])}
        taken = {name: module for name, module in matched.items() if takes(module)}
        layers = {name: module for name, module in taken.items() if not isinstance(module, nn.Embedding)}
        if not taken:
            return (
                f"{pattern!r} in targets matches {_counted(matched)}, which this technique does not work on"
                + _inside(pattern, matched, takes)
            )
        named = not matches_class(layers.values(), pattern) or any(name not in found for name in linears(model))
        if layers and named and not _effective(pattern, layers, found):
            return _left_alone_message(pattern, {name: found[name] for name in layers if name in found})
        if not layers and (tied := _tied_table(model, taken)):
            return f"{pattern!r} in targets matches {tied}"
    for pattern in skip:
        matched = {name: everything[name] for name in match(everything, [pattern])}
        # What is left alone because of its role anyway, or because it is an expert, is what was asked.
        if not any(
            takes(module) or name in found or isinstance(module, ExpertLinear) for name, module in matched.items()
        ):
            return (
                f"{pattern!r} in skip matches {_counted(matched)}, which this technique leaves alone anyway"
                + _inside(pattern, matched, takes)
            )
    return ""


def _effective(pattern: str, layers: Mapping[str, Any], found: Mapping[str, Role]) -> set[str]:
    """Return the layers that one pattern of ``targets`` selects, given the roles of all layers."""
    matched = set(match(layers, [pattern], optional=[pattern]))
    if pattern in matched:
        return {pattern}
    inside = {name for name in matched if name not in found}
    if inside or matches_class(layers.values(), pattern):
        return inside
    return {name for name in matched if found[name] not in BY_EXACT_NAME}


def _inside(pattern: str, matched: Mapping[str, Any], takes: Takes) -> str:
    """Return a hint if an exact name is that of a module with layers inside."""
    parts = matched[pattern].modules() if pattern in matched and isinstance(matched[pattern], nn.Module) else ()
    return f"; write '{pattern}.*' for the layers in it" if any(map(takes, parts)) else ""


def _embeddings(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _names_tables(pattern: str, layers: Mapping[str, Any], tables: Mapping[str, nn.Module]) -> bool:
    """Return True if a pattern matches embeddings and no linear layer."""
    return bool(match(tables, [pattern], optional=[pattern])) and not match(layers, [pattern], optional=[pattern])


def _tied_table(model: nn.Module, tables: Mapping[str, Any]) -> str:
    """Describe the first embedding whose weight another module has too, or return ``""``."""
    holders = parameter_names(model)
    for name, table in tables.items():
        others = [other for other in holders.get(id(table._parameters.get("weight")), ()) if other != f"{name}.weight"]
        if others:
            return (
                f"{name}, which is tied to {others[0]}: a change of the table would change that as well. "
                "Leave it out, or untie the weights first (tie_word_embeddings=False)"
            )
    return ""


def _left_alone_message(pattern: str, found: Mapping[str, Role]) -> str:
    """Say that everything a pattern matches is left alone, by role, and which patterns take it."""
    counts = Counter(found.values())
    parts = [f"{count} {'layers' if count > 1 else 'layer'} with the role {role!s}" for role, count in counts.items()]
    exact = [name for name, role in found.items() if role in BY_EXACT_NAME]
    text = f"{pattern!r} in targets matches {' and '.join(parts)} ({_few(list(found))})"
    if len(exact) == len(found):
        return f"{text}, which only an exact name selects: write {exact[0]} to include it, or leave the pattern out"
    first = next(name for name in found if name not in exact)
    # The first part of the name that says something names the tower, the pooler or the projector.
    telling = (part for part in first.split(".") if part not in ("model", "encoder", "layers") and not part.isdigit())
    named = next(telling, first)
    return (
        f"{text}, which a class name leaves alone: write a pattern of their names, such as '*{named}*', to include them"
    )


def _counted(modules: Mapping[str, Any]) -> str:
    """Return ``"2 LlamaRMSNorm modules (model.norm, ...)"``."""
    kinds = Counter(type(module).__name__ for module in modules.values())
    named = ", ".join(f"{count} {kind} module{'s' if count > 1 else ''}" for kind, count in kinds.most_common(2))
    return f"{named} ({_few(list(modules))})"


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def default_takes(module: Any) -> bool:
    """Return True for what most techniques work on: linear layers of both classes, and matrices of experts."""
    return isinstance(module, ExpertLinear) or is_linear(module)
