"""Sliding-window attention for any model that takes its attention from transformers' ``AttentionInterface``.

This file is stored beside checkpoints whose class is in no release of transformers, so it imports only torch and
transformers. It registers ``hf_optim_local_sdpa``, ``hf_optim_local_eager`` and ``hf_optim_local_flex_attention``: the
stock implementations, with the model's mask intersected with

    |query position - key position| < window,        window = config.attention_window
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface, and_masks

PREFIX = "hf_optim_local_"
KERNELS = ("sdpa", "eager", "flex_attention")
MARK = "windowed_attention"


def implementation(requested: str) -> str:
    """Return the windowed form of an attention implementation. Raises ``ValueError`` for one that has none."""
    kernel = requested.removeprefix(PREFIX)
    if kernel not in KERNELS:
        raise ValueError(
            f"windowed attention runs on {', '.join(KERNELS)}, not on {kernel!r}: set another attn_implementation"
        )
    return PREFIX + kernel


def within(window: int) -> Callable[[Any, Any, Any, Any], Any]:
    """Return a mask function that is True where query and key are less than ``window`` positions apart."""

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query - key).abs() < window

    return mask


def windowed_mask(kernel: str) -> Callable[..., Any]:
    """Return the mask builder of ``kernel`` with the window added to its mask function."""

    def build(*, mask_function: Callable[..., Any], config: PreTrainedConfig, **kwargs: Any) -> Any:
        window = getattr(config, "attention_window", None)
        if not window:
            raise ValueError(f"attn_implementation={PREFIX + kernel!r} needs config.attention_window")
        # With local_size the builder leaves the mask out for inputs that are shorter than the window.
        kwargs["local_size"] = window
        stock = AttentionMaskInterface()[kernel]
        return stock(mask_function=and_masks(mask_function, within(window)), config=config, **kwargs)

    return build


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention in plain PyTorch, in place of the models' own eager forms.

    Args:
        query: ``[B, H, T, D]``.
        key, value: ``[B, H / groups, S, D]``.
        attention_mask: ``[B, 1, T, S]``, additive.

    Returns:
        The output ``[B, T, H, D]`` and the weights ``[B, H, T, S]``.
    """
    if s_aux is not None:
        raise ValueError("windowed eager attention has no attention sinks: set attn_implementation='sdpa'")
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for bias in (position_bias, attention_mask):
        if bias is not None:
            scores = scores + bias[..., : key.shape[2]]
    accurate = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=accurate).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class WindowedConfig(PreTrainedConfig):
    """Base of a configuration class whose window applies under every attention implementation.

    A cache keeps the last ``attention_window - 1`` positions of a decoder. On disk the layers have a type that stock
    configurations reject, so that a stock class that is named explicitly refuses the checkpoint too. Architectures with
    their own layer types keep those.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        if self._marked():
            kwargs.pop("layer_types", None)
        super().__post_init__(**kwargs)
        self.bound_cache()

    def bound_cache(self) -> None:
        """Limit caches to the window."""
        if self._marked():
            self.sliding_window = self.attention_window

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if self._marked():
            fields.pop("sliding_window", None)
            fields["layer_types"] = [MARK] * self.num_hidden_layers
        return fields

    def _marked(self) -> bool:
        return not {"layer_types", "sliding_window"} & {f.name for f in dataclasses.fields(self)}

    @property
    def _attn_implementation(self) -> str | None:
        requested = self._attn_implementation_internal
        return None if requested is None else implementation(requested)

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)  # type: ignore[attr-defined]


def register() -> None:
    """Register the implementations with transformers. Repeated calls have no further effect."""
    for kernel in KERNELS:
        stock = eager_attention if kernel == "eager" else AttentionInterface()[kernel]
        AttentionInterface.register(PREFIX + kernel, stock)
        AttentionMaskInterface.register(PREFIX + kernel, windowed_mask(kernel))


register()
