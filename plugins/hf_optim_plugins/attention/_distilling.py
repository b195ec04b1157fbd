"""Calibration of converted attention: it learns the outputs of the dense attention, and the record says how well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from hf_optim.toolkit.distillation import AttentionDistillation

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from hf_optim import Run, Technique

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
