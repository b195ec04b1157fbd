"""Transformer-XL: a text is read in segments, and each attends to a memory of the tokens before it.

    h_mem = SG(h[p - M : p]),      segment: h[p : p + L],      A = softmax(scores(h, [h_mem, h])) V([h_mem, h])

with segments of L tokens, a memory of M, and no gradient through the memory (SG). Dai, Yang, Yang, Carbonell, Le,
Salakhutdinov, "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", arXiv 1901.02860, section 3.
Segments count from the first token of a row that is not padding, so what a token sees follows from the text, not from
how a caller cuts it: a forward of a whole row, prefill in chunks, and decoding token by token compute the same.

Positions:

- ``carried``, for a pretrained decoder: the memory holds keys and values with the positions of the whole text. This is
  not what the paper trains: it is exact. A memory that covers the text gives the dense model, and nothing needs to be
  trained. Rotary positions go on without end. A learned table of positions (GPT-2, OPT) ends: texts up to its length
  take less memory, and longer ones are refused.
- ``relative``, the paper's section 3.3, for models trained from scratch: ``A[i, j] = (q_i + u) k_j + (q_i + v) W_r
  r(i - j)``, with sines and cosines as halves. The positions of the model are switched off (a table of positions gives
  every token its first row), and ``W_r``, u and v are new weights: a converted model needs to be trained. As in the
  authors' code, the memory holds inputs of a layer, which are projected again by the present weights in training; here
  these are the inputs of its attention, behind the norm of models that have it first. Without training, projections
  are held: the same numbers. The authors clamp distances (``clamp``) and share u and v between the layers, or not
  (``untie``).

What of this is a window: a query at place i of its segment sees M + i tokens before it. With ``segment: 1`` that is M
for every query: the sliding window of Mistral with ``sliding_window = M + 1``, computed as one (``local`` converts to a
stock class that has it). Longer segments differ from a window in three ways: queries late in a segment see up to
L - 1 tokens more; keys end at the border of a segment minus M, so that a cache is cut once a segment; and the gradient
stops there. Like a window, n layers reach back n M tokens and more: what the memory of a layer holds was computed with
the memory of the layer below. A model that reads a text in pieces, each by itself, sees nothing from before the piece.

The cache holds at most M + L tokens, whatever the length of the text. ``stream`` (of the model's forward) carries the
memory from one batch to the next in training, as the paper does; ``hf_optim.SegmentStreams`` makes such batches.
REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import Card, Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode, joined
from hf_optim.toolkit.attention import STORED

from . import _position_bound, _relative_positions, _segment_walk, _stream_memory, _xl_model
from ._attach import PatternTechnique, attach, context_length, layer_patterns, require_interface, require_self_attention
from ._memory_checks import require_blind, require_causal, require_decoder, require_rotation, table_of

WHAT = "a memory of earlier segments"


@technique(
    "transformer_xl",
    family="attention",
    paper=Paper("1901.02860", "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", 2019),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class TransformerXL(PatternTechnique):
    """Read texts in segments, each with a memory of the tokens before it.

    Attributes:
        segment: tokens of a segment; None is half of the model's context.
        memory: tokens before a segment that its queries see; None is half of the model's context.
        positions: ``carried`` keeps those of the model; ``relative`` replaces them by the paper's, with new weights.
        stop_gradient: no gradient flows through the memory, as in the paper. False: it flows through the whole row.
        clamp: with ``relative``, the largest distance that is told apart; 0: all are.
        untie: with ``relative``, each layer has its own u and v.
        seed: of the new weights.
    """

    segment: int | None = option(None, low=1, high=_xl_model.LONGEST_MEMORY)
    memory: int | None = option(None, low=1, high=_xl_model.LONGEST_MEMORY)
    positions: Literal["carried", "relative"] = "carried"
    stop_gradient: bool = True
    clamp: int = option(0, low=0)
    untie: bool = False
    seed: int = option(0, low=0)

    attachment: ClassVar = _xl_model.ATTACHMENT
    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="transformer_xl",
        source=joined(*STORED, _position_bound, _segment_walk, _relative_positions, _stream_memory, _xl_model),
        config_base=_xl_model.TransformerXLBase.__name__,
        field="attention_pattern",
        model_base=_xl_model.TransformerXLModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"segment": 3, "memory": 4})

    def contract(self) -> Contract:
        if self.positions == "carried":
            return self.spec.contract
        return Contract(
            needs={traits.FLOAT_WEIGHTS},
            forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
            adds={traits.SPARSE_ATTENTION},
            keeps={traits.SPARSE, traits.SPARSE_NM},
            owns={"attention"},
        )

    def settings(self, config: PretrainedConfig, label: str) -> dict[str, Any]:
        context = context_length(config)
        if context is None and (self.segment is None or self.memory is None):
            raise ModelError(f"{label}: {config.model_type} has no fixed context to halve: set segment and memory")
        half = max(1, (context or 2) // 2)
        return {
            "segment": half if self.segment is None else self.segment,
            "memory": half if self.memory is None else self.memory,
            "positions": self.positions,
            "stop_gradient": self.stop_gradient,
            "clamp": self.clamp,
            "untie": self.untie,
            "table": 0,
        }

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        super().check_model(model, label)
        require_decoder(model, WHAT, label)
        self._require_fitting(model.config, label)

    def _require_fitting(self, config: PretrainedConfig, label: str) -> None:
        """Raise ``ModelError`` for a memory that leads to distances which the model does not know."""
        settings, context = self.settings(config, label), context_length(config)
        if self.positions == "carried":
            require_rotation(config, label)
        reach = settings["memory"] + settings["segment"]
        if self.positions == "carried" and context is not None and reach > context:
            raise ModelError(
                f"{label}: a memory of {settings['memory']:,} tokens and a segment of {settings['segment']:,} make "
                f"distances up to {reach - 1:,}, and the model has {context:,} positions: choose a smaller memory or "
                "segment, or put extend_positions before this step"
            )

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        label = run.label(self)
        require_self_attention(run.config, label)
        layer_patterns(run.config, self.attachment, self.settings(run.config, label), True, label)
        self._require_fitting(run.config, label)
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        require_interface(model, self.remote_code, label)
        require_decoder(model, WHAT, label)
        require_causal(model, WHAT, label)
        self._require_fitting(model.config, label)
        settings = self.settings(model.config, label)
        relative = self.positions == "relative"
        if relative:
            require_blind(model, label)
        else:
            settings["table"] = table_of(model, label)
        with torch.random.fork_rng(devices=[]):
            attach(run, self, self.remote_code, self.attachment, settings)
        if relative:
            self._initialize(model)
        return model

    def _initialize(self, model: PreTrainedModel) -> None:
        weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        generator = torch.Generator().manual_seed(self.seed)
        for module in model.modules():
            relative: Any = getattr(module, "relative", None)
            if type(relative).__name__ == _relative_positions.RelativePositions.__name__:
                relative.initialize(getattr(model.config, "initializer_range", 0.02), generator)
                relative.to(device=weight.device, dtype=weight.dtype).train(module.training)

    @staticmethod
    def sees(settings: Mapping[str, Any], place: Tensor, layer: int, head: int, causal: bool) -> Tensor:
        size, memory = settings["segment"], settings["memory"]
        begin = place[:, None] - place[:, None] % size
        return (place[None, :] >= begin - memory) & (place[None, :] <= place[:, None])

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        new = (
            "Positions are relative, with new weights in each layer: the model computes nothing of use before it is "
            "trained."
            if figures["positions"] == "relative"
            else "Positions are those of the whole text."
        )
        end = f" The table of positions ends texts at {figures['table']:,} tokens." if figures["table"] else ""
        card.paragraph(
            "Segments with a memory",
            f"Texts are read in segments of {figures['segment']:,} tokens, each with a memory of the "
            f"{figures['memory']:,} tokens before it. {new}{end} A cache holds at most "
            f"{figures['memory'] + figures['segment']:,} tokens.",
        )


@hookimpl
def register_techniques(register) -> None:
    register(TransformerXL)
