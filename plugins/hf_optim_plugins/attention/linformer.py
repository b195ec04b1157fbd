"""Linformer: keys and values are projected along the length of the text, to a fixed number of them.

    A_i = softmax(Q_i (E_i K_i)^T / sqrt(d)) (F_i V_i),      E_i, F_i in R^(k x n), learned

for each head i. Wang, Li, Khabsa, Fang, Ma, "Linformer: Self-Attention with Linear Complexity", arXiv 2006.04768,
equation 7. A query has k scores, so that time and memory are linear in the length.

- Sharing, as in section 4 of the paper: ``none``; ``headwise``, E and F for all heads of a layer; ``key_value``, E = F
  for all heads of a layer; ``layerwise``, one E for all layers, heads, keys and values.
- The length n is fixed when E is made. A longer text is refused, not cut. Shorter ones use the first columns, and
  padding is zero before it is projected; positions count from the first token that is not padding.
- In the paper all rows have n tokens. In shorter ones the formula leaves slots with few tokens or none, whose keys and
  values of nearly zero still take their share of the softmax: ``short="zero"`` computes that, as the authors' code
  does. The default, ``weighted``, is ours: each slot is the weighted mean of the tokens that are there, and counts by
  their weight (``_length_projection``). Rows of n tokens are the same in both.
- E and F begin as means of successive tokens (``start="pooling"``), so that a converted model begins near what it was;
  as means of every k-th token (``interleaved``), so that with ``weighted`` slots rows of up to k tokens begin as full
  attention, if k divides n; or ``random``, normal with variance 1 / k, as in the paper's theorem 2. With k = n both
  means are the identity, and the attention is the full one.
- Encoders only. Each projected key holds tokens of the whole row, so no query of a causal model could see one.

A converted model has lost detail and needs training: ``distill_steps`` fits the output of each attention to that of the
dense one on calibration data; E and F are weights of the model, trained by any Trainer and saved with it. The
checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import (
    Card,
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

from . import _length_projection, _linformer_model
from ._attach import context_length, require_encoder
from ._distilling import DistilledTechnique, told
from ._learned import learned_code

ENCODERS = "each projected key is made of all tokens of a row, the later ones too; linformer is for encoders"


@technique(
    "linformer",
    family="attention",
    paper=Paper("2006.04768", "Linformer: Self-Attention with Linear Complexity", 2020),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Linformer(DistilledTechnique):
    """Project keys and values along the length of the text.

    Attributes:
        length: n, the most tokens that the model reads afterwards; None is the model's own context.
        k: projected keys and values, at most ``length``.
        sharing: of projections: ``none``; by the heads of a layer (``headwise``), by its keys and values too
            (``key_value``), by all layers too (``layerwise``).
        start: what projections begin as: ``pooling``, means of successive tokens, ``interleaved``, means of every k-th
            token, or ``random``.
        short: what rows of fewer than ``length`` tokens compute: ``weighted`` slots, or ``zero`` for missing tokens, as
            in the paper.
        distill_steps: optimizer steps in which each attention is fitted to the dense one on calibration data.
        distill_rate: the highest learning rate of these steps.
        distill_trains: which weights of the attention learn in them: ``all``, what was ``learned`` by this step alone,
            or the model's own ``projections``.
        seed: of random projections.
    """

    length: int | None = option(None, low=1, high=_linformer_model.LONGEST)
    k: int = option(128, low=1, high=_linformer_model.LONGEST)
    sharing: Literal["none", "headwise", "key_value", "layerwise"] = "headwise"
    start: Literal["pooling", "interleaved", "random"] = "pooling"
    short: Literal["weighted", "zero"] = "weighted"
    distill_steps: int = option(0, low=0)
    distill_rate: float = option(1e-3, above=0.0)
    distill_trains: Literal["all", "learned", "projections"] = "all"
    seed: int = option(0, low=0, high=2**63 - 1)

    attachment: ClassVar = _linformer_model.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = learned_code(
        "linformer",
        (_length_projection, _linformer_model),
        _linformer_model.LinformerBase.__name__,
        _linformer_model.LinformerModel.__name__,
    )
    not_causal: ClassVar[str] = ENCODERS

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"k": 3})

    def validate(self) -> None:
        if self.length is not None and self.k > self.length:
            raise RecipeError(f"linformer: k is {self.k:,}, more than the length of {self.length:,} tokens")
        if self.distill_steps and self.sharing == "layerwise":
            raise RecipeError(
                "linformer: layers are distilled each by itself, and sharing='layerwise' gives them one projection: "
                "leave out distill_steps, and train the model as a whole"
            )

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        super().check_model(model, label)
        require_encoder(model, ENCODERS, label)
        self._length(model.config, label)

    def _length(self, config: PretrainedConfig, label: str) -> int:
        context = context_length(config)
        length = context if self.length is None else self.length
        if length is None:
            raise ModelError(f"{label}: {config.model_type} does not say how many tokens it reads: set length")
        if context is not None and length > context:
            raise ModelError(f"{label}: length is {length:,}, but the model reads at most {context:,} tokens")
        if self.k > length:
            raise ModelError(f"{label}: k is {self.k:,}, more than the {length:,} tokens that the model reads")
        return length

    def settings(self, config: PretrainedConfig, sizes: Mapping[str, int], label: str) -> dict[str, Any]:
        chosen = {"sharing": self.sharing, "start": self.start, "short": self.short}
        return {"k": self.k, "length": self._length(config, label), **chosen, "key_heads": sizes["key_heads"]}

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return super().transform_model(run)

    def initialize(self, run: Run, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        _linformer_model.share_projections(model)

    def recompute(self, case: Any) -> dict[str, Any]:
        return {
            **case.config["attention_pattern"],
            "layers": len(case.config["layer_types"]),
            "context": case.config["max_position_embeddings"],
            "weights_added": sum(tensor.numel() for name, tensor in case.tensors.items() if ".learned." in name),
            "model_class": case.config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        shared = {
            "none": "each head of a layer has projections of its own for keys and for values",
            "headwise": "the heads of a layer share one projection of keys and one of values",
            "key_value": "the heads of a layer share one projection, of keys and values",
            "layerwise": "all layers share one projection",
        }[figures["sharing"]]
        card.paragraph(
            "Linformer",
            f"Keys and values of up to {figures['length']:,} tokens are projected to {figures['k']:,}; {shared} "
            f"({figures['weights_added']:,} weights). Longer texts are refused." + told(figures),
        )


@hookimpl
def register_techniques(register) -> None:
    register(Linformer)
