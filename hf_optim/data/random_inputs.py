"""Random inputs, for methods that need no real data."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import DataError
from ..recipes.config import DataConfig
from .token_sequences import random_tokens, sequence_length


def random_inputs(config: PretrainedConfig, data: DataConfig) -> tuple[str, Tensor]:
    """Return the name of the main input of a model, and random values for it.

    They are ``input_ids`` int64 ``[samples, seq_len]``, or ``pixel_values`` float32 ``[samples, channels, height,
    width]`` for a vision model. Raises ``DataError`` for other models.
    """
    samples = data.samples or 128
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is not None:
        return "input_ids", random_tokens(vocabulary, samples, sequence_length(config, None, data.seq_len), data.seed)
    size = getattr(config, "image_size", None)
    if size is None:
        raise DataError(f"cannot make random inputs for {type(config).__name__}: pass a list of batches")
    height, width = (size, size) if isinstance(size, int) else size
    shape = (samples, getattr(config, "num_channels", 3), height, width)
    return "pixel_values", torch.randn(shape, generator=torch.Generator().manual_seed(data.seed))
