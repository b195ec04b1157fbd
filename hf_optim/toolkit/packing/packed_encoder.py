"""The forward of an encoder without padding: read the mask, pack, run the stock forward on one row, unpack.

The row ``[1, total]`` goes through the model's own forward, so embeddings, linear layers, norms and activations compute
valid tokens alone, whatever the layers are (dense, on a kernel, masked, with adapters). Documents reach the attention
as a keyword. A batch that cannot be packed, or for which packing does not pay, takes the stock forward as it is.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelError
from . import interface
from .captured_rows import CapturedRows
from .documents import Documents, read_rows
from .encoders import Kind, is_traced, packed_positions, pool
from .own_attention import keep_bias

PACKING = "_hf_optim_packing"


@dataclass
class Packing:
    """How the encoder of a model is packed.

    Attributes:
        kind: of the encoder.
        largest_share: batches with a larger share of valid tokens run as in stock transformers.
        first_column: a head reads column 0 of the hidden states.
        base: the former attention implementation.
        captures: on a GPU, forwards of sizes that come again are CUDA graphs.
    """

    kind: Kind
    largest_share: float
    first_column: bool
    base: str
    captures: bool = True

    def __post_init__(self) -> None:
        self.warned: set[str] = set()
        self.captured = CapturedRows(self.captures and not self.kind.bias)

    def stock(self, reason: str) -> None:
        """Warn, once for each reason, that a batch takes the stock forward."""
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"padding_removal: {reason}; such a batch is computed with its padding", stacklevel=4)


class PackedEncoder:
    """Mixin of an encoder whose forward removes padding."""

    # Reading the mask is Python over values; what is compiled is the stock forward, with the packed length dynamic.
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the stock forward returns; hidden states are zeros where there is padding."""
        packing: Packing = vars(self)[PACKING]
        names = _names(type(self))  # type: ignore[arg-type]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        documents = plan(self, packing, given)
        if documents is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        wants_dict = given.pop("return_dict", None)
        if wants_dict is None:
            wants_dict = self.config.return_dict  # type: ignore[attr-defined]
        if packing.kind.bias:
            keep_bias(self, documents)  # type: ignore[arg-type]
        inputs = packed_inputs(self, packing.kind, given, documents)
        row = {**given, **inputs, "return_dict": True}
        finish = partial(unpack_outputs, self, documents)
        stock = super().forward  # type: ignore[misc]
        outputs = packing.captured.forward(self, stock, row, documents, finish)  # type: ignore[arg-type]
        return outputs if wants_dict else outputs.to_tuple()


@torch.compiler.disable
def plan(encoder: Any, packing: Packing, given: dict[str, Any]) -> Documents | None:
    """Return the documents of a batch, or None for one that takes the stock forward.

    Raises ``ModelError`` for input that is packed already, and for what a packed forward cannot give.
    """
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    inputs = ids if ids is not None else given.get("inputs_embeds")
    if not isinstance(inputs, Tensor) or is_traced(inputs, mask):
        return None
    if packing.kind.registered and not _uses_ours(encoder, packing):
        return None
    _refuse(encoder, given)
    positions = given.get("position_ids")
    if positions is not None and positions.shape[0] != inputs.shape[0]:
        positions = positions.expand(inputs.shape[0], -1)
    if not isinstance(mask, Tensor):
        if positions is not None and mask is None:
            _refuse_restarts(read_rows(torch.ones_like(positions, dtype=torch.bool), positions).restarts)
        return None
    if mask.dim() == 4:
        if inputs.shape[0] == 1 and positions is not None:
            _refuse_restarts(True)
        packing.stock("an attention_mask of four dimensions states more than padding")
        return None
    if mask.dim() != 2:
        raise ModelError(
            f"padding_removal: an attention_mask of {mask.dim()} dimensions does not say which tokens are padding: "
            "pass [batch, length], or call hf_optim.restore(model)"
        )
    if mask.shape != inputs.shape[:2]:
        return None  # the stock forward has an error for it
    if any(given.get(name) is not None for name in ("encoder_hidden_states", "cache", "past_key_values")):
        return None
    valid = mask.to(inputs.device).bool()
    facts = read_rows(valid, positions)
    _refuse_restarts(facts.restarts)
    if facts.total == 0 or facts.share > packing.largest_share:
        return None
    if facts.holes and packing.kind.by_distance:
        packing.stock("padding between the tokens of a row changes distances, by which this model attends")
        return None
    if packing.first_column and any(facts.firsts):
        packing.stock("the head reads the first column, which is padding in rows that are padded on the left")
        return None
    return Documents.of(valid, facts, ordered=packing.kind.bias or not valid.is_cuda)


@torch.compiler.disable
def packed_inputs(encoder: Any, kind: Kind, given: dict[str, Any], documents: Documents) -> dict[str, Any]:
    """Return the arguments of the stock forward that differ for a packed row."""
    made: dict[str, Any] = {}
    for name in ("input_ids", "inputs_embeds", "token_type_ids", "position_ids"):
        if given.get(name) is not None:
            made[name] = documents.pack(given[name])
    if kind.positions != "none" and given.get("position_ids") is None:
        made["position_ids"] = packed_positions(encoder, kind, given, documents.index, documents.columns)
    return interface.per_row(made, documents)


@torch.compiler.disable
def unpack_outputs(encoder: Any, documents: Documents, outputs: Any) -> None:
    """Give the outputs of a packed row the shape of the batch, in place: hidden states, and those of the pooler."""
    last = outputs.last_hidden_state
    outputs.last_hidden_state = padded = documents.unpack(last)
    states = getattr(outputs, "hidden_states", None)
    if states is not None:
        outputs.hidden_states = tuple(padded if x is last else documents.unpack(x) for x in states)
    if getattr(outputs, "pooler_output", None) is not None:
        outputs.pooler_output = pool(encoder, documents.first_tokens(padded))


@lru_cache(maxsize=64)
def _names(cls: type) -> tuple[str, ...]:
    """Return the names of the arguments of the stock forward of a class."""
    stock: Any = cls.__mro__[cls.__mro__.index(PackedEncoder) + 1]
    return tuple(inspect.signature(stock.forward).parameters)[1:]


def _uses_ours(encoder: Any, packing: Packing) -> bool:
    """Return True if the attention of the encoder is ours, which a caller may have changed since."""
    current = encoder.config._attn_implementation
    base = interface.base_of(current)
    if base is None and current in interface.BASES:
        base = packing.base = current
        encoder.config._attn_implementation = interface.name_for(base)
    if base is None:
        packing.stock(f"attn_implementation={current!r} was set, by which documents cannot be kept apart")
        return False
    interface.register(base, encoder)
    return True


def _refuse(encoder: Any, given: dict[str, Any]) -> None:
    if given.get("output_attentions") or (given.get("output_attentions") is None and encoder.config.output_attentions):
        raise ModelError(
            "padding_removal: attention weights are not formed where padding is removed: leave output_attentions out, "
            "or call hf_optim.restore(model) and set attn_implementation='eager'"
        )
    packed = [name for name in ("cu_seq_lens_q", "cu_seqlens", interface.DOCUMENTS) if given.get(name) is not None]
    if packed:
        _refuse_restarts(True, packed[0])


def _refuse_restarts(restarts: bool, told: str = "position_ids") -> None:
    if restarts:
        raise ModelError(
            f"padding_removal: the input is packed already ({told} of several documents in one row): pass the padded "
            "batch with its attention_mask, or call hf_optim.restore(model)"
        )
