"""ETC: global-local attention, in the four pieces between global (g) and other, long (l) tokens.

    A = softmax(Q K^T / sqrt(d) + M) V,   M[i, j] = 0 if the piece of i, j is on, and in l2l |i - j| <= r;  else -inf

After Ainslie et al., "ETC: Encoding Long and Structured Inputs in Transformers", arXiv 2004.08483, section 3: global
tokens attend to global ones (g2g) and to all of the long input (g2l), long ones to global ones (l2g) and to those at
most the radius r away (l2l), which are 2r + 1 with the token itself. Each piece can be switched off; with ``hard_g2l``
a global token sees of the long input only its own span, up to the next global token: the paper's hard masking for
inputs of sentences. With r >= n - 1 and all pieces on, this is the model's full attention.

What can be done to a pretrained model is done; three parts of the paper need a model that is trained with them:

- its global tokens are an input of their own, with their own embeddings; here tokens of the text are global: those at
  fixed positions, with chosen ids, or marked by ``global_attention_mask`` of the model's forward;
- relative position labels, a learned bias of each head, are not added: the model keeps its own positions;
- contrastive predictive coding is a loss of pretraining.

Positions count from the first token that is not padding. No stock class of transformers has this attention, so the
checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from hf_optim import Contract, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode

from . import _etc_pattern
from ._attach import remote_code_of
from ._token_fields import TokenTechnique, global_places, token_settings


@technique(
    "etc",
    family="attention",
    paper=Paper("2004.08483", "ETC: Encoding Long and Structured Inputs in Transformers", 2020),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Etc(TokenTechnique):
    """Restrict attention to global tokens and a radius.

    Attributes:
        radius: how far a long token sees on each side.
        g2g: global tokens see global tokens.
        g2l: global tokens see long ones.
        l2g: long tokens see global ones.
        l2l: long tokens see those within the radius, themselves included.
        hard_g2l: a global token sees only the long tokens from itself to the next global one.
        global_first: how many tokens at the beginning of a row are global: 1 for the [CLS] of a classifier.
        global_last: how many at its end.
        global_positions: positions of further global tokens.
        global_token_ids: all tokens with these ids are global, such as that of [SEP].
    """

    radius: int = option(84, low=1)
    g2g: bool = True
    g2l: bool = True
    l2g: bool = True
    l2l: bool = True
    hard_g2l: bool = False
    global_first: int = option(1, low=0)
    global_last: int = option(0, low=0)
    global_positions: tuple[int, ...] = ()
    global_token_ids: tuple[int, ...] = ()

    attachment: ClassVar = _etc_pattern.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = remote_code_of(
        "etc", _etc_pattern, _etc_pattern.EtcBase.__name__, global_tokens=True
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"radius": 2})

    def validate(self) -> None:
        super().validate()
        if not (self.l2l or self.l2g) or not (self.g2g or self.g2l):
            raise RecipeError("etc: long tokens need l2l or l2g, and global ones g2g or g2l: others would see nothing")

    def settings(self, config: PretrainedConfig, label: str) -> dict[str, Any]:
        pieces = {name: getattr(self, name) for name in (*_etc_pattern.PIECES, "hard_g2l")}
        return {"radius": self.radius, **pieces, **token_settings(self)}

    @staticmethod
    def sees(settings: Mapping[str, Any], place: Tensor, layer: int, head: int, causal: bool) -> Tensor:
        key, near = global_places(settings, len(place)), (place[:, None] - place).abs() <= settings["radius"]
        query, span = key[:, None], key.cumsum(0)
        own = span[:, None] == span if settings["hard_g2l"] else torch.ones_like(near)
        boxes = {"g2g": query & key, "g2l": query & ~key & own, "l2g": ~query & key, "l2l": ~query & ~key & near}
        return torch.stack([box for name, box in boxes.items() if settings[name]]).any(0)


@hookimpl
def register_techniques(register) -> None:
    register(Etc)
