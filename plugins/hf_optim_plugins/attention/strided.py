"""Strided attention: every token attends to the tokens whose distance is a multiple of the stride.

    A = softmax(Q K^T / sqrt(d) + M) V,      M[i, j] = 0 if (i - j) mod s = 0 (or |i - j| < w) and the model allows j

and -inf elsewhere: the second step of the strided pattern of Child et al., "Generating Long Sequences with Sparse
Transformers", arXiv 1904.10509, section 4.3, in every head; the neighbourhood ``w`` is an addition (for both steps of
the paper see ``sparse_transformer``). A token sees keys before it, in an encoder also behind it. Without a
neighbourhood, tokens of different residues modulo s never exchange information, in any number of layers.

With s = 1 this is the model's full attention. In their natural order the tokens have no empty block; they are computed
in the order of their residues, so that time follows the pairs.

No stock class of transformers has such attention, so the checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import PretrainedConfig

from hf_optim import Contract, Paper, Reload, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode

from . import _strided_pattern as _page
from ._attach import PatternTechnique, check_stride, remote_code_of, stride_of


@technique(
    "strided",
    family="attention",
    paper=Paper("1904.10509", "Generating Long Sequences with Sparse Transformers", 2019),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Strided(PatternTechnique):
    """Restrict the attention of every token to every s-th token.

    Attributes:
        stride: the distance of the tokens that see each other; ``sqrt`` is the root of the model's context, rounded.
        window: positions per side that a token sees as well, its own included; 0 or 1 for none.
    """

    stride: int | Literal["sqrt"] = option("sqrt")
    window: int = option(0, low=0)

    attachment: ClassVar = _page.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = remote_code_of("strided", _page, _page.StridedBase.__name__)

    def validate(self) -> None:
        check_stride(self)

    def settings(self, config: PretrainedConfig, label: str) -> dict[str, Any]:
        return {"stride": stride_of(self.stride, config, label), "window": self.window}

    @staticmethod
    def sees(settings: Mapping[str, Any], place: Tensor, layer: int, head: int, causal: bool) -> Tensor:
        distance = (place[:, None] - place[None, :]).abs()
        return (distance % settings["stride"] == 0) | (distance < settings["window"])


@hookimpl
def register_techniques(register) -> None:
    register(Strided)
