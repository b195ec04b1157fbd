"""Stacked experts whose integer codes a checkpoint stores one matrix at a time, as for the mixtures of transformers.

For codes transformers needs a conversion: it then decodes the matrices of a stack while it loads them. A conversion
belongs to a ``model_type``, and is registered when the code of the model is imported. Experts in floating point are
stored stacked, under the names of the model, to which no conversion applies; so they can stand beside codes of other
layers.

This file is stored with checkpoints, so it imports only transformers.
"""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

STACKS = ("gate_up_proj", "up_proj", "down_proj")


class CodedExperts:
    """Mixin of a model class with modules ``experts`` that have stacked matrices ``[E, out, in]``."""

    keeps_float_stacks = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = vars(cls).get("config_class")
        if config is not None:
            conversions: list[Any] = [
                WeightConverter(f"experts.*.{stack}.weight", f"experts.{stack}(?!_bias)", [MergeModulelist(dim=0)])
                for stack in STACKS
            ]
            register_checkpoint_conversion_mapping(config.model_type, conversions, overwrite=True)
