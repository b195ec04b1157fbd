"""Convert a quantized model to an ordinary dense one."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..compressed.codec import scheme_on
from ..compressed.experts import expert_schemes
from ..compressed.outlier_columns import remove_outlier_thresholds
from ..compressed.quantizer import detach_quantizer, model_configs
from ..compressed.state import clear, quantized_modules


def convert_to_dense(model: nn.Module) -> list[str]:
    """Convert a quantized model to an ordinary one, in place: dequantized weights, stock forward, no kernels.

    Weights decode to the same values. Quantization of *activations* has no dense equivalent and is dropped.

    A module of remote code has a method ``to_dense() -> (module, exact)`` if it holds codes or computes something else
    than a stock one: it returns the stock module that replaces it, and whether that module computes the same.

    Returns the names of modules whose outputs change: activation quantization was dropped, or ``exact`` was False.
    """
    from ..compressed.packed.accelerate import restore
    from ..toolkit.modules.replace import replace_module
    from .remote_code import revert

    restore(model)
    changed = []
    for name, module in list(model.named_modules()):
        if hasattr(module, "to_dense"):
            dense, exact = module.to_dense()  # type: ignore[operator]
            replace_module(model, name, dense)
            changed += [] if exact else [name]
    if isinstance(model, PreTrainedModel):
        revert(model)
    for name, module in quantized_modules(model).items():
        if scheme_on(module).input_activations is not None:
            changed.append(name)
        weights = [*expert_schemes(module)] or ["weight"]
        clear(module)
        for weight in weights:
            module.get_parameter(weight).requires_grad_(True)
    detach_quantizer(model)
    for config in model_configs(model):
        remove_outlier_thresholds(config)
    return changed
