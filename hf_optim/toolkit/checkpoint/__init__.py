"""Headers of safetensors files, models on the meta device, and tensors that travel with a checkpoint."""

from .named_tensors import NamedTensors

__all__ = ["NamedTensors"]
