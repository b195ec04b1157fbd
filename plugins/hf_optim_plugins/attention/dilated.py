"""Dilated attention: a sliding window with gaps.

    A = softmax(Q K^T / sqrt(d) + M) V,      M[i, j] = 0 if |i - j| = m d for some m < w and the model allows j

and -inf elsewhere. After Beltagy et al., "Longformer: The Long-Document Transformer", arXiv 2004.05150, section 3.1:
the window of w tokens per side, its own included, reaches (w - 1) d tokens far at the cost of w. The paper lets heads
differ (some without dilation see the neighbourhood, others the distance), and dilates upper layers alone. Both are
lists here. ``window`` counts as in ``local``, and not as in the paper, whose w is both sides together.

With d = 1 and w >= n this is the model's full attention. If all heads of all layers have the same d > 1, tokens of
different residues modulo d never exchange information.

No stock class of transformers has such attention, so the checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import PretrainedConfig

from hf_optim import Contract, ModelError, Paper, RecipeError, Reload, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode

from . import _dilated_pattern as _page
from ._attach import LONGEST, PatternTechnique, alike_as_one, remote_code_of


@technique(
    "dilated",
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
class Dilated(PatternTechnique):
    """Restrict the attention of every token to a window with gaps.

    Attributes:
        window: tokens per side that a token sees, its own included.
        dilation: distance of neighbouring tokens in the window: one for all, or one for each head or layer.
        by: what a list of several dilations counts, ``head`` or ``layer``.
    """

    window: int = option(128, low=2)
    dilation: tuple[int, ...] = (2,)
    by: Literal["head", "layer"] = "head"

    attachment: ClassVar = _page.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = remote_code_of("dilated", _page, _page.DilatedBase.__name__)

    def validate(self) -> None:
        if not self.dilation or not all(1 <= dilation <= LONGEST for dilation in self.dilation):
            raise RecipeError(f"dilated: dilation must be distances from 1 to {LONGEST:,}")

    def settings(self, config: PretrainedConfig, label: str) -> dict[str, Any]:
        layers = config.get_text_config().num_hidden_layers
        if self.by == "layer" and len(self.dilation) not in (1, layers):
            raise ModelError(f"{label}: dilation has {len(self.dilation)} entries, but the model has {layers} layers")
        return {"window": self.window, "dilation": alike_as_one(self.dilation), "by": self.by}

    @staticmethod
    def sees(settings: Mapping[str, Any], place: Tensor, layer: int, head: int, causal: bool) -> Tensor:
        dilations = settings["dilation"]
        dilation = dilations[0 if len(dilations) == 1 else head if settings["by"] == "head" else layer]
        distance = (place[:, None] - place[None, :]).abs()
        return (distance % dilation == 0) & (distance // dilation < settings["window"])


@hookimpl
def register_techniques(register) -> None:
    register(Dilated)
