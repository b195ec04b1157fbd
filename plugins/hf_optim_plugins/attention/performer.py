"""Performer: softmax attention estimated by random features, in time and memory linear in the length (FAVOR+).

    A(q, k) = exp(scale q . k) = E[phi(q) . phi(k)],   phi(x) = exp(W x' - |x'|^2 / 2) / sqrt(m),   x' = sqrt(scale) x
    out_t = phi(q_t) S / phi(q_t) z,   S = sum of phi(k_s) v_s^T,   z = sum of phi(k_s),   over all s, or s <= t

Choromanski, Likhosherstov, Dohan, Song, Gane, Sarlos, Hawkins, Davis, Mohiuddin, Kaiser, Belanger, Colwell, Weller,
"Rethinking Attention with Performers", arXiv 2009.14794. The rows of W are Gaussian in direction, orthogonal in blocks
of as many as a head is wide, of the norms of Gaussian vectors (``norms: chi``) or of sqrt(d) (``fixed``). The error
against softmax attention falls as 1 / sqrt(m), and grows with the norms of queries and keys: attention that looks at
few tokens needs many features.

- Exact to rounding for these features: what is common to the features of a query, or to all keys of a row, cancels in
  the quotient. The published code adds 0.0001 to each feature and takes one maximum over the keys of the whole row,
  which a causal model must not know; ``kernel: softmax_authors`` does so, for encoders. Here a key's features are
  relative to the highest up to it, and nothing is added.
- Each key head has features of its own; the published code has one draw for all heads of a layer.
- In a causal model the tokens are computed in chunks, and the cache of decoding holds sums, of a size that does not
  depend on the length. Sums are float32 whatever the dtype of the model.
- ``redraw``: features are drawn again after so many forwards in training, which the paper recommends for models that
  are trained with them; never in evaluation. The number of the draw is saved with the model.
- ``kernel: relu`` is the paper's generalized attention, features ``max(W x', 0) + 0.001``; it is not an estimate of
  softmax attention, and needs training.
- There is no dropout of attention weights, which are not formed.

A converted model needs training. ``distill_steps`` lets each attention learn the outputs of the dense one before, on
the calibration data (``toolkit.distillation.AttentionDistillation``); ``logit_kd`` after it in a recipe trains the
whole. The checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import PretrainedConfig

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

from . import _feature_draws, _linear_kernel, _linear_scan, _performer_attention, _performer_model, _recomputed
from ._distilling import FeatureTechnique, told
from ._learned import learned_code


@technique(
    "performer",
    family="attention",
    paper=Paper("2009.14794", "Rethinking Attention with Performers", 2020),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Performer(FeatureTechnique):
    """Estimate softmax attention by positive orthogonal random features, in linear time.

    Attributes:
        features: m, random features of each key head. The default is that of the published code, for heads of 64.
        kernel: what is estimated: ``softmax`` attention, that of the ``relu`` kernel, or softmax attention with the
            constants of the published code (``softmax_authors``), for encoders.
        norms: of the rows of W: those of Gaussian vectors (``chi``), or sqrt(d) (``fixed``).
        learned: True to train W with the model; it begins as drawn.
        redraw: forwards in training after which features are drawn again; 0 for never. The published code has 1000.
        seed: of the features.
        distill_steps: optimizer steps in which each attention learns the outputs of the dense one, one for each
            calibration batch; 0 for none, which needs no data.
        distill_rate: highest learning rate of these steps.
        distill_trains: which weights learn in them: those of attention modules (``all``), their ``projections`` of
            queries, keys, values and outputs, or W alone (``learned``).
    """

    features: int = option(256, low=1, high=65536)
    kernel: Literal["softmax", "relu", "softmax_authors"] = "softmax"
    norms: Literal["chi", "fixed"] = "chi"
    learned: bool = False
    redraw: int = option(0, low=0, high=2**31 - 1)
    seed: int = option(0, low=0, high=2**31 - 1)
    distill_steps: int = option(0, low=0)
    distill_rate: float = option(1e-3, above=0.0)
    distill_trains: Literal["all", "learned", "projections"] = "all"

    attachment: ClassVar[Any] = _performer_model.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = learned_code(
        "performer",
        (_linear_kernel, _linear_scan, _recomputed, _feature_draws, _performer_attention, _performer_model),
        _performer_model.PerformerBase.__name__,
        _performer_model.PerformerModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"features": 12})

    def validate(self) -> None:
        if self.learned and self.redraw:
            raise RecipeError("performer: features are learned, or drawn again (redraw), not both")
        if self.distill_trains == "learned" and not self.learned:
            raise RecipeError("performer: distill_trains: learned trains W, which needs learned: true")

    def settings(self, config: PretrainedConfig, sizes: Mapping[str, int], label: str) -> dict[str, Any]:
        if sizes["causal"] and self.kernel == "softmax_authors":
            raise ModelError(
                f"{label}: {config.model_type} is causal: the published code takes one maximum over all keys of a row, "
                "which later tokens change; kernel: softmax computes the same without it"
            )
        return {
            "features": self.features,
            "kernel": self.kernel,
            "norms": self.norms,
            "learned": self.learned,
            "redraw": self.redraw,
            "seed": self.seed,
            "key_heads": sizes["key_heads"],
            "head_width": sizes["head_width"],
        }

    def recompute(self, case: Any) -> dict[str, Any]:
        settings = case.config["attention_pattern"]
        return {
            **settings,
            "layers": len(case.config["layer_types"]),
            "context": case.config["max_position_embeddings"],
            "weights_added": sum(t.numel() for n, t in case.tensors.items() if n.endswith(".learned.weight"))
            * settings["learned"],
            "model_class": case.config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        what = "softmax attention" if figures["kernel"] != "relu" else "attention of the ReLU kernel"
        card.paragraph(
            "Performer attention",
            f"{figures['features']} random features of each key head compute {what}, in time linear in the length."
            + told(figures),
        )


@hookimpl
def register_techniques(register) -> None:
    register(Performer)
