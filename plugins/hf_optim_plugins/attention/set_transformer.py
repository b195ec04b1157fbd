"""Set Transformer: attention through a few learned points, and pooling by learned seeds.

    ISAB_m(X) = MAB(X, MAB(I, X)),    PMA_k(Z) = MAB(S, rFF(Z)),    MAB(X, Y) = O + relu(O W_o + b_o),
    O = X' + softmax(X' Y'^T / sqrt(w)) Y''          (X', Y', Y'': projections, several heads)

Lee, Lee, Kim, Kosiorek, Choi, Teh, "Set Transformer", arXiv 1810.00825. The layers themselves are public, for models
of your own: ``MAB``, ``SAB``, ``ISAB`` and ``PMA`` in ``hf_optim.toolkit.attention``. This technique gives two of them
to a pretrained encoder:

- ``points``: ISAB in the place of self-attention. m learned points gather from the tokens, and the tokens read what the
  points gathered: n m scores in each of two softmaxes, instead of n^2. MAB(I, X) is the paper's, over the keys and
  values that the model projects, with points that are projected already (I W is one matrix). Of the second block the
  model has its own parts: its queries, and for the residual and the feed-forward network those of the layer. Scores are
  scaled as the model's are; ``scale="width"`` is the paper's, over the root of the width of all heads.
- ``seeds``: PMA over the last hidden states, a vector of the whole text in the place of the mean over its tokens, as
  ``pooler_output``. rFF is the feed-forward network that ends the encoder; in the authors' code PMA has none either.

Encoders only for ``points``: a point reads all tokens of a row, so a query of a causal model would see later ones.
Padding is left out of both, and a text of padding alone has no vector. Positions are what the model's embeddings add;
without them ISAB is equivariant to permutations of the tokens, and PMA is invariant.

A converted attention has lost what it was and needs training: ``distill_steps`` fits the output of each attention to
that of the dense one on calibration data; all parts are weights of the model, trained by any Trainer and saved with it.
A pooling head begins as the mean (``pooling_start``). The checkpoint brings its own code. REMOTE_CODE.
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
from hf_optim.checkpoints.remote_code import RemoteCode, convert, require_own_code
from hf_optim.toolkit.attention import MOST, set_layers

from . import _induced_attention, _set_model
from ._attach import context_length, require_encoder, require_self_attention
from ._distilling import DistilledTechnique, told
from ._learned import learned_code

ENCODERS = "an inducing point reads all tokens of a row, the later ones too; set_transformer is for encoders"


@technique(
    "set_transformer",
    family="attention",
    paper=Paper("1810.00825", "Set Transformer: Attention-based Permutation-Invariant Neural Networks", 2018),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class SetTransformer(DistilledTechnique):
    """Let tokens attend through learned points, and pool a text by learned seeds.

    Attributes:
        points: m, the inducing points of each attention; None leaves the attention as it is.
        seeds: k, the vectors of a text, one behind the other; None adds no pooling head.
        layer_norm: normalize after each of the two sums of a block; off in the authors' models.
        scale: of the scores over points: that of the ``model``, or the paper's, by the ``width`` of all heads.
        start: of what tokens read of a point: the ``identity``, or drawn (``xavier``) as the authors' models are.
        pooling_start: what the pooling head begins as: the ``mean`` of the tokens, or drawn (``xavier``).
        distill_steps: optimizer steps in which each attention is fitted to the dense one on calibration data.
        distill_rate: the highest learning rate of these steps.
        distill_trains: which weights of the attention learn in them: ``all``, what was ``learned`` by this step alone,
            or the model's own ``projections``.
        seed: of what is drawn.
    """

    points: int | None = option(64, low=1, high=_set_model.LARGEST_POINTS)
    seeds: int | None = option(None, low=1, high=MOST)
    layer_norm: bool = False
    scale: Literal["model", "width"] = "model"
    start: Literal["identity", "xavier"] = "identity"
    pooling_start: Literal["mean", "xavier"] = "mean"
    distill_steps: int = option(0, low=0)
    distill_rate: float = option(1e-3, above=0.0)
    distill_trains: Literal["all", "learned", "projections"] = "all"
    seed: int = option(0, low=0, high=2**63 - 1)

    attachment: ClassVar = _set_model.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = learned_code(
        "set_transformer",
        (set_layers, _induced_attention, _set_model),
        _set_model.SetConfig.__name__,
        _set_model.SetModel.__name__,
    )
    not_causal: ClassVar[str] = ENCODERS

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"points": 3})

    def validate(self) -> None:
        if self.points is None and self.seeds is None:
            raise RecipeError("set_transformer: set points, seeds or both")
        if self.points is None and self.distill_steps:
            raise RecipeError("set_transformer: distill_steps fits attention over points, of which there are none")

    def contract(self) -> Contract:
        if self.points is not None:
            return super().contract()
        return Contract(
            needs={traits.FLOAT_WEIGHTS}, forbids={traits.QUANTIZED}, keeps={traits.SPARSE, traits.SPARSE_NM}
        )

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        if self.points is not None:
            super().check_model(model, label)
            require_encoder(model, ENCODERS, label)
            self._require_fewer(model.config, label)
        require_own_code(model, self.remote_code, label)
        require_self_attention(model.config, label)
        if self.seeds is not None and model.base_model is not model:
            raise ModelError(
                f"{label}: {type(model).__name__} has a head of its own, which does not read pooled vectors: seeds are "
                "for models without a head, as AutoModel loads them"
            )

    def _require_fewer(self, config: PretrainedConfig, label: str) -> None:
        context = context_length(config)
        if context is not None and self.points is not None and self.points > context:
            raise ModelError(
                f"{label}: {self.points:,} points are more than the {context:,} tokens that the model reads, so that "
                "attention over them would cost more than it does now"
            )

    def settings(self, config: PretrainedConfig, sizes: Mapping[str, int], label: str) -> dict[str, Any]:
        found: dict[str, Any] = {"layer_norm": self.layer_norm}
        if self.points is not None:
            self._require_fewer(config, label)
            found |= {"points": self.points, "heads": sizes["heads"], "head_width": sizes["head_width"]}
            found |= {"scale": self.scale, "start": self.start}
        if self.seeds is not None:
            text = config.get_text_config()
            found |= {"seeds": self.seeds, "pooling_heads": text.num_attention_heads}
            found |= {"pooling_width": text.hidden_size, "pooling_start": self.pooling_start}
        return found

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        self.check_model(run.model, run.label(self))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._transform(run, run.label(self))

    def _transform(self, run: Run, label: str) -> PreTrainedModel:
        if self.points is not None:
            model = super().transform_model(run)
        else:
            model = run.model
            settings = self.settings(model.config, {}, label)
            convert(model, self.remote_code, settings)
            run.record.reload = Reload.REMOTE_CODE.name
            run.report(self, **settings, model_class=type(model).__name__)
        pooling = _set_model.SetSettings.read(model.config.attention_pattern).pooling
        if pooling is not None:
            weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
            try:
                head = _set_model.add_pooling(model, pooling, device=weight.device, dtype=weight.dtype)
            except ValueError as error:
                raise ModelError(f"{label}: {error}") from None
            model.config.sentence_vectors = "pooler_output"
            run.report(self, pooling_weights=sum(each.numel() for each in head.parameters()))
        return model

    def recompute(self, case: Any) -> dict[str, Any]:
        settings, sizes = case.config["attention_pattern"], {}
        for name, part in (("weights_added", ".learned."), ("pooling_weights", "set_pooling.")):
            sizes[name] = sum(tensor.numel() for key, tensor in case.tensors.items() if part in key)
        found = {**settings, "model_class": case.config["architectures"][0]}
        if "points" in settings:
            found |= {"weights_added": sizes["weights_added"], "layers": len(case.config["layer_types"])}
            found["context"] = case.config["max_position_embeddings"]
        if "seeds" in settings:
            found["pooling_weights"] = sizes["pooling_weights"]
        return found

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        sentences = []
        if "points" in figures:
            sentences.append(
                f"Tokens attend through {figures['points']:,} learned points in each layer "
                f"({figures['weights_added']:,} weights)." + told(figures)
            )
        if "seeds" in figures:
            vectors = "vector" if figures["seeds"] == 1 else f"{figures['seeds']:,} vectors, one behind the other,"
            sentences.append(
                f"`pooler_output` is the {vectors} of a text that attention from learned seeds makes "
                f"({figures['pooling_weights']:,} weights), in the place of the mean over its tokens."
            )
        card.paragraph("Set Transformer", " ".join(sentences))


@hookimpl
def register_techniques(register) -> None:
    register(SetTransformer)
