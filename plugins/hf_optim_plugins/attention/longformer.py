"""Longformer: a sliding window for all tokens, and global tokens that see all and are seen by all.

    A = softmax(Q K^T / sqrt(d) + M) V,   M[i, j] = 0 if |i - j| <= w/2, or i or j is global;  else -inf
    with dilation p:                      |i - j| <= p w/2 and p divides i - j
    rows of global tokens:                softmax(Q_g K_g^T / sqrt(d)) V_g, with projections of their own

After Beltagy et al., "Longformer: The Long-Document Transformer", arXiv 2004.05150, sections 3.1 and 3.2. ``window``
counts both sides, as in transformers: a token sees w/2 tokens on each side and itself; in a decoder, those before it.
Dilation, as in the paper, is for some heads: with ``dilated_heads``, for the first so many heads of a layer. Global
tokens are those at fixed positions, those with chosen ids, and those that ``global_attention_mask`` of the model's
forward marks. Positions count from the first token that is not padding. With w/2 >= n - 1, or all tokens global, this
is the model's full attention.

How the checkpoint reloads:

- By default the model keeps its architecture, and its code is saved with it. REMOTE_CODE. It computes lists of blocks,
  so time is linear in the length; ``global_projections`` adds the projections of global tokens, as copies.
- With ``stock_class``, BERT and RoBERTa become transformers' Longformer, with projections copied for global tokens and
  positions moved behind the index of padding: plain transformers loads it, and computes slower. STOCK_ARCH. There
  global tokens are those of ``global_attention_mask``, and the first token in a classifier of sequences.

A stock Longformer, in turn, becomes a RoBERTa with the pattern and its projections, and runs on lists of blocks: with
``global_first`` 1 for a classifier of sequences, else 0, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import (
    Contract,
    ModelError,
    Paper,
    RecipeError,
    Reload,
    Run,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.checkpoints.remote_code import RemoteCode

from . import _longformer_pattern, _stock_led, _stock_longformer
from ._attach import alike_as_one, attach, layer_patterns, remote_code_of, require_encoder, require_interface
from ._token_fields import TokenTechnique, global_places, require_tokens, token_settings

DEFAULT_WINDOW = 512  # of the stock configuration


@technique(
    "longformer",
    family="attention",
    paper=Paper("2004.05150", "Longformer: The Long-Document Transformer", 2020),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Longformer(TokenTechnique):
    """Restrict attention to a window, but for global tokens.

    Attributes:
        window: tokens on both sides of a token that it sees, even. None: 512, and what a stock Longformer has.
        dilations: the distance between tokens of the window: one for all layers, or one for each. Empty: 1.
        dilated_heads: how many heads of each layer are dilated; 0: all.
        global_first: how many tokens at the beginning of a row are global: 1 for the [CLS] of a classifier. A stock
            Longformer other than the classifier of sequences has none: 0.
        global_last: how many at its end.
        global_positions: positions of further global tokens.
        global_token_ids: all tokens with these ids are global, such as that of [SEP].
        global_projections: global tokens get queries, keys and values of their own, first copies of the others: as many
            parameters again in each layer as these have. A stock Longformer keeps its own.
        stock_class: make transformers' Longformer of a BERT or RoBERTa, and its LED of a BART, whose encoder alone has
            windows.
    """

    window: int | None = option(None, low=2)
    dilations: tuple[int, ...] = ()
    dilated_heads: int = option(0, low=0)
    global_first: int = option(1, low=0)
    global_last: int = option(0, low=0)
    global_positions: tuple[int, ...] = ()
    global_token_ids: tuple[int, ...] = ()
    global_projections: bool = False
    stock_class: bool = False

    attachment: ClassVar = _longformer_pattern.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = remote_code_of(
        "longformer", _longformer_pattern, _longformer_pattern.LongformerBase.__name__, global_tokens=True
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"window": 4, "dilations": [1, 2]})

    def validate(self) -> None:
        super().validate()
        if self.window is not None and self.window % 2:
            raise RecipeError(f"longformer: window counts the tokens on both sides, so it is even, not {self.window}")
        if any(dilation < 1 for dilation in self.dilations):
            raise RecipeError(f"longformer: a dilation is at least 1, not {min(self.dilations)}")
        if self.dilated_heads and not self.dilations:
            raise RecipeError("longformer: dilated_heads needs dilations")
        plain = {"dilations": (), "global_first": 1, "global_last": 0, "global_positions": (), "global_token_ids": ()}
        for name, value in plain.items():
            if self.stock_class and getattr(self, name) != value:
                raise RecipeError(
                    f"longformer: transformers' Longformer takes no {name}: its global tokens are those of "
                    "global_attention_mask, and the first one in a classifier of sequences. Leave out stock_class"
                )

    def reload(self) -> Reload:
        return Reload.STOCK_ARCH if self.stock_class else Reload.REMOTE_CODE

    def _makes_led(self, config: PretrainedConfig) -> bool:
        return self.stock_class and config.model_type == _stock_led.TYPE

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        return None if self._makes_led(run.config) else super().prepare_load(run, load_kwargs)

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        if self._makes_led(model.config):
            _stock_led.require_bart(model, label)
            return
        if model.config.model_type == _stock_longformer.TYPE:
            if self.stock_class:
                raise ModelError(f"{label}: {type(model).__name__} is transformers' Longformer already")
            _stock_longformer.require_counterpart(type(model), self.global_first, label)
        else:
            require_interface(model, self.remote_code, label)
        if self.stock_class:
            _stock_longformer.require_stock(model, label)
        if len(self.dilations) not in (0, 1, layers := model.config.num_hidden_layers):
            raise ModelError(
                f"{label}: {len(self.dilations)} dilations, and the model {layers} layers: one for each, or one"
            )
        settings = self.settings(model.config, label)
        require_tokens(self, model, label, self.global_projections)
        require_encoder(model, self.encoders_only(settings), label)
        layer_patterns(model.config, self.attachment, settings, False, label)

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        settings = self.settings(model.config, label)
        if self.stock_class:
            convert = _stock_led.to_led if self._makes_led(model.config) else _stock_longformer.to_stock
            made = convert(model, settings["windows"][0], label)
            run.record.reload = Reload.STOCK_ARCH.name
            length = model.config.max_position_embeddings
            place = torch.arange(length)
            share = float(((place[:, None] - place).abs() <= settings["windows"][0] // 2).double().mean())
            run.report(
                self,
                windows=settings["windows"],
                layers=model.config.num_hidden_layers,
                context=length,
                share_of_attention=share,
                model_class=type(made).__name__,
            )
            return made
        if model.config.model_type == _stock_longformer.TYPE:
            _stock_longformer.require_counterpart(type(model), self.global_first, label)
            run.model = _stock_longformer.from_stock(model, label)
        only = self.encoders_only(settings)
        attached = attach(run, self, self.remote_code, self.attachment, settings, only)
        return _stock_longformer.with_projections(attached, model)

    def settings(self, config: PretrainedConfig, label: str) -> dict[str, Any]:
        projections = self.global_projections or config.model_type == _stock_longformer.TYPE
        windows = [self.window] if self.window is not None else [DEFAULT_WINDOW]
        if config.model_type == _stock_longformer.TYPE and self.window is None:
            stored = config.attention_window
            windows = [stored] if isinstance(stored, int) else list(stored)
        each = {"windows": alike_as_one(windows), "dilations": alike_as_one(self.dilations)}
        return {**each, "dilated_heads": self.dilated_heads, **token_settings(self, projections)}

    @staticmethod
    def sees(settings: Mapping[str, Any], place: Tensor, layer: int, head: int, causal: bool) -> Tensor:
        distance, found = place[:, None] - place, global_places(settings, len(place))
        half = settings["windows"][layer if len(settings["windows"]) > 1 else 0] // 2
        dilations = settings["dilations"] or [1]
        p = dilations[layer if len(dilations) > 1 else 0]
        p = p if not settings["dilated_heads"] or head < settings["dilated_heads"] else 1
        return (distance.abs() <= p * half) & (distance % p == 0) | found | found[:, None]


@hookimpl
def register_techniques(register) -> None:
    register(Longformer)
