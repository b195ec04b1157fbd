"""The pattern of ``axial``. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim.toolkit.attention import (
    FIELD,
    Attachment,
    Band,
    Chunks,
    GlobalTokens,
    Pattern,
    PatternConfig,
    PatternModel,
    Term,
    chosen,
    whole,
)

from ._axial_lines import along_both, along_lines

AXES = ("layers", "heads", "union")


def grid_of(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the tokens before the grid, its rows and its columns; rows are 0 if the tokens fill as many as they need.

    Raises ``ValueError`` for settings that are not of a grid.
    """
    first, rows = whole(settings, "first", high=4096), whole(settings, "rows", high=2**15)
    return first, rows, whole(settings, "columns", low=1, high=2**15)


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern of all heads of a layer, or one for each head.

    Tokens before the grid see all and are seen by all, so that the places of a column, one every ``columns``, may count
    from the beginning of the sequence. Along an axis of length 1 there is nothing to see, so it gets neither layers nor
    heads.
    """
    first, rows, columns = grid_of(settings)
    axes = chosen(settings, "axes", AXES)
    along_row = Chunks(columns, first)
    along_column = Band(None, 0 if causal else None, columns)
    ends: tuple[Term, ...] = (GlobalTokens(first),) if first else ()
    of_rows = Pattern((along_row, *ends), causal)
    of_columns = Pattern((along_column, *ends), causal)
    if axes == "union":
        return [Pattern((along_row, along_column, *ends), causal)]
    if rows == 1:
        return [of_rows]
    if columns == 1:
        return [of_columns]
    if axes == "layers":
        return [of_columns if layer % 2 else of_rows]
    return [of_rows] * (heads - heads // 2) + [of_columns] * (heads // 2)


class GridAttachment(Attachment):
    """An attachment that computes images line by line, and refuses those of another grid."""

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Compute the attention of a module of transformers; see ``Attachment.attention``."""
        settings = getattr(module.config, FIELD, None)
        grid = grid_of(settings) if isinstance(settings, Mapping) else (0, 0, 0)  # the base class refuses others
        require_grid(*grid, key.shape[2])
        extras = attention_mask, softcap, s_aux, position_bias
        if min(grid[1:]) < 2 or any(extra is not None for extra in extras):
            given = (attention_mask, scaling, dropout, is_causal, softcap, s_aux, position_bias)
            return super().attention(module, query, key, value, *given, **kwargs)
        assert isinstance(settings, Mapping)
        heads, axes = query.shape[1], chosen(settings, "axes", AXES)
        key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        dropped = dropout if module.training else 0.0
        if axes == "union":
            out = along_both(query, key, value, grid, scale, dropped)
        elif axes == "layers":
            out = along_lines(query, key, value, grid, module.layer_idx % 2 == 1, scale, dropped)  # type: ignore
        else:
            halves = []
            for down, some in ((False, slice(0, heads - heads // 2)), (True, slice(heads - heads // 2, heads))):
                q, k, v = (part[:, some] for part in (query, key, value))
                halves.append(along_lines(q, k, v, grid, down, scale, dropped))
            out = torch.cat(halves, 1)
        return out.transpose(1, 2).contiguous(), None


def require_grid(first: int, rows: int, columns: int, tokens: int) -> None:
    """Raise ``ValueError`` if ``tokens`` are not those of an image of this grid."""
    if rows and tokens != first + rows * columns:
        raise ValueError(
            f"axial attention of {rows} x {columns} patches got {tokens} tokens, not {first + rows * columns}: convert "
            "the model at the size of these images"
        )


class GridConv2d(nn.Conv2d):
    """The convolution that makes patches, which refuses images of another grid.

    Images of equally many patches in other rows and columns would otherwise be computed along wrong axes.
    """

    grid: tuple[int, int] | None

    def forward(self, input: Tensor) -> Tensor:
        found = super().forward(input)
        if self.grid is not None and tuple(found.shape[-2:]) != self.grid:
            raise ValueError(
                f"axial attention of {self.grid[0]} x {self.grid[1]} patches got an image of {found.shape[-2]} x "
                f"{found.shape[-1]}: convert the model at the size of these images"
            )
        return found


def patch_convolution(model: nn.Module) -> nn.Conv2d | None:
    """Return the convolution that makes the patches of a vision transformer; None unless it has exactly one."""
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return found[0] if len(found) == 1 and type(found[0]) in (nn.Conv2d, GridConv2d) else None


def keep_grid(model: nn.Module, settings: Any) -> None:
    """Make the patch convolution of a model for images refuse other grids. Raises ``ValueError`` if it has none."""
    if not isinstance(settings, Mapping):
        return
    _, rows, columns = grid_of(settings)
    if not rows:
        return
    convolution = patch_convolution(model)
    if convolution is None:
        raise ValueError("config.attention_pattern is that of an image, but the model does not make patches")
    convolution.__class__ = GridConv2d
    convolution.grid = (rows, columns)  # type: ignore[assignment]


ATTACHMENT = GridAttachment("hf_optim_axial", build)


class AxialBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT


class AxialModel(PatternModel):
    """Base of the model classes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        keep_grid(self, getattr(config, FIELD, None))  # type: ignore[arg-type]

    def attach_attention(self) -> None:
        """Refuse images of other grids, too."""
        super().attach_attention()
        keep_grid(self, getattr(self.config, FIELD, None))  # type: ignore[arg-type, attr-defined]

    def detach_attention(self) -> bool:
        """Take images of any grid, too."""
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, GridConv2d):
                module.grid = None
        return super().detach_attention()
