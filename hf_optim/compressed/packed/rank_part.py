"""This rank's part of a compressed checkpoint: which rows, columns and experts, read from the files slice by slice.

The model on the meta device gets the shapes of the part before its weights are read, so everything after it (layouts,
packing, fused projections, kernels) sees ordinary layers that are smaller. No tensor is read whole that is cut: codes,
scales and zero points are cut along the same rows or the same groups of columns, whatever their layout, since a layout
says which shapes the tensors of a layer of any size have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ...errors import ModelError
from ...toolkit.checkpoint.safetensors import SafetensorsHeaders, TensorInfo
from ...toolkit.distributed import tensor_plan as plans
from ...toolkit.distributed.tensor_parts import COLUMNS, EXPERTS, GATHERED, ROWS, WHOLE, Part, attach_part
from ...toolkit.topology.experts import expert_stacks, matrix_names
from ...trust.code import is_stock
from ..outlier_columns import outlier_thresholds
from .layouts import Layout, TensorSpec

EXPERT_KEY = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)")
ORDERS = ("weight_g_idx", "g_idx")
ONE_SCALE = "its inputs get one scale for each token, over all columns"
TIED = "its weight is tied to the embedding"


@dataclass
class RankPart:
    """A load of one part of a checkpoint.

    Attributes:
        rank, ranks: number of the part, and how many there are.
        plan: the argument ``tp_plan`` of the call.
        files: of the checkpoint.
        state: what is handed to transformers as the state dict; filled when the model is known.
        parts: module -> its part.
    """

    rank: int
    ranks: int
    plan: Any
    files: tuple[Path, ...]
    state: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    _experts: int = 0
    _stored: dict[str, TensorInfo] = field(default_factory=dict)

    def headers_of(self, names: Any) -> SafetensorsHeaders:
        """Return the tensors of the checkpoint, without those of other ranks' experts; ``names`` as there."""
        whole = SafetensorsHeaders(self.files)
        self._stored = {self._own_key(key): entry for key, entry in whole.entries.items()}
        self._stored.pop("", None)
        return _headers_from(self._stored, names)

    def _own_key(self, key: str) -> str:
        """Return the key with the number that its expert has on this rank; empty for an expert of another one."""
        found = EXPERT_KEY.search(key)
        count = self._experts
        if found is None or not count:
            return key
        number = int(found.group()) - self.rank * count
        return key[: found.start()] + str(number) + key[found.end() :] if 0 <= number < count else ""

    def cut_experts(self, model: Any) -> None:
        """Give the modules of experts of a model on the meta device the experts of this rank."""
        self._experts = 0
        for name, module in expert_stacks(model).items():
            count = int(module.num_experts)  # type: ignore[arg-type]
            if count % self.ranks:
                raise ModelError(f"{name} has {count} experts, which {self.ranks} ranks cannot divide evenly")
            own = count // self.ranks
            if self._experts and own != self._experts:
                raise ModelError(f"{name} has another number of experts than others of the model: use one rank")
            self._experts = own
            module.num_experts = own  # type: ignore[assignment]
            for key in (*matrix_names(module), *(f"{key}_bias" for key in matrix_names(module))):
                former = module._parameters.get(key)
                if former is not None:
                    module._parameters[key] = _empty(former, (own, *former.shape[1:]))
            self.parts[name] = Part(EXPERTS, self.rank, self.ranks)

    def cut(self, model: Any, layouts: Mapping[str, Layout], headers: SafetensorsHeaders) -> SafetensorsHeaders:
        """Give the layers of the model the shapes of their parts, read these, and return their headers."""
        if not is_stock(model):
            raise ModelError(
                f"{type(model).__name__} has code of its own, and transformers' plans are for its own classes: load it "
                "with one rank"
            )
        plan = plans.plan_of(model, self.plan)
        plans.require_modules(model, self.plan)
        plans.require_fitting_rules(model, self.plan)
        plans.require_divisible_heads(model.config, plan, self.ranks)
        shapes: dict[str, tuple[int, int]] = {}
        tied = getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for name, module in list(model.named_modules()):
            style = plans.style_of(name, plan)
            if style is None or style in (*plans.WHOLE_STYLES, *plans.EXPERT_STYLES) or name in self.parts:
                continue
            if not isinstance(module, nn.Linear):
                raise ModelError(
                    f"the plan cuts {name}, a {type(module).__name__}, and only nn.Linear can be cut: use one rank"
                )
            shapes[name] = (module.out_features, module.in_features)
            self.parts[name] = (
                Part(WHOLE, self.rank, self.ranks, TIED)
                if tied and module is head
                else self._decide(name, module, style, layouts.get(name), headers, model)
            )
        with torch.device("cpu"):  # transformers builds the model under the meta device
            read = self._read(headers, layouts, shapes)
        for name, shape in shapes.items():
            _shrink(model.get_submodule(name), self.parts[name], self.parts[name].local_shape(shape))
        for name, part in self.parts.items():
            attach_part(model.get_submodule(name), part)
        return read

    def _decide(
        self,
        name: str,
        module: nn.Linear,
        style: str,
        layout: Layout | None,
        headers: SafetensorsHeaders,
        model: nn.Module,
    ) -> Part:
        shape = (module.out_features, module.in_features)
        part = Part(ROWS, self.rank, self.ranks, whole_output=style in plans.GATHERED_ROW_STYLES)
        if style in (*plans.ROW_STYLES, *plans.GATHERED_ROW_STYLES):
            reason = self._obstacle(name, shape, part, layout)
            if reason and part.whole_output:
                return Part(WHOLE, self.rank, self.ranks, reason)
            if reason:
                raise ModelError(f"{name} cannot be cut into {self.ranks} parts by rows: {reason}; use fewer ranks")
            return part
        whole_input = style in plans.SPLIT_STYLES
        part = Part(COLUMNS, self.rank, self.ranks, whole_input=whole_input)
        reason = _joined_columns(name, layout, headers, model) or self._obstacle(name, shape, part, layout)
        if not reason:
            return part
        part = Part(GATHERED, self.rank, self.ranks, reason, whole_input=whole_input)
        other = self._obstacle(name, shape, part, layout)
        if other or shape[1] % self.ranks:
            raise ModelError(
                f"{name} cannot be cut into {self.ranks} parts, neither by columns ({reason}) nor by rows "
                f"({other or f'{shape[1]} input channels do not divide'}); use fewer ranks"
            )
        return part

    def _obstacle(self, name: str, shape: tuple[int, int], part: Part, layout: Layout | None) -> str:
        """Return why a layer has no such part; empty if it has."""
        size, what = (shape[0], "output") if part.cuts_rows else (shape[1], "input")
        if size % self.ranks:
            return f"{size} {what} channels do not divide"
        if layout is None:
            return ""
        local = part.local_shape(shape)
        try:
            whole, own = layout.tensor_specs(shape), layout.tensor_specs(local)
        except ValueError as error:
            return str(error)
        for key, spec in whole.items():
            if (reason := _misfit(key, spec, own[key], part, local, _bits(layout))) is not None:
                return reason
        return ""

    def _read(
        self, headers: SafetensorsHeaders, layouts: Mapping[str, Layout], shapes: Mapping[str, tuple[int, int]]
    ) -> SafetensorsHeaders:
        names = headers.names_of_keys()
        local: dict[str, TensorInfo] = {}
        by_file: dict[Path, list[str]] = {}
        for key, entry in self._stored.items():
            by_file.setdefault(entry.file, []).append(key)  # type: ignore[arg-type]
        for file, keys in by_file.items():
            with safe_open(str(file), framework="pt") as opened:
                for key in keys:
                    entry = self._stored[key]
                    value = self._slice(opened, entry, names.get(key, ""), layouts, shapes)
                    if value is not None:
                        self.state[key] = value
                        local[key] = replace(entry, key=key, shape=tuple(value.shape))
        return _headers_from(local, lambda entries: {key: names[key] for key in entries if key in names})

    def _slice(
        self,
        opened: Any,
        entry: TensorInfo,
        name: str,
        layouts: Mapping[str, Layout],
        shapes: Mapping[str, tuple[int, int]],
    ) -> Tensor | None:
        """Read this rank's part of one tensor; None for a tensor that this rank does not have."""
        module, _, key = name.rpartition(".")
        part = self.parts.get(module)
        if part is not None and part.how == EXPERTS and entry.shape and key in ("gate_up_proj", "up_proj", "down_proj"):
            return opened.get_slice(entry.key)[part.span(entry.shape[0])]  # stacked in the file, too
        if part is None or module not in shapes or part.how == WHOLE:
            return opened.get_tensor(entry.key)
        shape = shapes[module]
        local = part.local_shape(shape)
        if key == "bias":
            if part.how == COLUMNS:
                return opened.get_tensor(entry.key) if self.rank == 0 else None
            return opened.get_slice(entry.key)[part.span(shape[0])]
        if key == "weight_shape":
            return torch.tensor(local, dtype=opened.get_tensor(entry.key).dtype)
        layout = layouts.get(module)
        if layout is None or key not in layout.tensor_specs(shape):
            own: tuple[int, ...] = local if key == "weight" else entry.shape
        else:
            own = layout.tensor_specs(local)[key].shape
        if not entry.shape or len(own) != len(entry.shape):
            return opened.get_tensor(entry.key)
        index = tuple(
            slice(self.rank * size, (self.rank + 1) * size) if size != whole else slice(None)
            for size, whole in zip(own, entry.shape, strict=True)
        )
        return opened.get_slice(entry.key)[index].contiguous()


LOADING: ContextVar[RankPart | None] = ContextVar("hf_optim_rank_part", default=None)
"""The part that the packed quantizer loads in this thread."""


def _headers_from(entries: Mapping[str, TensorInfo], names: Any) -> SafetensorsHeaders:
    found = SafetensorsHeaders(())
    found.replace_entries(dict(entries), names)
    return found


def _bits(layout: Any) -> int:
    return layout.bits if hasattr(layout, "bits") else layout.scheme.weights.num_bits


def _joined_columns(name: str, layout: Any, headers: SafetensorsHeaders, model: nn.Module) -> str:
    """Return why the columns of a layer belong together; empty if they can be cut."""
    if layout is None:
        return ""
    if any(headers.find(f"{name}.{key}") is not None for key in ORDERS):
        return "the columns of its groups are not adjacent (act-order)"
    inputs = getattr(getattr(layout, "scheme", None), "input_activations", None)
    if (inputs is not None and inputs.dynamic) or outlier_thresholds(model, [name]):
        return ONE_SCALE
    return ""


def _misfit(key: str, whole: TensorSpec, own: TensorSpec, part: Part, local: tuple[int, int], bits: int) -> str | None:
    """Return why a tensor of a layer has no part that fits; None if it has."""
    for size, small in zip(whole.shape, own.shape, strict=True):
        if size == small:
            continue
        cut = local[0] if part.cuts_rows else local[1]
        packed = small != cut and whole.types == ("I32",)
        if small * part.ranks != size or (packed and cut * bits % 32):
            return f"{cut} channels of {bits} bits do not fill whole words of {key}"
    return None


def _empty(former: Tensor, shape: Iterable[int]) -> nn.Parameter:
    return nn.Parameter(torch.empty(tuple(shape), dtype=former.dtype, device=former.device), requires_grad=False)


def _shrink(module: Any, part: Part, shape: tuple[int, int]) -> None:
    """Give a linear layer on the meta device the shape of its part."""
    module.out_features, module.in_features = shape
    if part.how == WHOLE:
        return
    module._parameters["weight"] = _empty(module._parameters["weight"], shape)
    if module._parameters.get("bias") is None:
        return
    if part.cuts_rows:
        module._parameters["bias"] = _empty(module._parameters["bias"], shape[:1])
    elif part.rank:
        module._parameters["bias"] = None
