"""The ``quantization_config`` of config.json: schemes, and patterns that match exactly the modules of each."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError, ModelError
from ..toolkit import topology
from ..toolkit.topology.experts import fused_experts, matrix_names
from .codec import scheme_on
from .experts import checkpoint_modules, checkpoint_rows, expert_schemes, stored_scheme
from .state import quantized_modules

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import CompressedTensorsConfig


def stored_schemes(model: nn.Module, off_grid: Iterable[str] = ()) -> dict[str, QuantizationScheme]:
    """Return the scheme of every quantized module, by name.

    A module in ``off_grid`` is saved with a dense weight: its scheme is reduced to that of its inputs, or omitted.
    Fused experts have the one scheme in which all of them are stored.
    """
    schemes: dict[str, QuantizationScheme] = {name: scheme_on(m) for name, m in quantized_modules(model).items()}
    experts = stored_scheme(model)
    schemes |= {name: experts for name, m in model.named_modules() if experts is not None and expert_schemes(m)}
    for name in off_grid:
        scheme = schemes.pop(name)
        if scheme.input_activations is not None:
            schemes[name] = scheme.model_copy(update={"weights": None, "format": "dense"})
    return schemes


def quantization_config(
    model: nn.Module, schemes: Mapping[str, QuantizationScheme], original: nn.Module | None = None
) -> CompressedTensorsConfig:
    """Build the ``quantization_config`` of config.json from the scheme of every quantized module, by name.

    ``original`` is the model that ``model`` is a copy of, if it is one; its graph has been traced already.
    Raises ``CheckpointError`` if no patterns match exactly the modules of each scheme.
    """
    from transformers import CompressedTensorsConfig

    by_scheme: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    experts = {name: scheme for name, scheme in schemes.items() if expert_schemes(model.get_submodule(name))}
    for name, scheme in schemes.items():
        if name not in experts:
            by_scheme.setdefault(_key(scheme), (scheme, []))[1].append(name)
    targets, ignore = target_patterns(model, [names for _, names in by_scheme.values()], original)
    common = next(iter(experts.values()), None)
    if common is not None and (targets != [["Linear"]] or [*by_scheme] != [_key(common)]):
        # transformers takes the scheme of experts from the first group with a pattern that contains "experts".
        by_scheme = {"experts": (common, []), **by_scheme}
        targets = [expert_patterns(checkpoint_modules(model)), *targets]
    groups: dict[str, Any] = {
        f"group_{i}": {**scheme.model_dump(), "targets": found}
        for i, ((scheme, _), found) in enumerate(zip(by_scheme.values(), targets, strict=True))
    }
    formats = {str(getattr(s.format, "value", s.format)) for s, _ in by_scheme.values()}
    return CompressedTensorsConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=ignore,
    )


def _key(scheme: QuantizationScheme) -> str:
    return scheme.model_dump_json(exclude={"targets"})


def expert_patterns(names: Iterable[str]) -> list[str]:
    """Return patterns that match experts by the end of their names; the rest differs between model and checkpoint."""
    ends = sorted({re.sub(r"^.*?([^.]*experts[^.]*)\.\d+\.", r"\1.0.", name) for name in names})
    return [r"re:.*\b" + re.escape(end).replace(r"\.0\.", r"\.\d+\.", 1) + "$" for end in ends]


def target_patterns(
    model: nn.Module, groups: list[list[str]], original: nn.Module | None = None
) -> tuple[list[list[str]], list[str]]:
    """Return compressed-tensors target patterns for each group of module names, and patterns to ignore.

    The first of these forms that matches exactly the groups is returned: the class ``Linear`` with an ignore list (for
    a single group), regular expressions without layer numbers, one regular expression per module. The patterns match
    the same modules in the base model, and under another head. Raises ``CheckpointError`` if no form matches.
    """
    named = dict(model.named_modules())
    chosen = {name for names in groups for name in names}
    others = [name for name, m in named.items() if isinstance(m, nn.Linear) and name not in chosen]
    # Readers that build such routers, and the experts of stacked matrices, as linear layers need them in the list.
    routers = _bare_routers(original if original is not None else model)
    dense_experts = _dense_expert_patterns(original if original is not None else model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    bare = [[name.removeprefix(prefix) for name in names] for names in groups]
    excluded = [name.removeprefix(prefix) for name in others]
    forms: list[tuple[list[list[str]], list[str]]] = []
    if len(groups) == 1:
        forms += [([["Linear"]], _exactly(excluded)), ([["Linear"]], _generalize(excluded))]
        if len(others) > 8:
            forms.reverse()
    forms += [([_generalize(names) for names in bare], []), ([_exactly(names) for names in bare], [])]
    wanted = {name: i for i, names in enumerate(groups) for name in names}
    for targets, ignore in forms:
        if _matches(named, targets, ignore) == wanted:
            listed = [*ignore, *_exactly(name.removeprefix(prefix) for name in routers), *dense_experts]
            return targets, sorted(set(listed)) if targets == [["Linear"]] else ignore
    raise CheckpointError("no compressed-tensors pattern separates the quantized modules of this model from the others")


def _bare_routers(model: nn.Module) -> list[str]:
    """Return the names of modules with a bare weight that routes, in the model and in its checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    bare = [name for name in topology.routes(model) if not isinstance(model.get_submodule(name), nn.Linear)]
    keys = {f"{name}.weight": torch.empty(0, device="meta") for name in bare}
    stored: list[str] = []
    with contextlib.suppress(Exception):  # a conversion that needs more than these tensors: the model's names remain
        stored = [key.removesuffix(".weight") for key in revert_weight_conversion(model, keys)]  # type: ignore[arg-type]
    return sorted({*bare, *stored})


def _dense_expert_patterns(model: nn.Module) -> list[str]:
    """Return patterns for the experts that a checkpoint stores dense, one linear layer each."""
    names: list[str] = []
    for name, module in fused_experts(model).items():
        if not expert_schemes(module):
            with contextlib.suppress(ModelError):  # a checkpoint that stores them stacked
                for parameter in matrix_names(module):
                    rows = checkpoint_rows(model, f"{name}.{parameter}", module)
                    names += [key.removesuffix(".weight") for key in rows]
    return expert_patterns(names)


def _exactly(names: Iterable[str]) -> list[str]:
    # A head has the same name everywhere; modules of the base model may have a prefix.
    return sorted(_anywhere(re.escape(name)) if "." in name else name for name in names)


def _generalize(names: Iterable[str]) -> list[str]:
    return sorted({_anywhere(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))) for name in names})


def _anywhere(pattern: str) -> str:
    return r"re:(?:.*\.)?" + pattern + "$"


def _matches(named: Mapping[str, nn.Module], targets: list[list[str]], ignore: list[str]) -> dict[str, int]:
    from compressed_tensors.utils.match import is_match, match_targets

    group_of = {target: i for i, found in enumerate(targets) for target in found}
    matches = {}
    for name, module in named.items():
        matched = match_targets(name, module, list(group_of))
        if matched and isinstance(module, (nn.Linear, nn.Embedding)) and not is_match(name, module, ignore):
            matches[name] = group_of[matched[0]]
    return matches
