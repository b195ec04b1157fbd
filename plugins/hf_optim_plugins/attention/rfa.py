"""RFA: softmax attention over unit vectors estimated by random Fourier features, in time linear in the length.

    phi(x) = [sin(W x'), cos(W x')] / sqrt(m),   x' = (sigma / tau) x / (|x| + 0.001),   W ~ N(0, 1)
    E[phi(q) . phi(k)] = exp(-|q' - k'|^2 / 2), which at one sigma for all channels is softmax attention of q' and k'

Peng, Pappas, Yogatama, Schwartz, Smith, Kong, "Random Feature Attention", arXiv 2103.02143. Queries and keys are
divided by their norms, which bounds the variance, so ``sigma``, learned for each key head and channel, must bring back
what norms told: the logits of a new model lie within 1 / tau^2 of each other.

- ``gate``: the paper's recency gate, which the published code does not have: sums decay by ``g_t``, and a token enters
  with ``1 - g_t``. Here ``g_t = sigmoid(w . v_t + b)`` of each key head reads the token's value, which is linear in the
  layer's input, as the paper's gate is. For causal models.
- ``draws``: the published code samples W in each training step among 500 stored draws, and evaluates with the first;
  0 has one draw for training and evaluation. A step is a forward in training; the number of the choice is saved.
- One denominator in all forms of computation: sines and cosines may cancel, so the mean estimate is kept above
  ``floor``. The published code has two: at least 1 step by step, at least 0.001 of either sign with a mask, of sums
  that its constant factor 0.1 divides by 100; the factor cancels here.
- In a causal model the tokens are computed in chunks, and the cache of decoding holds sums, of a size that does not
  depend on the length. Sums are float32 whatever the dtype of the model.
- There is no dropout of attention weights, which are not formed. A model's own scale of the scores has no effect.

A converted model needs training. ``distill_steps`` lets each attention learn the outputs of the dense one before, on
the calibration data (``toolkit.distillation.AttentionDistillation``); ``logit_kd`` after it in a recipe trains the
whole. The checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

import math
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

from . import _feature_draws, _linear_kernel, _linear_scan, _recomputed, _rfa_attention, _rfa_model
from ._distilling import FeatureTechnique, told
from ._learned import learned_code


@technique(
    "rfa",
    family="attention",
    paper=Paper("2103.02143", "Random Feature Attention", 2021),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Rfa(FeatureTechnique):
    """Estimate softmax attention by random Fourier features of unit queries and keys, in linear time.

    Attributes:
        features: m, random projections of each key head, with a sine and a cosine each. The published code has as many
            as a head is wide.
        tau: temperature: W is divided by it. Small values tell keys apart, and have more variance.
        floor: least mean estimate: the denominator is kept above it, as a share of the weight of the tokens.
        gate: True for the recency gate, in causal models.
        draws: stored draws of W for all heads, among which training chooses in each forward; 0 for one fixed draw. At
            least as many as key heads.
        seed: of the features.
        distill_steps: optimizer steps in which each attention learns the outputs of the dense one, one for each
            calibration batch; 0 for none, which needs no data.
        distill_rate: highest learning rate of these steps.
        distill_trains: which weights learn in them: those of attention modules (``all``), their ``projections`` of
            queries, keys, values and outputs, or sigma and the gate alone (``learned``).
    """

    features: int = option(64, low=1, high=65536)
    tau: float = option(1.0, above=0.0)
    floor: float = option(0.01, above=0.0)
    gate: bool = False
    draws: int = option(0, low=0, high=65536)
    seed: int = option(0, low=0, high=2**31 - 1)
    distill_steps: int = option(0, low=0)
    distill_rate: float = option(1e-3, above=0.0)
    distill_trains: Literal["all", "learned", "projections"] = "all"

    attachment: ClassVar[Any] = _rfa_model.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = learned_code(
        "rfa",
        (_linear_kernel, _linear_scan, _recomputed, _feature_draws, _rfa_attention, _rfa_model),
        _rfa_model.RfaBase.__name__,
        _rfa_model.RfaModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"features": 6})

    def validate(self) -> None:
        for name in ("tau", "floor"):
            if not math.isfinite(getattr(self, name)):
                raise RecipeError(f"rfa: {name} must be a finite number")

    def settings(self, config: PretrainedConfig, sizes: Mapping[str, int], label: str) -> dict[str, Any]:
        if self.gate and not sizes["causal"]:
            raise ModelError(
                f"{label}: {config.model_type} is not causal: the gate forgets earlier tokens, and its tokens have no "
                "order; set gate: false"
            )
        if 0 < self.draws < sizes["key_heads"]:
            raise ModelError(
                f"{label}: each of the {sizes['key_heads']} key heads has a draw of its own: draws must be 0 or at "
                f"least {sizes['key_heads']}, not {self.draws}"
            )
        return {
            "features": self.features,
            "tau": self.tau,
            "floor": self.floor,
            "gate": self.gate,
            "draws": self.draws,
            "seed": self.seed,
            "key_heads": sizes["key_heads"],
            "head_width": sizes["head_width"],
        }

    def recompute(self, case: Any) -> dict[str, Any]:
        learned = (".learned.sigma", ".learned.gate_weight", ".learned.gate_bias")
        return {
            **case.config["attention_pattern"],
            "layers": len(case.config["layer_types"]),
            "context": case.config["max_position_embeddings"],
            "weights_added": sum(t.numel() for n, t in case.tensors.items() if n.endswith(learned)),
            "model_class": case.config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        gated = ", and a gate forgets earlier tokens" if figures["gate"] else ""
        card.paragraph(
            "Random feature attention",
            f"{figures['features']} random Fourier features of each key head estimate softmax attention over unit "
            f"vectors, in time linear in the length{gated}." + told(figures),
        )


@hookimpl
def register_techniques(register) -> None:
    register(Rfa)
