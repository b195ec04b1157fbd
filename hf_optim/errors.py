"""The errors of hf_optim. Each message says what is wrong, where, and what to do."""

from __future__ import annotations


class OptimError(Exception):
    """Base of every error that hf_optim raises on purpose."""


class RecipeError(OptimError, ValueError):
    """A recipe that cannot be read, has a wrong field, or cannot compose."""


class DataError(OptimError, ValueError):
    """Calibration, training or evaluation data that cannot serve."""


class ModelError(OptimError, ValueError):
    """A model that a step cannot work on."""


class NumericalError(OptimError, ArithmeticError):
    """Non-finite activations or a singular matrix; the message names the module and the step."""


class CheckpointError(OptimError, OSError):
    """A checkpoint that cannot be read or written."""
