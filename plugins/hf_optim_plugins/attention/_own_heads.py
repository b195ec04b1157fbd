"""The third way to fewer heads: classes with code of their own, see ``_grouped_heads``.

Whether a class splits narrower projections into fewer heads, or needs them repeated, is found by trying it: the
converted class is built without weights and traced, and its attentions must have the heads that they should have.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_optim import ModelError, Reload, Run
from hf_optim.checkpoints.remote_code import RemoteCode, convert, generate
from hf_optim.toolkit.modules import replace
from hf_optim.toolkit.topology import KeyValueHeads, dummy_inputs, find_key_value_heads, trace

from ._head_conversion import Conversion
from ._pooling import kept_rows, output_dim, projections


def by_own_code(
    model: PreTrainedModel, heads: list[KeyValueHeads], kv_heads: int, remote_code: RemoteCode, label: str
) -> Conversion:
    """Return the conversion to a class with own code. Raises ``ModelError`` for a model that can have none."""
    try:
        code: Any = generate(remote_code, type(model.config))  # type: ignore[arg-type]
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error
    own = getattr(code, remote_code.prefix + type(model).__name__, None)
    if own is None:
        raise ModelError(
            f"{label}: {type(model).__name__} is not among the classes that transformers' AutoModel classes support, "
            "so no code can be saved with it"
        )
    if not model._can_set_attn_implementation():
        raise ModelError(
            f"{label}: {type(model).__name__} does not take its attention from transformers' AttentionInterface; this "
            "architecture is not supported"
        )
    for one in heads:
        attention: Any = model.get_submodule(one.module)
        if type(getattr(attention, "config", None)) is not type(model.config):
            raise ModelError(
                f"{label}: the attention of {type(model).__name__} has a configuration of its own; this architecture "
                "is not supported"
            )
    form = next((form for form in _forms(model, heads, kv_heads) if _has_heads(model, own, form, kv_heads)), None)
    if form is None:
        raise ModelError(
            f"{label}: {type(model).__name__} computes its heads in a way in which own code cannot share them; this "
            "architecture is not supported"
        )
    renamed = {name: f"{name}.linear" for name, entry in form.entries.items() if entry["kind"] == "repeat"}

    def apply(run: Run, model: PreTrainedModel) -> PreTrainedModel:
        _replace_modules(run, model, code, form)
        run.rename(lambda name: [_new_name(name, renamed)])
        return convert(model, remote_code, form.field(kv_heads))

    return Conversion(Reload.REMOTE_CODE, apply, renamed)


@dataclass(frozen=True)
class _Form:
    """One form of the model: what the configuration says of each module, and the rows that projections keep.

    Attributes:
        entries: by name of a projection or attention module, see ``_grouped_heads.replacement_of``.
        rows: of each projection, the rows of the original one in their new order, int64.
    """

    entries: dict[str, dict[str, Any]]
    rows: dict[str, Tensor]

    def field(self, kv_heads: int) -> dict[str, Any]:
        """Return the field of the configuration."""
        return {"kv_heads": kv_heads, "modules": self.entries}


def _forms(model: PreTrainedModel, heads: list[KeyValueHeads], kv_heads: int) -> list[_Form]:
    """Return the forms that the model may take, the preferred one first."""
    separate = all(len({one.queries.layer, one.keys.layer, one.values.layer}) == 3 for one in heads)
    made = [_form(model, heads, kv_heads, repeats) for repeats in (False, True) if repeats or separate]
    return [form for form in made if form is not None]


def _form(model: PreTrainedModel, heads: list[KeyValueHeads], kv_heads: int, repeats: bool) -> _Form | None:
    """Return one form; None if rows that are to be repeated are in no known order."""
    form = _Form({}, {})
    for one in heads:
        for name, parts in projections([one]).items():
            layer: Any = model.get_submodule(name)
            size = layer.weight.shape[output_dim(layer)]
            if not repeats:
                form.rows[name] = kept_rows(size, parts, kv_heads)
                form.entries[name] = {"kind": "narrow", "rows": len(form.rows[name])}
            elif (repeated := _repeated(one, name, size, kv_heads)) is not None:
                form.entries[name], form.rows[name] = repeated
            else:
                return None
        form.entries[one.module] = {"kind": "attention", "groups": len(one) // kv_heads, "repeats": repeats}
    return form


def _repeated(heads: KeyValueHeads, name: str, size: int, kv_heads: int) -> tuple[dict[str, Any], Tensor] | None:
    """Return the entry and the rows of a projection that repeats shared heads; None if its rows are in no known order.

    Known orders are those of one part after the other, and of the parts of one head after the other.
    """
    groups = len(heads) // kv_heads
    kinds = ((heads.queries, False), (heads.keys, True), (heads.values, True))
    found = sorted(
        ((part.index, shared) for part, shared in kinds if part.layer == name), key=lambda f: int(f[0].min())
    )
    for by_head in (False, True):
        parts = [rows if by_head else rows.flatten() for rows, _ in found]
        whole = torch.cat(parts, dim=-1)
        if torch.equal(whole.flatten(), torch.arange(size)):
            kept = torch.cat([(rows[::groups] if shared else rows).flatten() for rows, shared in found])
            sizes = {"rows": len(kept), "heads": len(heads), "groups": groups}
            widths = [[rows.shape[1], shared] for rows, shared in found]
            return {"kind": "repeat", **sizes, "parts": widths, "by_head": by_head}, kept
    return None


def _has_heads(model: PreTrainedModel, own: type[PreTrainedModel], form: _Form, kv_heads: int) -> bool:
    """Return True if the model of own code, built without weights, has ``kv_heads`` heads in each attention.

    Also if the original cannot be traced without weights either: then the outputs of the converted model decide.
    """
    config: Any = copy.deepcopy(model.config)
    config.__class__ = own.config_class
    setattr(config, own.replaced_field, copy.deepcopy(form.field(kv_heads)))  # type: ignore[attr-defined]
    with torch.device("meta"):
        twin = own(config)
    try:
        found = find_key_value_heads(trace(twin, dummy_inputs(model)))
    except Exception:  # whatever a class raises whose views do not fit
        return trace(model).used_real_weights
    counts = {one.module: len(one) for one in found}
    attentions = (name for name, entry in form.entries.items() if entry["kind"] == "attention")
    return all(counts.get(name) == kv_heads for name in attentions)


@torch.no_grad()
def _replace_modules(run: Run, model: PreTrainedModel, code: Any, form: _Form) -> None:
    """Put the modules of own code into the model, with the rows that are kept; and keep those rows of masks."""
    for name, entry in form.entries.items():
        original = model.get_submodule(name)
        made = code.replacement_of(original, entry)
        if name in form.rows:
            _fill(made.linear if entry["kind"] == "repeat" else made, original, form.rows[name])
            if (mask := run.masks.get(f"{name}.weight")) is not None:
                run.masks[f"{name}.weight"] = mask.index_select(output_dim(original), form.rows[name])
        replace.replace_module(model, name, made)


def _fill(made: nn.Module, layer: nn.Module, rows: Tensor) -> None:
    """Copy the rows of a projection into a narrower one."""
    for name, parameter in made.named_parameters():
        source = layer.get_parameter(name)
        dim = output_dim(layer) if parameter.dim() > 1 else 0
        parameter.copy_(source.index_select(dim, rows.to(source.device)))


def _new_name(name: str, new_names: Mapping[str, str]) -> str:
    """Return the new name of a module, or of one of its parameters."""
    for old, new in new_names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name
