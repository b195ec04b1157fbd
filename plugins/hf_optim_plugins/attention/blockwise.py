"""Blockwise attention: the sequence is cut into blocks, and a token attends to the tokens of one block.

    A = softmax(Q K^T / sqrt(d) + M) V,      M[i, j] = 0 if pi(floor(i / b)) = floor(j / b) and the model allows j

and -inf elsewhere, with a permutation pi of the blocks for each head. After Qiu et al., "Blockwise Self-Attention for
Long Document Understanding", arXiv 1911.02972, section 3.1 and figure 2, with the permutations that the paper uses: the
identity, and cyclic shifts by whole blocks. With the identity in every head, information does not cross the border of a
block. The paper sets the number of blocks, this technique their length, so that a model may read texts of any length.

The paper's models are encoders. In a causal model a block may only look back: a shift by s looks at the block s before,
and the first s blocks, which have none, look at themselves. Positions count from the first token that is not padding.
With b >= n this is the model's full attention.

No stock class of transformers has such attention, so the checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig

from hf_optim import Contract, Paper, RecipeError, Reload, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode

from . import _blockwise_pattern as _page
from ._attach import PatternTechnique, remote_code_of

MOST_BLOCKS = 2**20


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
class Blockwise(PatternTechnique):
    """Restrict the attention of every token to a block of the sequence.

    Attributes:
        block: tokens in a block.
        shifts: by how many blocks each head looks back, in turn: ``(0,)`` is the own block in every head, ``(0, 0, 1)``
            the preceding block in every third head, where the first block of an encoder looks at the last.
    """

    block: int = option(512, low=1)
    shifts: tuple[int, ...] = (0,)

    attachment: ClassVar = _page.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = remote_code_of("blockwise", _page, _page.BlockwiseBase.__name__)

    def validate(self) -> None:
        if not self.shifts or not all(0 <= shift <= MOST_BLOCKS for shift in self.shifts):
            raise RecipeError(f"blockwise: shifts must be numbers of blocks from 0 to {MOST_BLOCKS:,}")

    def settings(self, config: PretrainedConfig, label: str) -> dict[str, Any]:
        return {"block": self.block, "shifts": list(self.shifts)}

    @staticmethod
    def sees(settings: Mapping[str, Any], place: Tensor, layer: int, head: int, causal: bool) -> Tensor:
        size, shifts = settings["block"], settings["shifts"]
        shift, own = shifts[head % len(shifts)], place[:, None] // size
        count = -(-len(place) // size)
        wanted = [max(b - shift, b if b < shift else 0) if causal else (b - shift) % count for b in range(count)]
        return place.new_tensor(wanted)[own] == place[None, :] // size


@hookimpl
def register_techniques(register) -> None:
    register(Blockwise)
