"""Sparse Sinkhorn attention: a token attends to its block, and to a block that a learned sorting puts beside it.

    A = softmax(Q_i [K_i | (P K)_i]^T / sqrt(d)) [V_i | (P V)_i],      P = Sinkhorn((R + Gumbel noise) / T)

Tay, Bahri, Yang, Metzler, Juan, "Sparse Sinkhorn Attention", arXiv 2002.11296. R scores the blocks for each other by
summaries; Sinkhorn normalization makes its rows and columns sum to 1 in turn, so that P is a soft permutation of whole
blocks. The paper adds the scores of both blocks; here one softmax runs over the keys of both, as in the paper's text
and in public implementations. Values are sorted by the same matrix as keys.

- ``sorter``: ``linear`` is the paper's network, two layers that make a row of R of the summary of a block; it tells
  apart the blocks of the model's context, and longer rows are refused. ``attention`` scores the summary of a block's
  queries with those of the keys of all blocks; it begins as their product, which means something in a pretrained
  model, and takes rows of any length. The paper sums the tokens of a block (``summary: sum``); the mean is the default,
  since it does not grow with the block.
- The normalization ends with columns, which then sum to 1; rows do so to an error that falls with ``iterations``.
  ``positive: relu`` takes log(relu(R) + 1e-6) in the place of R, as a public implementation does.
- Causal models: a block asks by its first token, or by the sum of all tokens up to that (``prefix``), and P is the
  softmax of each row over the blocks before it. It is not doubly stochastic: a sum over a column would hold later rows.
- ``cut``, for encoders (the paper's SortCut): all tokens see the first ``cut`` sorted blocks and nothing else.
- Noise is drawn in training alone, the same for a seed.
- Rows are cut into blocks from their first token; the last block may be shorter, and padding takes no part: a place
  that a soft sorting fills from some padding counts with the share of its tokens.
- A cache holds all keys, since a later block may ask for any; one more token reads the two blocks alone, and the
  blocks are sorted once for each block.
- A block that is not below the length is the model's full attention.

The sort networks are weights of the model and need training. The checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import (
    Card,
    Contract,
    ModelError,
    Paper,
    Reload,
    Run,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.checkpoints.remote_code import RemoteCode

from . import _query_blocks, _recomputed, _sinkhorn_attention, _sinkhorn_kernel, _sinkhorn_model, _sinkhorn_sorting
from ._attach import context_length, require_encoder
from ._distilling import DistilledTechnique, told
from ._learned import learned_code

CUT = "a cut shows every token the same blocks, later ones too. Leave cut out"


@technique(
    "sinkhorn",
    family="attention",
    paper=Paper("2002.11296", "Sparse Sinkhorn Attention", 2020),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Sinkhorn(DistilledTechnique):
    """Attend to the own block of tokens and to a block that a learned sorting brings.

    Attributes:
        block: tokens of a block.
        sorter: the network that scores blocks: ``attention``, or ``linear`` as in the paper.
        summary: of the tokens of a block: ``mean``, or ``sum`` as in the paper.
        prefix: what a block of a causal model asks by: its ``first`` token, or all up to that (``cumulative``).
        positive: how scores are made positive: ``exp``, or ``relu``.
        temperature: by which scores are divided; small ones sort hard.
        iterations: of the normalization of rows and columns.
        noise: factor of the Gumbel noise in training; 0 leaves it out.
        cut: sorted blocks that all tokens of an encoder see, and nothing else; 0: own and sorted block.
        seed: of the noise and of a linear network's weights.
        distill_steps: optimizer steps in which each attention learns the outputs of the dense one, one for each batch
            of calibration data; 0: none.
        distill_rate: highest learning rate of these steps.
        distill_trains: which weights learn in them: those of attention modules (``all``), their ``projections``, or the
            sort networks (``learned``).
    """

    block: int = option(64, low=1, high=_sinkhorn_model.LONGEST_BLOCK)
    sorter: Literal["attention", "linear"] = "attention"
    summary: Literal["mean", "sum"] = "mean"
    prefix: Literal["first", "cumulative"] = "first"
    positive: Literal["exp", "relu"] = "exp"
    temperature: float = option(0.75, low=1e-3, high=1e3)
    iterations: int = option(8, low=1, high=1000)
    noise: float = option(1.0, low=0.0, high=1e3)
    cut: int = option(0, low=0, high=65536)
    seed: int = option(0, low=0, high=2**31 - 1)
    distill_steps: int = option(0, low=0)
    distill_rate: float = option(1e-3, above=0.0)
    distill_trains: Literal["all", "learned", "projections"] = "all"

    attachment: ClassVar[_sinkhorn_model.SortedAttachment] = _sinkhorn_model.SORTED
    remote_code: ClassVar[RemoteCode] = learned_code(
        "sinkhorn",
        (_query_blocks, _recomputed, _sinkhorn_kernel, _sinkhorn_sorting, _sinkhorn_attention, _sinkhorn_model),
        config_base=_sinkhorn_model.SortedConfig.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"block": 4})

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        super().check_model(model, label)
        if self.cut:
            require_encoder(model, CUT, label)

    def settings(self, config: PretrainedConfig, sizes: Mapping[str, int], label: str) -> dict[str, Any]:
        if self.cut and sizes["causal"]:
            raise ModelError(f"{label}: this model is causal: {CUT}")
        blocks = 0
        if self.sorter == "linear":
            context = context_length(config)
            if context is None:
                raise ModelError(
                    f"{label}: {config.model_type} has no fixed context, whose blocks a linear network tells apart: "
                    'use sorter="attention"'
                )
            blocks = -(-context // self.block)
        return {
            "block": self.block,
            "blocks": blocks,
            "sorter": self.sorter,
            "summary": self.summary,
            "prefix": self.prefix,
            "positive": self.positive,
            "temperature": self.temperature,
            "iterations": self.iterations,
            "noise": self.noise,
            "cut": self.cut,
            "seed": self.seed,
            "key_heads": sizes["key_heads"],
            "head_width": sizes["head_width"],
        }

    def figures(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"keys_seen": settings["block"] * (settings["cut"] or 2)}

    def recompute(self, case: Any) -> dict[str, Any]:
        settings = case.config["attention_pattern"]
        return {
            **settings,
            "layers": len(case.config["layer_types"]),
            "context": case.config["max_position_embeddings"],
            "weights_added": sum(
                t.numel() for name, t in case.tensors.items() if ".learned." in name and not name.endswith(".draws")
            ),
            "model_class": case.config["architectures"][0],
            "keys_seen": settings["block"] * (settings["cut"] if settings["cut"] else 2),
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        if not figures:
            return
        what = (
            f"the first {figures['cut']} of the sorted blocks"
            if figures["cut"]
            else "those of its block and of a block that is sorted beside it"
        )
        card.paragraph(
            "Sinkhorn attention",
            f"A network with {figures['weights_added']:,} weights sorts blocks of {figures['block']} tokens, in each "
            f"key head of {figures['layers']} layers. A token sees at most {figures['keys_seen']} keys: {what}."
            + told(figures),
        )


@hookimpl
def register_techniques(register) -> None:
    register(Sinkhorn)
