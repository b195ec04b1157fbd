"""Statistics of activations, gradients and Hessians, collected through hooks."""

from ..topology import valid_rows
from . import importance
from .calibration_losses import calibration_loss, counted_positions
from .curvature import enable_double_backward, gradients, hessian_product, power_iteration, random_direction
from .expert_tokens import (
    InputSquares,
    TokenSample,
    augment_undersampled,
    few_tokens_message,
    few_tokens_paragraph,
)
from .feed_forward_inputs import sample_feed_forwards
from .input_masks import real_tokens
from .observers import ChannelAbsMax, ChannelAbsMean, HessianDiagonal, TensorMinMax
from .recorded_batches import RecordedBatches, batch_size, can_split, sample_microbatches, take_rows
from .row_sample import RowSample
from .row_tracking import BatchRows
from .second_moment import GramMatrix, SecondMoment
from .sensitivity import OutputShift, select_within_budget

__all__ = [
    "BatchRows",
    "ChannelAbsMax",
    "ChannelAbsMean",
    "GramMatrix",
    "HessianDiagonal",
    "InputSquares",
    "OutputShift",
    "RecordedBatches",
    "RowSample",
    "SecondMoment",
    "TensorMinMax",
    "TokenSample",
    "augment_undersampled",
    "batch_size",
    "calibration_loss",
    "can_split",
    "counted_positions",
    "enable_double_backward",
    "few_tokens_message",
    "few_tokens_paragraph",
    "gradients",
    "hessian_product",
    "importance",
    "power_iteration",
    "random_direction",
    "real_tokens",
    "sample_feed_forwards",
    "sample_microbatches",
    "select_within_budget",
    "take_rows",
    "valid_rows",
]
