"""Headers of safetensors files, model configurations, and tensors that are saved with a checkpoint."""

from .named_tensors import NamedTensors

__all__ = ["NamedTensors"]
