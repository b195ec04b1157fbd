"""Sparse Transformer: full attention factorized into two steps, through which every token reaches every other.

After Child et al., "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509, section 4.3, for a stride l
and the tokens j <= i that a causal model allows (an encoder sees both sides):

    strided:    A1(i) = {j : i - j <= l}                         A2(i) = {j : (i - j) mod l = 0}
    fixed:      A1(i) = {j : floor(j / l) = floor(i / l)}        A2(i) = {j : j mod l >= l - c}

The paper lets A1 and A2 alternate over the layers, lets every head see both (merged), or gives them to different heads
(section 4.2): ``steps``. With several heads on the fixed pattern it found it better if they look at distinct columns
of a block: ``rotate``. ``local`` sets the tokens in the window of the strided A1, its own included: l + 1 in the paper,
l in the authors' code (openai/sparse_attention). In a head or layer with the fixed A2 alone, a token of a causal model
sees no key before the first column, and gets zero there.

With ``fixed``, merged and l >= n this is the model's full attention, and with ``strided`` and l = 1 too.

No stock class of transformers has such attention, so the checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers import PretrainedConfig

from hf_optim import Contract, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode

from . import _sparse_transformer_pattern as _page
from ._attach import PatternTechnique, check_stride, remote_code_of, stride_of


@technique(
    "sparse_transformer",
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
class SparseTransformer(PatternTechnique):
    """Factorize the attention into a local step and a step over the distance.

    Attributes:
        pattern: ``strided``, for data with a period such as pictures, or ``fixed``, for text.
        stride: l; ``sqrt`` is the root of the model's context, rounded, of which the paper says to be near.
        vertices: c, the columns at the end of each block that all later tokens see (``fixed``).
        rotate: number of distinct groups of columns, over which the heads take turns (``fixed``).
        steps: who computes which step: ``merged`` (every head both), ``heads`` or ``layers`` (in turn).
        local: tokens in the window of the strided pattern, own included; None for the paper's ``stride + 1``.
    """

    pattern: Literal["strided", "fixed"] = "fixed"
    stride: int | Literal["sqrt"] = option(128)
    vertices: int = option(8, low=1)
    rotate: int = option(1, low=1)
    steps: Literal["merged", "heads", "layers"] = "merged"
    local: int | None = option(None, low=1)

    attachment: ClassVar = _page.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = remote_code_of(
        "sparse_transformer", _page, _page.SparseTransformerBase.__name__
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"stride": 8, "vertices": 2})

    def validate(self) -> None:
        check_stride(self)
        if self.pattern == "strided" and (self.rotate, self.vertices) != (1, 8):
            raise RecipeError("sparse_transformer: vertices and rotate belong to the fixed pattern")
        if self.pattern == "fixed" and self.local is not None:
            raise RecipeError("sparse_transformer: local belongs to the strided pattern; the fixed one has blocks")
        if self.pattern == "fixed" and self.stride != "sqrt" and self.vertices * self.rotate > self.stride:
            raise RecipeError(
                f"sparse_transformer: {self.rotate} x {self.vertices} columns do not fit into a block of {self.stride}"
            )

    def settings(self, config: PretrainedConfig, label: str) -> dict[str, Any]:
        stride = stride_of(self.stride, config, label)
        found = {"pattern": self.pattern, "stride": stride, "steps": self.steps}
        if self.pattern == "strided":
            return {**found, "local": stride + 1 if self.local is None else self.local}
        return {**found, "vertices": self.vertices, "rotate": self.rotate}

    @staticmethod
    def sees(settings: Mapping[str, Any], place: Tensor, layer: int, head: int, causal: bool) -> Tensor:
        i, j, stride = place[:, None], place[None, :], settings["stride"]
        if settings["pattern"] == "strided":
            first, second = (i - j).abs() < settings["local"], (i - j) % stride == 0
        else:
            width, turn = settings["vertices"], head // 2 if settings["steps"] == "heads" else head
            end = stride - turn % settings["rotate"] * width
            first = i // stride == j // stride
            second = ((j % stride < end) & (j % stride >= end - width)).expand_as(first)
        which = {"merged": None, "heads": head, "layers": layer}[settings["steps"]]
        return first | second if which is None else (first, second)[which % 2]


@hookimpl
def register_techniques(register) -> None:
    register(SparseTransformer)
