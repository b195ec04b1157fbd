"""Statistics of activations, gradients and Hessians, gathered through hooks."""

from . import importance
from .curvature import (
    RecordedBatches,
    calibration_loss,
    enable_double_backward,
    gradients,
    hessian_product,
    power_iteration,
    random_direction,
    sample_microbatches,
)
from .expert_tokens import TokenSample, augment_undersampled
from .observers import ChannelAbsMax, GramMatrix, HessianDiagonal, SecondMoment, TensorMinMax
from .sensitivity import OutputShift, select_within_budget

__all__ = [
    "ChannelAbsMax",
    "GramMatrix",
    "HessianDiagonal",
    "OutputShift",
    "RecordedBatches",
    "SecondMoment",
    "TensorMinMax",
    "TokenSample",
    "augment_undersampled",
    "calibration_loss",
    "enable_double_backward",
    "gradients",
    "hessian_product",
    "importance",
    "power_iteration",
    "random_direction",
    "sample_microbatches",
    "select_within_budget",
]
