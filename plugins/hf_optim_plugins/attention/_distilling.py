"""Calibration of converted attention: it learns the outputs of the dense attention, and the record says how well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import Run, Scope, Technique, hookimpl
from hf_optim.toolkit.distillation import AttentionDistillation

from ._learned import LearnedTechnique

DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")  # names of a setting
Trains = Literal["all", "learned", "projections"]


def distill(run: Run, step: Technique, steps: int, rate: float, trains: Trains) -> Iterator[None]:
    """Yield before each pass over the calibration data, in which the attention of the model learns; then report.

    Args:
        run: its model has been converted.
        step: the technique, which needs the whole model.
        steps, rate, trains: see ``AttentionDistillation``.
    """
    found = {name: module for name, module in run.model.named_modules() if hasattr(module, "is_causal")}
    with AttentionDistillation(run.model, found, run.label(step), steps, rate, trains, run.masks) as distillation:
        yield from distillation.passes()
    run.report(step, distillation=distillation.figures())


def warn_of_dropout(run: Run, step: Technique, config: PretrainedConfig) -> None:
    """Warn if a model drops attention weights in training, which attention that forms none cannot."""
    share = max((getattr(config.get_text_config(), name, None) or 0.0 for name in DROPOUTS), default=0.0)
    if share > 0:
        run.warn(
            step, f"attention weights are not formed: in training, none are dropped ({share:g} in the dense model)"
        )


def told(figures: dict[str, Any]) -> str:
    """Return what a card says of a distillation that was reported; empty if there was none."""
    found = figures.get("distillation")
    if not found:
        return ""
    return (
        f" Each attention learned the outputs of the dense one in {found['steps']} steps on the calibration data: the "
        f"squared error fell from {found['before']:.1%} to {found['after']:.1%} of the squared outputs, on average "
        "over the layers."
    )


class DistilledTechnique(LearnedTechnique):
    """Base of the techniques whose attention may learn the outputs of the dense one on calibration data.

    A subclass has these fields; its docstring says what learns.

    Attributes:
        distill_steps: optimizer steps, one for each calibration batch; 0 for none, which needs no data.
        distill_rate: highest learning rate of these steps.
        distill_trains: which weights learn in them.
    """

    distill_steps: int
    distill_rate: float
    distill_trains: Trains

    def needs_data(self) -> bool:
        return self.distill_steps > 0

    def needs_whole_model(self) -> bool:
        return self.distill_steps > 0

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        if self.distill_steps:
            yield from distill(run, self, self.distill_steps, self.distill_rate, self.distill_trains)


class FeatureTechnique(DistilledTechnique):
    """Base of the techniques that sum keys and values by features: weights are not formed, and none are dropped."""

    def initialize(self, run: Run, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        warn_of_dropout(run, self, model.config)
