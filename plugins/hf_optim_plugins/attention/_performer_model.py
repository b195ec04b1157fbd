"""FAVOR+ attention in the models of transformers.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim.toolkit.attention import (
    Call,
    LearnedAttachment,
    LearnedConfig,
    LearnedModel,
    TensorState,
    chosen,
    whole,
)

from ._feature_draws import Drawn, count_forward, fill_, generator_for, orthogonal_features
from ._linear_kernel import PositiveSums
from ._performer_attention import performer_attention

KERNELS = ("softmax", "relu", "softmax_authors")
NORMS = ("chi", "fixed")


@dataclass(frozen=True)
class PerformerSettings:
    """What the configuration says of FAVOR+ attention; see the fields of the technique."""

    features: int
    kernel: str
    norms: str
    learned: bool
    redraw: int
    seed: int
    key_heads: int
    head_width: int


class PerformerFeatures(Drawn):
    """The random features of one attention.

    Attributes:
        weight: W, ``[key heads, features, width]``; a parameter if it is learned, else a buffer.
    """

    weight: Tensor

    def __init__(self, settings: PerformerSettings, layer: int) -> None:
        super().__init__(settings.redraw)
        self.settings, self.layer = settings, layer
        empty = torch.empty(settings.key_heads, settings.features, settings.head_width)
        if settings.learned:
            self.weight = nn.Parameter(empty)
        else:
            self.register_buffer("weight", empty)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the first draw."""
        self.draw(0)
        fill_(self.draws, torch.zeros_like(self.draws))

    def used_weight(self) -> Tensor:
        """Return W; in a backward that computes a forward again, W of that forward."""
        if self.training and self.draw_every:
            return self.forwards.value(lambda: self.weight)  # type: ignore[no-any-return]
        return self.weight

    def draw(self, number: int) -> None:
        """Set the features to draw ``number``, which the seed, the layer and the number determine."""
        if self.weight.is_meta:
            return
        own = self.settings
        generator = generator_for(own.seed, self.layer, number)
        drawn = orthogonal_features(own.key_heads, own.features, own.head_width, generator, own.norms)
        if isinstance(self.weight, nn.Parameter):
            fill_(self.weight, drawn)
        else:
            self.weight = drawn.to(self.weight)  # another tensor: a graph may need the former


class PerformerAttachment(LearnedAttachment):
    """The attention function around ``performer_attention``."""

    title = "FAVOR+ attention"

    def read(self, settings: Mapping[str, Any]) -> PerformerSettings:
        """Return the settings. Raises ``ValueError`` for any others."""
        learned = settings.get("learned")
        if not isinstance(learned, bool):
            raise ValueError(f"FAVOR+ attention has learned={str(learned)[:40]!r}, not true or false")
        found = PerformerSettings(
            features=whole(settings, "features", low=1, high=65536),
            kernel=chosen(settings, "kernel", KERNELS),
            norms=chosen(settings, "norms", NORMS),
            learned=learned,
            redraw=whole(settings, "redraw"),
            seed=whole(settings, "seed"),
            key_heads=whole(settings, "key_heads", low=1, high=4096),
            head_width=whole(settings, "head_width", low=1, high=4096),
        )
        if found.learned and found.redraw:
            raise ValueError("FAVOR+ attention has features that are learned, and drawn again: choose one")
        if unknown := sorted(str(name)[:40] for name in set(settings) - set(vars(found))):
            raise ValueError(f"FAVOR+ attention has settings that it does not know: {unknown[:4]}")
        return found

    def build_part(self, settings: Mapping[str, Any], layer: int) -> nn.Module:
        """Return the features of an attention."""
        return PerformerFeatures(self.read(settings), layer)

    def compute_call(self, part: Any, call: Call) -> tuple[Tensor, TensorState | None]:
        """Return the output of a call, and its sums. ``part`` has the attributes of ``PerformerFeatures``."""
        if call.causal and part.settings.kernel == "softmax_authors":
            raise ValueError(
                "the published code takes one maximum over all keys, which later tokens change: kernel "
                "softmax_authors is not for causal models"
            )
        state = None if call.state is None else PositiveSums(**call.state)
        out, state = performer_attention(
            call.query, call.key, call.value, part.used_weight(), call.scale, call.causal, part.settings.kernel,
            call.valid, state, call.keeps,
        )  # fmt: skip
        return out, None if state is None else TensorState(state._asdict())


ATTACHMENT = PerformerAttachment("hf_optim_performer")


class PerformerBase(LearnedConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT


class PerformerModel(LearnedModel):
    """Base of the model classes: forwards in training are counted, after some of which features are drawn again."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        count_forward(self)  # type: ignore[arg-type]
        return super().__call__(*args, **kwargs)
