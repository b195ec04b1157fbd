"""Refusing to calibrate a vision or audio tower on batches without images or sound, before any work."""

from __future__ import annotations

from torch import nn

from ..errors import DataError
from ..recipes.technique import Technique
from ..runs.coverage import patterns_of
from ..runs.run import Run
from ..toolkit import topology
from ..toolkit.topology.towers import MEDIA_INPUTS, media_parts


def require_media(run: Run, step: Technique) -> None:
    """Raise ``DataError`` if a step calibrates layers of a tower, and no batch of the run has what the tower reads."""
    patterns = patterns_of(step)
    if patterns is None or run.data is None or not (step.implements("calibrate") and step.needs_data()):
        return
    given = {name for batch in run.data.batches for name in batch}
    if any(name in MEDIA_INPUTS or name.startswith(("pixel_", "input_features", "audio_")) for name in given):
        return
    model: nn.Module = run.model
    parts = media_parts(model, [block.name for block in topology.blocks(model)])
    chosen = topology.select_layers(model, *patterns, experts=True, embeddings=True)
    inside = [name for name in chosen if any(name.startswith(f"{part}.") for part in parts)]
    if inside:
        raise DataError(
            f"{run.label(step)} calibrates {len(inside)} layers that read images or sound, such as {inside[0]}, and "
            f"the calibration batches have {', '.join(sorted(given))} only: pass batches with images or sound, "
            "calibration=[dict(input_ids=..., pixel_values=...)], leave these layers out, or quantize them with rtn, "
            "which needs no data"
        )
