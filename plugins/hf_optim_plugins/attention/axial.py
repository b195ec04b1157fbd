"""Axial attention: tokens lie on a grid, and a token attends to its row and to its column.

    A = softmax(Q K^T / sqrt(d) + M) V,      M[i, j] = 0 if i and j share the axis and the model allows j, else -inf

After Ho, Kalchbrenner, Weissenborn, Salimans, "Axial Attention in Multidimensional Transformers", arXiv 1912.12180: a
layer attends along one axis, and two layers in turn connect every pair of patches. Here a layer can also divide its
heads among the axes, or see both axes in every head. The last is one softmax over the row and the column, in which a
token counts once: the projections of a pretrained head are made for weights that sum to 1. (The package
``axial-attention`` adds the results of two attentions, one for each axis, that have projections of their own.)

- Vision transformers: the grid is that of the patches. Class, distillation and register tokens stand before it; they
  see all tokens and are seen by all.
- Sequences: rows of ``columns`` tokens, the last one perhaps shorter. In a causal model a token sees its row up to
  itself, and its column in the rows above. The paper's model for images sees more: an outer network attends to whole
  rows, without a mask, and its result is moved down by one row, so that a pixel reads all of the rows above; an inner
  one is moved right by one pixel. That needs two networks. In one, whose tokens predict their successors, no number of
  layers brings a token to the right in an earlier row into sight, since neither axis leads to the left.

A grid of one row, or of one column, gives the model's full attention. No stock class of transformers has such
attention, so the checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import Card, Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode, joined
from hf_optim.toolkit.attention import FIELD, STORED
from hf_optim.toolkit.topology import dummy_inputs

from . import _axial_lines, _axial_pattern
from ._attach import attach, require_interface, require_self_attention
from ._image_grid import configured_grid, measured_grid, require_patches


@technique(
    "axial",
    family="attention",
    paper=Paper("1912.12180", "Axial Attention in Multidimensional Transformers", 2019),
    contract=Contract(
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Axial(Technique):
    """Restrict the attention of every token to its row and its column of a grid.

    Attributes:
        columns: tokens in a row. None: the patches in a row of the model's images; a model of sequences needs a number.
        rows: of the patches of an image, only to be checked against the model; a sequence fills as many as it needs.
        first: tokens before the grid, which see all and are seen by all. None: what stands before the patches of an
            image; none in a sequence.
        axes: rows in even and columns in odd layers (``layers``), rows in the first and columns in the second half of
            the heads (``heads``), or both in every head (``union``).
    """

    columns: int | None = option(None, low=1, high=2**15)
    rows: int | None = option(None, low=1, high=2**15)
    first: int | None = option(None, low=0, high=4096)
    axes: Literal["layers", "heads", "union"] = "layers"

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="axial",
        source=joined(*STORED, _axial_lines, _axial_pattern),
        config_base=_axial_pattern.AxialBase.__name__,
        field=FIELD,
        model_base=_axial_pattern.AxialModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"columns": 2})

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        require_interface(model, self.remote_code, label)
        if reads_images(model):
            require_patches(model, label)
        self._check_grid(model.config, reads_images(model), label)

    def _check_grid(self, config: PretrainedConfig, image: bool, label: str) -> None:
        """Raise ``ModelError`` if the fields do not describe a grid of the model's tokens, or an axis gets nothing."""
        grid = configured_grid(config) if image else None
        if image and grid is not None:
            self._compare(grid, label)
        elif self.columns is None:
            raise ModelError(f"{label}: {config.model_type} reads sequences, which have no rows: set columns")
        elif self.rows is not None:
            raise ModelError(
                f"{label}: {config.model_type} reads sequences, which fill as many rows as they need: rows is for "
                "models of images"
            )
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        lines = grid if grid is not None else (2, self.columns)
        if 1 in lines or self.axes == "union":
            return
        if (layers if self.axes == "layers" else heads) < 2:
            raise ModelError(
                f"{label}: the model has one of its {self.axes}, and two axes to divide among them: choose other axes"
            )
        context = getattr(config, "max_position_embeddings", None)
        if grid is None and context and self.columns >= context:
            raise ModelError(
                f"{label}: {context} positions fill one row of {self.columns} columns, so {self.axes} of columns would "
                "see their own token alone: set fewer columns, or axes: union"
            )

    def _compare(self, grid: tuple[int, int], label: str) -> None:
        """Raise ``ModelError`` if the fields name another grid than that of the images."""
        asked = self.rows or grid[0], self.columns or grid[1]
        if asked != grid:
            raise ModelError(
                f"{label}: a grid of {asked[0]} x {asked[1]} is not that of the model's images, {grid[0]} x {grid[1]} "
                "patches"
            )

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        label = run.label(self)
        require_self_attention(run.config, label, run.loaded_class)
        grid = configured_grid(run.config)
        if grid is not None:
            self._compare(grid, label)
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        first, rows, columns = self.first or 0, 0, self.columns or 0
        if reads_images(model):
            first, rows, columns = measured_grid(model, dummy_inputs(model), label)
            self._compare((rows, columns), label)
            if self.first not in (None, first):
                raise ModelError(f"{label}: {first} tokens stand before the patches, not {self.first}")
        settings = {"first": first, "rows": rows, "columns": columns, "axes": self.axes}
        return attach(run, self, self.remote_code, _axial_pattern.ATTACHMENT, settings)

    def recompute(self, case: Any) -> dict[str, Any]:
        config = case.config
        settings, layers = config["attention_pattern"], len(config["layer_types"])
        first, rows, columns = settings["first"], settings["rows"], settings["columns"]
        length = config.get("max_position_embeddings") or first + rows * columns
        causal = "CausalLM" in config["architectures"][0]
        i, j = torch.arange(length)[:, None] - first, torch.arange(length) - first
        before = (i < 0) | (j < 0)
        row = before | (i // columns == j // columns)
        column = before | (i % columns == j % columns)
        allowed = (i >= j) if causal else torch.ones(length, length, dtype=torch.bool)
        shares = [float((axis & allowed).sum()) / float(allowed.sum()) for axis in (row, column, row | column)]
        heads = config["num_attention_heads"]
        parts = {
            "union": shares[2],
            "layers": sum(shares[layer % 2] for layer in range(layers)) / layers,
            "heads": (shares[0] * (heads - heads // 2) + shares[1] * (heads // 2)) / heads,
        }
        share = shares[0] if rows == 1 else shares[1] if columns == 1 else parts[settings["axes"]]
        return {
            **settings,
            "layers": layers,
            "context": length,
            "share_of_attention": shares[2] if settings["axes"] == "union" else share,
            "model_class": config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        size = (
            f"{figures['rows']} x {figures['columns']} patches" if figures["rows"] else f"{figures['columns']} columns"
        )
        which = {"layers": "by layer", "heads": "by head", "union": "both in each head"}[figures["axes"]]
        share = figures["share_of_attention"]
        card.paragraph(
            "Axial attention",
            f"A token attends to its row and column of a grid of {size} ({which}); {figures['first']} tokens before "
            f"it see all and are seen by all. This is {share:.1%} of the pairs of full attention over "
            f"{figures['context']} tokens.",
        )


def reads_images(model: PreTrainedModel) -> bool:
    """Return True for models of images."""
    return model.main_input_name == "pixel_values"


@hookimpl
def register_techniques(register) -> None:
    register(Axial)
