from __future__ import annotations
"""Modules of a model replaced by others, by name, when the model is built: the base of remote code that stores codes.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""


from typing import Any

from torch import nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the module `name` of `model` is."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def own_name(model: nn.Module, name: str) -> str | None:
    """The name that a module has in `model`, given its name in that model with, or without, another head.

    None where the model has no such module.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in modules:
            return candidate
    return None


class ReplacedModules:
    """Part of a model class: the modules that the configuration names are built as others.

    The configuration's field `replaced_field` is `{"modules": {name: entry}, ...}`; a class defines `replacement`.
    """

    replaced_field: str

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        said = getattr(config, self.replaced_field, None) or {}
        for name, entry in said.get("modules", {}).items():
            own = own_name(self, name)  # type: ignore[arg-type]
            if own is not None:
                replace_module(self, own, self.replacement(self.get_submodule(own), entry, said))  # type: ignore

    def replacement(self, module: nn.Module, entry: Any, said: dict[str, Any]) -> nn.Module:
        """The module to stand in the place of `module`; its tensors are then loaded from the checkpoint."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        # Some classes (T5) initialize through `linear.weight`, which a module that stores codes need not have.
        try:
            super()._init_weights(module)  # type: ignore[misc]
        except AttributeError as error:
            if "weight" not in str(error):
                raise
"""Layers that hold their weight as codes of one small codebook, and a few outliers as they are.

``W[n, k] = centroids[code[n, k]]``, but for the outliers. A row's codes follow each other without gaps, eight of them
in ``bits`` bytes. This file is stored beside checkpoints, so it imports only torch and transformers.
"""


from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


# A larger layer is decoded and multiplied in parts, so that no dense weight of its size is ever there.
MOST_DECODED = 1 << 26


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[out, in]`` in [0, 2^bits) as bytes ``[out, ceil(in / 8) * bits]``; the first is lowest."""
    rows, columns = codes.shape
    eights = F.pad(codes, (0, -columns % 8)).view(rows, -1, 8)
    flags = (eights[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (flags.view(rows, -1, bits, 8) << shifts).sum(-1, dtype=torch.uint8).view(rows, -1)


def several(bits: int) -> int:
    """How many neighbouring codes one look into a table gives: as many as fit into a byte, of eight."""
    return {2: 4, 3: 2, 4: 2}.get(bits, 1)


def unpack_codes(packed: Tensor, bits: int, columns: int, together: int = 1) -> Tensor:
    """The codes of ``packed``, ``together`` (1, 2, 4 or 8) in one number, the first in the lowest bits.

    int32 (int64 for more than 3 bits a code) ``[out, ceil(in / together)]``, or uint8 where a byte is one number.
    """
    if together * bits == 8:
        return packed[:, : -(-columns // together)]
    rows = packed.shape[0]
    kind = torch.int32 if bits <= 3 else torch.int64
    groups = packed.view(rows, -1, bits)
    words = groups[..., 0].to(kind)
    for byte in range(1, bits):
        words |= groups[..., byte].to(kind) << (8 * byte)
    width = together * bits
    shifts = torch.arange(0, 8 * bits, width, dtype=kind, device=packed.device)
    numbers = (words[..., None] >> shifts) & ((1 << width) - 1)
    return numbers.view(rows, -1)[:, : -(-columns // together)]


class Coded(nn.Module):
    """A matrix as codes and outliers.

    Attributes:
        shape: ``(out, in)``.
        packed: uint8 ``[out, ceil(in / 8) * bits]``, see ``pack_codes``.
        centroids: ``[2^bits]``, in the dtype in which the layer computes.
        outliers: ``[outliers]``, in that dtype, row after row.
        outlier_counts: ``[out]``, how many outliers each row has; int16 where the row has less than 2^15 columns.
        outlier_columns: ``[outliers]``, of that dtype too.
    """

    holds_codes = True
    codes_buffer = "packed"
    packed: Tensor
    centroids: Tensor
    outliers: Tensor
    outlier_counts: Tensor
    outlier_columns: Tensor

    def __init__(
        self, shape: tuple[int, int], bits: int, outliers: int, dtype: torch.dtype, device: Any = None
    ) -> None:
        super().__init__()
        self.shape, self.bits = shape, bits
        index = torch.int16 if shape[1] < 1 << 15 else torch.int32
        made = {
            "packed": ((shape[0], -(-shape[1] // 8) * bits), torch.uint8),
            "centroids": ((2**bits,), dtype),
            "outliers": ((outliers,), dtype),
            "outlier_counts": ((shape[0],), index),
            "outlier_columns": ((outliers,), index),
        }
        for name, (size, kind) in made.items():
            self.register_buffer(name, torch.zeros(size, dtype=kind, device=device))

    @torch.no_grad()
    def fill(self, weight: Tensor, codes: Tensor, centroids: Tensor, outlying: Tensor) -> None:
        """Take codes (uint8 ``[out, in]``) and centroids, and of ``weight`` the values where ``outlying`` (bool)."""
        self.packed.copy_(self.pack(codes.masked_fill(outlying, 0)))
        self.centroids.copy_(centroids)
        self.outliers.copy_(weight[outlying])
        self.outlier_counts.copy_(outlying.sum(1))
        self.outlier_columns.copy_(outlying.nonzero()[:, 1])

    def pack(self, codes: Tensor) -> Tensor:
        """What ``packed`` is for these codes, uint8 ``[out, in]``."""
        return pack_codes(codes, self.bits)

    def codes(self) -> Tensor:
        """The codes, uint8 ``[out, in]``; 0 at the outliers."""
        return unpack_codes(self.packed, self.bits, self.shape[1]).to(torch.uint8)

    def outlier_rows(self) -> Tensor:
        """The row of each outlier, int64 ``[outliers]``."""
        rows = torch.arange(self.shape[0], device=self.packed.device)
        return torch.repeat_interleave(rows, self.outlier_counts.long(), output_size=len(self.outliers))

    def decode(self, first: int = 0, last: int | None = None) -> Tensor:
        """The rows ``first`` to ``last`` of the matrix, made now: ``[rows, in]``."""
        last = self.shape[0] if last is None else last
        together = several(self.bits)
        numbers = unpack_codes(self.packed[first:last], self.bits, self.shape[1], together)
        width = torch.arange(2 ** (together * self.bits), device=self.packed.device)[:, None]
        place = torch.arange(0, together * self.bits, self.bits, device=self.packed.device)
        table = self.centroids[(width >> place) & (2**self.bits - 1)]
        values = F.embedding(numbers if numbers.dtype == torch.int64 else numbers.int(), table)
        values = values.view(last - first, -1)[:, : self.shape[1]]
        rows, columns, outliers = self.outlier_rows(), self.outlier_columns.long(), self.outliers
        if last - first < self.shape[0]:
            inside = (rows >= first) & (rows < last)
            rows, columns, outliers = rows[inside] - first, columns[inside], outliers[inside]
        return values.index_put_((rows, columns), outliers)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, bits={self.bits}, outliers={len(self.outliers)}"


class GoboLinear(Coded):
    """``y = x W^T + bias``. ``transposed``: it stands for a ``Conv1D``, whose weight is ``[in, out]``."""

    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        outliers: int,
        bias: nn.Parameter | None,
        transposed: bool,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        super().__init__(shape, bits, outliers, dtype, device)
        self.out_features, self.in_features, self.transposed = shape[0], shape[1], transposed
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The weight as the stock layer has it, decoded whenever it is read. Writing into it changes nothing."""
        weight = self.decode()
        return nn.Parameter(weight.T if self.transposed else weight, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] -> [..., out]."""
        step = max(1, MOST_DECODED // max(1, self.shape[1]))
        if self.shape[0] <= step:
            return F.linear(input, self.decode(), self.bias)
        parts = []
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            parts.append(
                F.linear(input, self.decode(first, last), None if self.bias is None else self.bias[first:last])
            )
        return torch.cat(parts, -1)

    def to_dense(self) -> tuple[nn.Module, bool]:
        """The stock layer of the same weight, and that it computes the same."""
        with torch.device("meta"):
            made = Conv1D(*self.shape) if self.transposed else nn.Linear(*self.shape[::-1], bias=self.bias is not None)
        made.weight = nn.Parameter(self.weight.detach().contiguous())
        if self.bias is not None:
            made.bias = self.bias
        return made.train(self.training), True


class GoboEmbedding(Coded):
    """A table of vectors, one a row; those that are asked for are decoded. No row has more than ``most`` outliers."""

    def __init__(
        self,
        shape: tuple[int, int],
        bits: int,
        outliers: int,
        most: int,
        padding_idx: int | None,
        dtype: torch.dtype,
        device: Any = None,
    ) -> None:
        super().__init__(shape, bits, outliers, dtype, device)
        self.num_embeddings, self.embedding_dim = shape
        self.most, self.padding_idx = most, padding_idx

    @property
    def weight(self) -> Tensor:
        """The table, decoded whenever it is read. Writing into it changes nothing."""
        return nn.Parameter(self.decode(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [...], integers in [0, num_embeddings) -> [..., embedding_dim]."""
        ids, columns = input.reshape(-1).long(), self.shape[1]
        codes = unpack_codes(self.packed[ids], self.bits, columns).long()
        values = self.centroids[codes]
        # The outliers of a row stand together.
        count = self.outlier_counts.long()
        end = count.cumsum(0)[ids]
        begin = end - count[ids]
        for step in range(self.most):
            at = (begin + step).clamp(max=len(self.outliers) - 1)
            column = self.outlier_columns[at].long()[:, None]
            value = torch.where((begin + step < end)[:, None], self.outliers[at][:, None], values.gather(1, column))
            values.scatter_(1, column, value)
        return values.view(*input.shape, columns)

    def to_dense(self) -> tuple[nn.Module, bool]:
        """The stock table of the same weight, and that it computes the same."""
        weight = self.decode()
        made = nn.Embedding(*self.shape, padding_idx=self.padding_idx, _weight=weight)
        return made.train(self.training), True


def coded_like(module: nn.Module, bits: int, outliers: int, most: int) -> GoboLinear | GoboEmbedding:
    """An empty coded layer to stand in the place of a linear layer or an embedding; a bias is shared.

    Of its ``outliers``, no row has more than ``most``.
    """
    weight: Any = module.weight
    about = {"dtype": weight.dtype, "device": weight.device}
    if isinstance(module, nn.Embedding):
        return GoboEmbedding(tuple(weight.shape), bits, outliers, most, module.padding_idx, **about)
    transposed = isinstance(module, Conv1D)
    shape = tuple(weight.shape[::-1] if transposed else weight.shape)
    return GoboLinear(shape, bits, outliers, module.bias, transposed, **about)  # type: ignore[arg-type]


class GoboModules(ReplacedModules):
    """Part of a model class: the modules that ``config.gobo`` names hold codes."""

    replaced_field = "gobo"

    def replacement(self, module: nn.Module, entry: Any, said: dict[str, Any]) -> nn.Module:
        return coded_like(module, entry["bits"], entry["outliers"], entry["most"])


"""Configurations that stock classes refuse: part of the configuration class of every model with code of its own.

`AutoModel` refuses a checkpoint of an unknown `model_type`. A stock class that is asked for by name only warns, and
would leave at random what it does not know. On disk the layers therefore have a type that no release of transformers
knows, so that the configuration class of the stock model raises.

This file is stored beside checkpoints, so it imports only transformers.
"""


import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

FOREIGN = "needs_trust_remote_code"
TYPES, COUNT, ASIDE = "layer_types", "num_hidden_layers", "stock_layers"


class RefusedByStock(PreTrainedConfig):
    """Part of a configuration class: it writes `config.json` with layer types of its own, and reads them back.

    transformers looks at layer types where a configuration has a number of layers. That number is put aside on disk,
    with the layer types that the architecture has: stock classes have one by themselves and raise, but the bare
    `PreTrainedConfig`, by which `AutoTokenizer` reads a checkpoint whose code it may not run, has none and does not. A
    configuration that has no number of layers (of several towers) gets one on disk.
    """

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the configuration, marked. `use_diff`: only what differs from the defaults."""
        fields = json.loads(self.to_json_string(use_diff=use_diff))
        count = getattr(self, COUNT, None)
        fields[ASIDE] = {key: fields.pop(key) for key in (TYPES, COUNT) if key in fields}
        fields |= {TYPES: [FOREIGN] * count} if count else {TYPES: [FOREIGN], COUNT: 1}
        Path(json_file_path).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of what `to_json_file` wrote, or of any dictionary without marks."""
        fields = dict(config_dict)
        if FOREIGN in (fields.get(TYPES) or ()):
            aside = fields.pop(ASIDE, {})
            fields = {key: value for key, value in fields.items() if key not in (TYPES, COUNT)} | aside
        return super().from_dict(fields, **kwargs)


import transformers  # noqa: E402


class GoboLlamaConfig(RefusedByStock, transformers.LlamaConfig):
    model_type = "gobo_llama"
    gobo: dict | None = None


class GoboLlamaModel(GoboModules, transformers.LlamaModel):
    config_class = GoboLlamaConfig


class GoboLlamaForCausalLM(GoboModules, transformers.LlamaForCausalLM):
    config_class = GoboLlamaConfig


class GoboLlamaForSequenceClassification(GoboModules, transformers.LlamaForSequenceClassification):
    config_class = GoboLlamaConfig


class GoboLlamaForQuestionAnswering(GoboModules, transformers.LlamaForQuestionAnswering):
    config_class = GoboLlamaConfig


class GoboLlamaForTokenClassification(GoboModules, transformers.LlamaForTokenClassification):
    config_class = GoboLlamaConfig


AUTO_MAP = {
    "AutoConfig": "modeling_gobo_llama.GoboLlamaConfig",
    "AutoModel": "modeling_gobo_llama.GoboLlamaModel",
    "AutoModelForCausalLM": "modeling_gobo_llama.GoboLlamaForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gobo_llama.GoboLlamaForSequenceClassification",
    "AutoModelForQuestionAnswering": "modeling_gobo_llama.GoboLlamaForQuestionAnswering",
    "AutoModelForTokenClassification": "modeling_gobo_llama.GoboLlamaForTokenClassification",
}
