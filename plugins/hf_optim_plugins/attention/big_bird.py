"""BigBird: blocks in a window, the first and the last block for all, and some random blocks.

    A = softmax(Q K^T / sqrt(d) + M) V,   M[i, j] = 0 if the block of i sees that of j;  else -inf
    block a of n sees block b if  |a - b| <= 1,  or a or b is 0 or n - 1,  or b is one of the r random blocks of a

After Zaheer et al., "Big Bird: Transformers for Longer Sequences", arXiv 2007.14062, section 2 and appendix D, in the
internal construction (ITC); with ``global_*`` fields further tokens are global, as in the extended one (ETC), except
that they are tokens of the text. Random blocks are drawn once for each layer (and head) over the whole length, by an
integer hash of ``seed``, layer, head and both blocks: the same on every machine. transformers' class draws them among
the first 1,024 tokens, and in evaluation puts the first block in the place of all, so that its keys count 1 + r times
in the softmax; ``choice="tf_eval"`` computes that, to rounding, for rows without padding, in training as well.

Rows of up to 5 + 2r blocks are computed in full, as there: a query would see nearly all. The last block is the last of
a row without its padding, and may be shorter: a row in a batch computes what it computes alone. Rows whose numbers of
blocks differ are computed one number after the other. No class of transformers computes this pattern, in training and
with padding, so the checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hf_optim import Contract, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode

from . import _big_bird_pattern
from ._attach import remote_code_of
from ._token_fields import TokenTechnique, global_places, names_tokens, token_settings

ENCODERS = "its last block is global, and random blocks are drawn over the whole row; use local, longformer or strided"


@technique(
    "big_bird",
    family="attention",
    paper=Paper("2007.14062", "Big Bird: Transformers for Longer Sequences", 2020),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class BigBird(TokenTechnique):
    """Restrict attention to blocks: a window, both ends, and random ones.

    Attributes:
        block: tokens in a block. Multiples of 64 are computed fastest.
        random: random blocks that a block sees.
        choice: ``stored``: drawn by ``seed``; ``tf_eval``: the first block ``random`` times more, as transformers'
            class computes in evaluation.
        seed: of the random blocks.
        by_head: random blocks of their own for each head; otherwise for each layer. A layout for each head is kept.
        global_first: how many further tokens at the beginning of a row are global.
        global_last: how many at its end.
        global_positions: positions of further global tokens.
        global_token_ids: all tokens with these ids are global, such as that of [SEP].
    """

    block: int = option(64, low=1)
    random: int = option(3, low=0, high=1024)
    choice: Literal["stored", "tf_eval"] = "stored"
    seed: int = option(0, low=0, high=_big_bird_pattern.LARGEST_SEED)
    by_head: bool = False
    global_first: int = option(0, low=0)
    global_last: int = option(0, low=0)
    global_positions: tuple[int, ...] = ()
    global_token_ids: tuple[int, ...] = ()

    attachment: ClassVar = _big_bird_pattern.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = remote_code_of(
        "big_bird", _big_bird_pattern, _big_bird_pattern.BigBirdBase.__name__, global_tokens=True
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"block": 4, "random": 1})

    def validate(self) -> None:
        super().validate()
        if self.choice == "tf_eval" and names_tokens(token_settings(self)):
            raise RecipeError("big_bird: transformers' class has no further global tokens: leave out choice='tf_eval'")

    def encoders_only(self, settings: Mapping[str, Any]) -> str:
        return ENCODERS

    def settings(self, config: PretrainedConfig, label: str) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in ("block", "random", "choice", "seed", "by_head")}
        return {**fields, **token_settings(self)}

    @staticmethod
    def sees(settings: Mapping[str, Any], place: Tensor, layer: int, head: int, causal: bool) -> Tensor:
        length = len(place)
        blocks, own = -(-length // settings["block"]), place // settings["block"]
        if blocks <= 5 + 2 * settings["random"]:
            return torch.ones(length, length, dtype=torch.bool)
        ends = (own == 0) | (own == blocks - 1)
        found = global_places(settings, length)
        seen = ((own[:, None] - own).abs() <= 1) | ends | ends[:, None] | found | found[:, None]
        if settings["choice"] == "stored":
            drawn = random_blocks(settings, blocks, layer, head if settings["by_head"] else 0)
            seen = seen | drawn[:, own][own]
        return seen


def random_blocks(settings: Mapping[str, Any], blocks: int, layer: int, head: int) -> torch.Tensor:
    """Return the random blocks of each block, bool ``[blocks, blocks]``, by the definition, with Python's integers."""

    def scrambled(number: int) -> int:
        number ^= number >> 16
        number = number * 0x21F0AAAD & 0xFFFFFFFF
        number ^= number >> 15
        number = number * 0x735A2D97 & 0xFFFFFFFF
        return number ^ number >> 15

    found = torch.zeros(blocks, blocks, dtype=torch.bool)
    start = scrambled(scrambled(settings["seed"]) ^ layer) ^ head
    for a in range(1, blocks - 1):
        of_row = scrambled(scrambled(start) ^ a)
        free = [b for b in range(1, blocks - 1) if abs(a - b) > 1]
        found[a, sorted(free, key=lambda b: scrambled(of_row ^ b))[: settings["random"]]] = True
    return found


@hookimpl
def register_techniques(register) -> None:
    register(BigBird)
