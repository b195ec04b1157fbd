"""Batches of model inputs: make them of examples, check them, move them to the CPU, add decoder inputs, hash them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import DataError
from ..trust.bounds import first_line

# Inputs of models that take the patches of all images of a batch one after another, not stacked.
_GRIDS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}


def to_cpu_batch(item: Any, number: int, columns: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return a caller's batch on the CPU.

    Args:
        item: a mapping of tensors.
        number: of the batch, for messages.
        columns: the keys to take; None for all.

    Raises ``DataError`` unless it is a mapping of tensors with a batch dimension.
    """
    if not isinstance(item, Mapping) or not item:
        raise DataError(f"batch {number} is a {type(item).__name__}, not a mapping of input names to tensors")
    chosen = {str(key): value for key, value in item.items() if columns is None or str(key) in columns}
    if not chosen:
        raise DataError(f"batch {number} has no input of the model; its keys are {', '.join(map(str, item))}")
    for key, value in chosen.items():
        if isinstance(value, Tensor):
            require_ordinary(value, f"batch {number}: {key!r}")
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise DataError(f"batch {number}: {key!r} is a {type(value).__name__}, not a tensor with a batch dimension")
    return {key: value.detach().cpu() for key, value in chosen.items()}


def require_ordinary(tensor: Tensor, what: str) -> None:
    """Raise ``DataError`` for a tensor without values, a sparse or nested one, and one of complex numbers or codes."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested:
        raise DataError(f"{what} has no values in memory, or is sparse: pass an ordinary tensor")
    if tensor.is_complex() or tensor.is_quantized:
        raise DataError(f"{what} is of {tensor.dtype}: pass whole numbers, floating-point numbers or masks")


def to_tensors(example: Mapping[str, Any], columns: Iterable[str], row: int, name: str) -> dict[str, Tensor]:
    """Return the columns of an example as tensors.

    Raises ``DataError`` naming the row for a column that is missing, empty, or not an array of numbers.
    """
    found: dict[str, Tensor] = {}
    for column in columns:
        value = example.get(column)
        if value is None:
            raise DataError(f"{name}: row {row} has no {column!r}, which other rows have; add it or remove the column")
        try:
            found[column] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(
                f"{name}: {column!r} of row {row} is not an array of numbers ({first_line(error)})"
            ) from error
        require_ordinary(found[column], f"{name}: {column!r} of row {row}")
        if not found[column].numel():
            raise DataError(f"{name}: {column!r} of row {row} is empty")
    return found


def join_examples(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return one batch of examples with equal shapes: stacked, but patches of images one after another."""
    flat = {name for grid, pixels in _GRIDS.items() if grid in examples[0] for name in (grid, pixels)}
    batch = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if key in flat:
            values = [value[None] if key in _GRIDS and value.dim() == 1 else value for value in values]
            batch[key] = torch.cat(values)
        else:
            batch[key] = torch.stack(values)
    return batch


def add_decoder_inputs(
    batch: dict[str, Tensor], config: PretrainedConfig, accepted: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the batch with ``decoder_input_ids`` if the model is an encoder-decoder, and without ``labels``.

    The decoder inputs are the labels (or the input) shifted right by one. Where labels are -100, the result has a
    ``decoder_attention_mask`` of 0, and where decoder inputs are a copy of the input, the input's mask. Labels are
    removed so that calibration computes no loss.

    Args:
        batch: inputs of the model, on the CPU.
        config: configuration of the model.
        accepted: names of the inputs that the model takes; None if unknown.
    """
    labels = batch.get("labels")
    batch = {key: value for key, value in batch.items() if key != "labels"}
    if not getattr(config, "is_encoder_decoder", False) or {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch):
        return batch
    if accepted is not None and "decoder_input_ids" not in accepted:
        return batch  # a head on the encoder alone
    target = labels if labels is not None else batch.get("input_ids")
    if target is None or target.dim() != 2 or target.is_floating_point():
        if target is not None:
            return batch
        raise DataError("an encoder-decoder model needs decoder_input_ids (or labels) in its calibration batches")
    pad = getattr(config, "pad_token_id", None) or 0
    start = getattr(config, "decoder_start_token_id", None)
    start = pad if start is None else start
    shifted = torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], dim=1)
    batch["decoder_input_ids"] = shifted.masked_fill(shifted == -100, pad)
    real = (labels != -100) if labels is not None else batch.get("attention_mask")
    takes_mask = (accepted is None or "decoder_attention_mask" in accepted) and "decoder_attention_mask" not in batch
    if takes_mask and real is not None and real.shape == target.shape and not bool(real.all()):
        batch["decoder_attention_mask"] = real.long()
    return batch


def count_tokens(batch: Mapping[str, Tensor]) -> int:
    """Return the number of tokens in ``input_ids`` that ``attention_mask`` does not mark as padding; 0 without them."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None:
        return 0
    return int((mask != 0).sum()) if mask is not None and mask.shape == ids.shape else ids.numel()


def hash_batches(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Return the SHA-256 of the inputs as hexadecimal text, independent of how they are split into batches.

    For batches of ``input_ids`` alone, it is the hash of the token ids as little-endian int64, sequence after sequence.
    """
    hashes: dict[str, Any] = {}
    for batch in batches:
        for key, value in batch.items():
            raw = value.detach().cpu().contiguous().view(torch.uint8)
            hashes.setdefault(key, hashlib.sha256()).update(raw.numpy().tobytes())
    if list(hashes) == ["input_ids"]:
        return hashes["input_ids"].hexdigest()
    joined = hashlib.sha256()
    for key in sorted(hashes):
        joined.update(key.encode() + hashes[key].digest())
    return joined.hexdigest()
