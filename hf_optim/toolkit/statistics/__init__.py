"""Statistics of activations, gradients and Hessians, gathered through hooks."""

from . import importance
from .curvature import (
    SeenBatches,
    gradients,
    hessian_product,
    own_loss,
    power_iteration,
    probing,
    random_direction,
    shards,
)
from .expert_tokens import TokenSample, top_up
from .observers import ChannelAbsMax, HessianDiagonal, Moment, SecondMoment, TensorMinMax
from .sensitivity import OutputShift, cheapest_within

__all__ = [
    "ChannelAbsMax",
    "HessianDiagonal",
    "Moment",
    "OutputShift",
    "SecondMoment",
    "SeenBatches",
    "TensorMinMax",
    "TokenSample",
    "cheapest_within",
    "gradients",
    "hessian_product",
    "importance",
    "own_loss",
    "power_iteration",
    "probing",
    "random_direction",
    "shards",
    "top_up",
]
