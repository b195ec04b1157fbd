"""Turn a quantized model into an ordinary dense one."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..compressed.codec import scheme_on
from ..compressed.experts import expert_schemes
from ..compressed.outlier_columns import forget_outliers
from ..compressed.quantizer import _configs, detach_quantizer
from ..compressed.state import clear, quantized_modules


def convert_to_dense(model: nn.Module) -> list[str]:
    """Turn a quantized model into an ordinary one, in place, with the dequantized weights and the stock forward.

    A module of remote code that ``holds_codes`` gives ``to_dense() -> (module, exact)``: the stock module in its place,
    and whether that computes the same. Weights decode to the same values. Quantization of *activations* has no dense
    equivalent and is gone: the names of the modules that had it are returned, and their outputs change. Kernels are
    taken off.
    """
    from ..compressed.packed.accelerate import restore
    from ..toolkit.modules.replace import replace_module
    from .remote_code import revert

    restore(model)
    lost = []
    for name, module in list(model.named_modules()):
        if getattr(module, "holds_codes", False):
            own, exact = module.to_dense()  # type: ignore[operator]
            replace_module(model, name, own)
            lost += [] if exact else [name]
    if isinstance(model, PreTrainedModel):
        revert(model)
    for name, module in quantized_modules(model).items():
        if scheme_on(module).input_activations is not None:
            lost.append(name)
        weights = [*expert_schemes(module)] or ["weight"]
        clear(module)
        for weight in weights:
            module.get_parameter(weight).requires_grad_(True)
    detach_quantizer(model)
    for config in _configs(model):
        forget_outliers(config)
    return lost
