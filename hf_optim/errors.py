"""The errors of hf_optim. Each message names what is wrong, where, and what to do."""

from __future__ import annotations


class OptimError(Exception):
    """Base of all errors that hf_optim raises deliberately."""


class RecipeError(OptimError, ValueError):
    """A recipe cannot be read, has a wrong field, or has steps that do not compose."""


class DataError(OptimError, ValueError):
    """Calibration, training or evaluation data is missing, unreadable or unsuitable."""


class ModelError(OptimError, ValueError):
    """A step does not support the model."""


class NumericalError(OptimError, ArithmeticError):
    """An activation is not finite or a matrix is singular; the message names the module and the step."""


class CheckpointError(OptimError, OSError):
    """A checkpoint cannot be read or written."""
