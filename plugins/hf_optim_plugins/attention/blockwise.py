"""Blockwise attention: the sequence is cut into blocks, and a token attends to the tokens of its own block.

    A = softmax(Q K^T / sqrt(d) + M) V,    M[i, j] = 0 if floor(i / b) = floor(j / b) and the model allows j, else -inf

After Qiu et al., "Blockwise Self-Attention for Long Document Understanding", arXiv 1911.02972, with the identity as the
permutation of blocks in every head; information does not cross the border of a block. With b >= n this is the model's
full attention. Positions count from the first token that is not padding.

No stock class of transformers has such attention, so the checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from hf_optim import Contract, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode

from . import _blockwise_pattern
from ._attach import attach, remote_code_of, require_interface, require_self_attention


@technique(
    "blockwise",
    family="attention",
    paper=Paper("1911.02972", "Blockwise Self-Attention for Long Document Understanding", 2019),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Blockwise(Technique):
    """Restrict the attention of every token to its block of the sequence.

    Attributes:
        block: tokens in a block.
    """

    block: int = option(512, low=1)

    remote_code: ClassVar[RemoteCode] = remote_code_of(
        "blockwise", _blockwise_pattern, _blockwise_pattern.BlockwiseBase.__name__
    )

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        require_interface(model, self.remote_code, label)

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        require_self_attention(run.config, run.label(self))
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        settings = {"block": self.block}
        return attach(run, self, self.remote_code, _blockwise_pattern.ATTACHMENT, settings)

    def recompute(self, case: Any) -> dict[str, Any]:
        block, length = case.config["attention_pattern"]["block"], case.config["max_position_embeddings"]
        causal = "CausalLM" in case.config["architectures"][0]
        place = torch.arange(length)
        near = place[:, None] // block == place // block
        allowed = place[:, None] >= place if causal else torch.ones(length, length, dtype=torch.bool)
        return {
            "block": block,
            "layers": len(case.config["layer_types"]),
            "context": length,
            "share_of_attention": int((near & allowed).sum()) / int(allowed.sum()),
            "model_class": case.config["architectures"][0],
        }


@hookimpl
def register_techniques(register) -> None:
    register(Blockwise)
