"""Random inputs for any model: in the shapes of the dummy inputs, with images or sound where tokens stand for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...toolkit import topology
from .exceptional_inputs import INPUTS

_SPECIAL = re.compile(r"\w*(token_id|token_index|token_ids|_pad_id|image_patch_id)")


def random_inputs(model: PreTrainedModel, seed: int, rows: int = 2) -> dict[str, Tensor]:
    """Return a batch of random inputs: token ids int64 ``[rows, T]``, floats of any shape ``[rows, ...]``.

    The last token of a sequence is that of the dummy inputs: heads look for the end of the sequence. Other special
    tokens, which stand for images or padding, do not occur.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = type(model).__name__
    if kind in INPUTS:
        return INPUTS[kind](model, generator, rows)
    batch: dict[str, Tensor] = {}
    for key, value in topology.dummy_inputs(model).items():
        if value.is_floating_point():
            batch[key] = torch.randn((rows, *value.shape[1:]), generator=generator, dtype=value.dtype)
        elif key.endswith("input_ids"):
            batch[key] = _tokens(model, value, generator, rows)
        else:
            batch[key] = value[:1].expand(rows, *value.shape[1:]).contiguous()
    return batch


def _tokens(model: PreTrainedModel, example: Tensor, generator: torch.Generator, rows: int) -> Tensor:
    special = set(_special(model.config.to_dict()))
    try:
        known = getattr(model.get_input_embeddings(), "num_embeddings", 100)
    except NotImplementedError:
        known = 100
    allowed = torch.tensor([i for i in range(3, min(known, 100)) if i not in special])
    chosen = torch.randint(len(allowed), (rows, *example.shape[1:]), generator=generator)
    ids = allowed[chosen]
    ids[:, -1] = example[:, -1]
    return ids


def _special(fields: dict[str, Any]) -> Iterator[int]:
    """Yield the token ids that a configuration names, at any depth."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _special(value)
        elif isinstance(key, str) and _SPECIAL.fullmatch(key):
            ids = value if isinstance(value, (list, tuple)) else [value]
            yield from (item for item in ids if isinstance(item, int))
