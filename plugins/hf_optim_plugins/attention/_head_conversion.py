"""Three ways in which a model with equal heads in each group gets one head for each: see ``mqa``.

A conversion is planned on a model whose weights may be on the meta device, and applied to the same model once its heads
are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_optim import ModelError, Reload, Run
from hf_optim.checkpoints.remote_code import RemoteCode, convert, generate, revert
from hf_optim.toolkit.modules import main_output, replace, rounding_tolerance, transplant
from hf_optim.toolkit.pruning import shrink
from hf_optim.toolkit.topology import KeyValueHeads, dummy_inputs

from ._pooling import kept_rows, output_dim, projections


@dataclass(frozen=True)
class Conversion:
    """How a model gets fewer heads.

    Attributes:
        reload: how stock transformers loads the result.
        apply: makes the model, given the run (whose masks and names it changes) and the model with equal heads.
        new_names: projections that have another name afterwards.
    """

    reload: Reload
    apply: Callable[[Run, PreTrainedModel], PreTrainedModel]
    new_names: Mapping[str, str]

    def new_name(self, name: str) -> str:
        """Return the name of a projection afterwards."""
        return self.new_names.get(name, name)


# -- the same class, with another configuration -----------------------------------------------------------------------
def by_stock_config(model: PreTrainedModel, heads: list[KeyValueHeads], kv_heads: int, label: str) -> Conversion | None:
    """Return the conversion of a class whose configuration has a number of key/value heads; None for any other.

    Raises ``ModelError`` if no number there gives the narrower projections.
    """
    if not has_field(model.config):
        return None
    kept: dict[str, dict[int, Tensor]] = {}
    for name, parts in projections(heads).items():
        layer = model.get_submodule(name)
        assert isinstance(layer.weight, Tensor)
        dim = output_dim(layer)
        rows = kept_rows(layer.weight.shape[dim], parts, kv_heads)
        kept[f"{name}.weight"] = {dim: rows}
        if layer.bias is not None:
            kept[f"{name}.bias"] = {0: rows}
    slicing = shrink.Slicing(kept, {len(one): kv_heads for one in heads}, kv_heads)
    try:
        plan = shrink.plan(model, [slicing])
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error

    def apply(run: Run, model: PreTrainedModel) -> PreTrainedModel:
        shrink.apply_(model, plan)
        run.masks.update({name: plan.slice(name, mask) for name, mask in run.masks.items()})
        return model

    return Conversion(Reload.STOCK_ARCH, apply, {})


def has_field(config: PretrainedConfig) -> bool:
    """Return True if a configuration, or one of its parts, has a number of key/value heads."""
    parts = [config, *(value for value in vars(config).values() if isinstance(value, PretrainedConfig))]
    return any("kv_heads" in name or "key_value_heads" in name for part in parts for name in vars(part))


# -- GPT-BigCode ------------------------------------------------------------------------------------------------------
def by_bigcode(model: PreTrainedModel, heads: list[KeyValueHeads], kv_heads: int) -> Conversion | None:
    """Return the conversion of a GPT-2 to a GPT-BigCode, which has one key/value head; None for any other model."""
    config = model.config
    if config.model_type != "gpt2" or kv_heads != 1 or config.add_cross_attention:
        return None
    target_config = transplant.config_class_of("gpt_bigcode")
    target = transplant.find_counterpart(type(model), type(config), target_config)
    unlike = config.scale_attn_by_inverse_layer_idx or config.reorder_and_upcast_attn
    if target is None or unlike or {len(one) for one in heads} != {config.n_head}:
        return None
    translated = transplant.translate_config(config, target_config, multi_query=True, num_key_value_heads=None)
    kept = {name: kept_rows(3 * config.n_embd, parts, 1) for name, parts in projections(heads).items()}

    def apply(run: Run, model: PreTrainedModel) -> PreTrainedModel:
        for name, module in model.named_modules():  # until here the shapes are those of GPT-2, in the target's order
            if isinstance(module, Conv1D):
                rows = kept.get(name, torch.arange(module.weight.shape[1]))
                module.weight = _parameter(module.weight.T, rows)
                module.bias = _parameter(module.bias, rows)
                if (mask := run.masks.get(f"{name}.weight")) is not None:
                    run.masks[f"{name}.weight"] = mask.T[rows].contiguous()
        made, spare = transplant.transplant(model, target, translated)
        _fill_buffers(made, target, translated)
        if spare or (missing := transplant.meta_tensor_names(made)):
            left = ", ".join([*sorted(spare), *missing][:4])
            raise ModelError(f"{type(model).__name__} and {target.__name__} do not have the same tensors: {left}")
        return made

    return Conversion(Reload.STOCK_ARCH, apply, {})


def _fill_buffers(made: PreTrainedModel, target: type[PreTrainedModel], config: PretrainedConfig) -> None:
    """Give a model the buffers that no checkpoint has, as its class makes them: of a model without layers."""
    small = transplant.translate_config(config, type(config), n_layer=0, vocab_size=1, n_embd=config.n_head)
    buffers = dict(target(small).named_buffers())
    for name in transplant.meta_tensor_names(made):
        if name in buffers:
            transplant.set_tensor(made, name, buffers[name].to(made.device))


def _parameter(tensor: Tensor, rows: Tensor) -> nn.Parameter:
    """Return the rows of a parameter, or of its transpose, as a parameter."""
    taken = tensor.detach().index_select(0, rows.to(tensor.device)).contiguous()
    return nn.Parameter(taken, requires_grad=tensor.requires_grad)


# -- own code ---------------------------------------------------------------------------------------------------------
def by_own_code(
    model: PreTrainedModel, heads: list[KeyValueHeads], kv_heads: int, remote_code: RemoteCode, label: str
) -> Conversion:
    """Return the conversion to a class with own code. Raises ``ModelError`` for a model that can have none."""
    try:
        code: Any = generate(remote_code, type(model.config))  # type: ignore[arg-type]
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error
    if not hasattr(code, remote_code.prefix + type(model).__name__):
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
    forms = _forms(model, heads, kv_heads, label)

    def apply(run: Run, model: PreTrainedModel) -> PreTrainedModel:
        return _apply_own_code(run, model, kv_heads, remote_code, code, forms, new_names)

    new_names: dict[str, str] = {}
    return Conversion(Reload.REMOTE_CODE, apply, new_names)


@dataclass(frozen=True)
class _Form:
    """One form of the model: what the configuration says of each module, and the rows that projections keep.

    Attributes:
        entries: by name of a projection or attention module, see ``_grouped_heads.replacement_of``.
        rows: of each projection, the rows of the original one in their new order, int64.
    """

    entries: dict[str, dict[str, Any]]
    rows: dict[str, Tensor]


def _forms(model: PreTrainedModel, heads: list[KeyValueHeads], kv_heads: int, label: str) -> list[_Form]:
    """Return the forms that the model may take, the preferred one first. Raises ``ModelError`` if there is none."""
    separate = all(len({one.queries.layer, one.keys.layer, one.values.layer}) == 3 for one in heads)
    if any(one.crosses for one in heads) and not separate:
        raise ModelError(
            f"{label}: the cross-attention of {type(model).__name__} has a fused projection; this architecture is not "
            "supported"
        )
    forms = []
    for repeats in (False, True):
        if (repeats and any(one.crosses for one in heads)) or not (repeats or separate):
            continue
        form = _Form({}, {})
        for one in heads:
            for name, parts in projections([one]).items():
                size = _rows(model, name)
                if not repeats:
                    form.rows[name] = kept_rows(size, parts, kv_heads)
                    form.entries[name] = {"kind": "narrow", "rows": len(form.rows[name])}
                elif (repeated := _repeated(one, name, size, kv_heads)) is not None:
                    form.entries[name], form.rows[name] = repeated
                else:
                    raise ModelError(
                        f"{label}: the rows of heads in {name} are in an order that own code cannot repeat; this "
                        "architecture is not supported"
                    )
            form.entries[one.module] = {"kind": "attention", "groups": len(one) // kv_heads, "repeats": repeats}
        forms.append(form)
    return forms


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


@torch.no_grad()
def _apply_own_code(
    run: Run,
    model: PreTrainedModel,
    kv_heads: int,
    remote_code: RemoteCode,
    code: Any,
    forms: list[_Form],
    new_names: dict[str, str],
) -> PreTrainedModel:
    """Give the model its own class, in the first form that computes what the model with equal heads does."""
    inputs = dummy_inputs(model)
    expected = main_output(model, inputs)
    originals = {name: model.get_submodule(name) for name in forms[0].entries}
    classes = {name: type(module) for name, module in originals.items()}
    for form in forms:
        for name, entry in form.entries.items():
            made = code.replacement_of(originals[name], entry)
            if name in form.rows:
                _fill(made.linear if entry["kind"] == "repeat" else made, originals[name], form.rows[name])
            replace.replace_module(model, name, made)
        convert(model, remote_code, {"kv_heads": kv_heads, "modules": form.entries})
        if form is forms[-1] or _computes(model, inputs, expected):
            break
        revert(model)
        for name, module in originals.items():
            replace.replace_module(model, name, module)
            module.__class__ = classes[name]
            module.__dict__.pop("num_key_value_groups", None)
    for name, rows in form.rows.items():
        if (mask := run.masks.get(f"{name}.weight")) is not None:
            run.masks[f"{name}.weight"] = mask.index_select(output_dim(originals[name]), rows)
        if form.entries[name]["kind"] == "repeat":
            new_names[name] = f"{name}.linear"
    run.rename(lambda name: [_renamed(name, new_names)])
    return model


def _rows(model: nn.Module, name: str) -> int:
    layer: Any = model.get_submodule(name)
    return int(layer.weight.shape[output_dim(layer)])


def _fill(made: nn.Module, layer: nn.Module, rows: Tensor) -> None:
    """Copy the rows of a projection into a narrower one."""
    for name, parameter in made.named_parameters():
        source = layer.get_parameter(name)
        dim = output_dim(layer) if parameter.dim() > 1 else 0
        parameter.copy_(source.index_select(dim, rows.to(source.device)))


def _computes(model: PreTrainedModel, inputs: Mapping[str, Tensor], expected: Tensor) -> bool:
    """Return True if the model returns ``expected``; a class that fixes its number of heads raises, or returns less."""
    try:
        found = main_output(model, inputs)
    except (RuntimeError, ValueError):
        return False
    gap = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    return gap <= rounding_tolerance(model) * float(expected.abs().max())


def _renamed(name: str, new_names: Mapping[str, str]) -> str:
    """Return the new name of a module, or of one of its parameters."""
    for old, new in new_names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name
