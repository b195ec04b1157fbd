"""Batches of model inputs: check them, move them to the CPU, add decoder inputs, hash them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import DataError


def to_cpu_batch(item: Any, number: int) -> dict[str, Tensor]:
    """Return a caller's batch on the CPU. Raises ``DataError`` unless it is a mapping of tensors."""
    if not isinstance(item, Mapping) or not item:
        raise DataError(f"batch {number} is a {type(item).__name__}, not a mapping of input names to tensors")
    for key, value in item.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise DataError(f"batch {number}: {key!r} is a {type(value).__name__}, not a tensor with a batch dimension")
    return {str(key): value.detach().cpu() for key, value in item.items()}


def add_decoder_inputs(batch: dict[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """Return the batch with ``decoder_input_ids`` if the model is an encoder-decoder, and without ``labels``.

    The decoder inputs are the labels (or the input) shifted right by one. Labels are removed so that calibration
    computes no loss.
    """
    labels = batch.get("labels")
    batch = {key: value for key, value in batch.items() if key != "labels"}
    if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in batch:
        return batch
    target = labels if labels is not None else batch.get("input_ids")
    if target is None:
        raise DataError("an encoder-decoder model needs decoder_input_ids (or labels) in its calibration batches")
    pad = getattr(config, "pad_token_id", None) or 0
    start = getattr(config, "decoder_start_token_id", None)
    start = pad if start is None else start
    shifted = torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], dim=1)
    return {**batch, "decoder_input_ids": shifted.masked_fill(shifted == -100, pad)}


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
