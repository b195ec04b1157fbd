"""Attention that a technique computes with learned parts of its own, in the models of transformers.

A technique makes one ``LearnedAttachment``: it reads the settings in the configuration, builds the learned part of an
attention, and computes. Everything around it is here: padding and documents, caches that hold a state, what is
refused, and the classes of such a model.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.mixed_classes import mixed
from .attachment import FIELD, Attachment
from .model_caches import call_uncompiled
from .pattern import Pattern
from .pattern_models import PatternConfig, PreparedModel, number_layers
from .row_state import Call, NewTokens, TensorState
from .rows import SEGMENTS
from .state_cache import HoldsState, StateLayer

PART = "learned"  # of an attention module: what a technique adds


def no_pattern(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> Sequence[Pattern]:
    """Raise ``ValueError``: what is computed is not softmax attention under a mask of pairs."""
    raise ValueError("this attention is not one of pairs of tokens: they are not counted")


class LearnedAttachment(Attachment):
    """Base of attention functions with learned parts. A subclass has ``read``, ``build`` and ``compute``.

    Attributes:
        name: of the implementation; a number for the module of the subclass is added.
        title: what messages call this attention.
    """

    title = "this attention"

    def __init__(self, name: str) -> None:
        super().__init__(name, no_pattern)

    def code_module(self) -> str:
        return type(self).__module__

    def read(self, settings: Mapping[str, Any]) -> Any:
        """Return the settings in a form of the technique. Raises ``ValueError`` if they are not those of one."""
        raise NotImplementedError

    def build_part(self, settings: Mapping[str, Any], layer: int) -> nn.Module | None:
        """Return the learned part of the attention number ``layer``; None if it has none.

        Modules with ``reset_parameters`` are initialized by it where a checkpoint lacks their weights.
        """
        raise NotImplementedError

    def compute_call(self, part: nn.Module | None, call: Call) -> tuple[Tensor, TensorState | None]:
        """Return the output ``[R, H, P, D]``, and the state after these tokens; None without ``call.keeps``.

        The output at padding is not read. A row without a token must give numbers all the same.
        """
        raise NotImplementedError

    def require_settings(self, config: Any) -> None:
        """Raise ``ValueError`` for settings that are not those of the technique."""
        self.read(self._settings(config))

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Compute the attention of a module of transformers; arguments and result as in ``Attachment.attention``."""
        for what, extra in (("soft caps", softcap), ("attention sinks", s_aux), ("position biases", position_bias)):
            if extra is not None:
                raise ValueError(f"{self.title} has no {what}: set another attn_implementation")
        if attention_mask is not None and attention_mask.dtype != SEGMENTS:
            raise ValueError(
                f"{self.title} takes padding and packed documents, and no other masks: those of pairs, from a caller "
                "or of a sliding window, mean nothing for it"
            )
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
        layer: StateLayer | None = getattr(key, "hf_optim_state", None)
        if layer is not None and not causal:
            raise ValueError("earlier tokens of this model see later ones: set use_cache=False")
        if layer is None and key.shape[2] != query.shape[2]:
            raise ValueError(
                f"{self.title} got keys of {key.shape[2]} tokens for {query.shape[2]} queries: it keeps a state in "
                "caches that the model makes. Leave cache_implementation out, or set use_cache=False"
            )
        owner = self.name if layer is None else f"{self.name} {sorted(self._settings(module.config).items())}"
        new = NewTokens.read(attention_mask, query, None if layer is None else layer.seen)
        if layer is not None and layer.state is not None:
            if layer.owner != owner:
                raise ValueError("the cache holds the state of another attention: start a new one")
            if (layer.counts, layer.marks) != (new.earlier, new.earlier_marks):
                raise ValueError(
                    "the cache has read other tokens than the attention_mask says: pass the mask of all tokens, those "
                    "in the cache among them"
                )
        number = getattr(module, "layer_idx", None)
        call = Call(
            module=module,
            query=new.take(query),
            key=new.take(key),
            value=new.take(value),
            lengths=new.lengths(query.device),
            earlier=new.earlier_tokens(query.device),
            causal=causal,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            dropout=dropout if module.training else 0.0,
            layer=0 if number is None else number,
            state=None if layer is None else layer.state,
            keeps=layer is not None,
        )
        out, state = self.compute_call(getattr(module, PART, None), call)
        if layer is not None:
            if state is None:
                raise ValueError(f"{self.title} has no state for a cache: set use_cache=False")
            counts = tuple(a + b for a, b in zip(new.earlier, new.counts, strict=True))
            layer.keep(state, owner, layer.seen + query.shape[2], counts, new.marks)
        return new.put(out, len(query)).transpose(1, 2).contiguous(), None


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules of a model, in their order."""
    return [module for module in model.modules() if hasattr(module, "is_causal")]


def add_parts(model: nn.Module, attachment: LearnedAttachment, settings: Mapping[str, Any], **about: Any) -> None:
    """Add the learned part to each attention of a model, in place, and let caches hold its state.

    Args:
        model: a model of transformers.
        attachment: of the technique.
        settings: of the configuration.
        about: device and dtype to which the parts are moved.

    Raises ``ValueError`` for settings that are not those of the technique.
    """
    attachment.read(settings)
    number_layers(model)
    for number, module in enumerate(attentions(model)):
        index = getattr(module, "layer_idx", None)
        part = attachment.build_part(settings, number if index is None else index)
        if part is not None:
            module.add_module(PART, part.to(**about).train(module.training))
        if module.is_causal:
            module.__class__ = mixed(HoldsState, type(module))  # type: ignore[arg-type]


class LearnedConfig(PatternConfig):
    """Base of the configuration classes. A subclass sets ``attachment``."""


class LearnedModel(PreparedModel):
    """Base of the model classes: learned parts are added to a model that is built, and initialized.

    ``torch.compile`` leaves the forward uncompiled: rows are moved by their padding, which is known when it runs.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        settings = getattr(config, FIELD, None)
        if settings is not None:
            add_parts(self, type(config).attachment, settings)  # type: ignore[arg-type]

    def call_prepared(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call_uncompiled(self, args, kwargs)

    def initialize_weights(self) -> None:
        """Initialize what a checkpoint does not have; learned parts by themselves."""
        for module in attentions(self):  # type: ignore[arg-type]
            if (part := getattr(module, PART, None)) is not None:
                initialize_part(part)
        super().initialize_weights()  # type: ignore[misc]


def initialize_part(part: nn.Module) -> None:
    """Initialize the tensors of a part that were not loaded, by ``reset_parameters``, the inner modules first.

    Tensors that were loaded stay, also where their module lacks another one. A quantized layer, which has codes in the
    place of its weight, has nothing to initialize.
    """

    def loaded(tensor: Tensor) -> bool:
        return getattr(tensor, "_is_hf_initialized", False)

    # By name too: ``reset_parameters`` may put another tensor in the place of a buffer.
    kept = [
        (held, name, each, each.detach().clone())
        for module in part.modules()
        for held in (module._parameters, module._buffers)
        for name, each in held.items()
        if each is not None and loaded(each)
    ]
    with torch.no_grad():
        for module in reversed(list(part.modules())):
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            coded = isinstance(module, nn.Linear) and module._parameters.get("weight") is None
            if own and not coded and not all(map(loaded, own)) and hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
            module._is_hf_initialized = True  # type: ignore[assignment]
        for held, name, each, value in kept:
            each.copy_(value)
            held[name] = each  # type: ignore[assignment]
