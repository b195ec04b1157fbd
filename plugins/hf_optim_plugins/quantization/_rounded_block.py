"""A block whose weights are computed from learned roundings, without a change of the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_optim.toolkit.quantization import LearnedRounding


class RoundedBlock:
    """Computes a block with the quantized weights of ``roundings`` in place of its own.

    Called with ``weights()``, and then like the block. Hooks of its modules are called, too. Experts are matrices of a
    stacked parameter, which is put together from theirs.

    Attributes:
        block: the module.
        parts: name of a parameter in ``block`` -> its roundings, and the function that makes the parameter of them.
    """

    def __init__(self, block: nn.Module, prefix: str, layers: Mapping[str, Any], roundings: Mapping[str, Any]) -> None:
        """Take the layers of a block.

        Args:
            block: the module.
            prefix: its qualified name in the model.
            layers: linear layers and matrices of experts, by qualified name in the model.
            roundings: a ``LearnedRounding`` for each of them.
        """
        self.block = block
        self.parts: dict[str, tuple[list[LearnedRounding], Callable[[list[Tensor]], Tensor]]] = {}
        within = len(prefix) + 1 if prefix else 0
        stacked: dict[str, dict[int, LearnedRounding]] = {}
        transposed: dict[str, bool] = {}
        for name, layer in layers.items():
            if isinstance(layer, nn.Linear):
                self.parts[f"{name[within:]}.weight"] = ([roundings[name]], lambda made: made[0])
            else:
                parameter = layer.parameter_name[within:]
                stacked.setdefault(parameter, {})[layer.index] = roundings[name]
                transposed[parameter] = layer.transposed
        for parameter, found in stacked.items():
            self.parts[parameter] = ([found[index] for index in sorted(found)], _stacker(transposed[parameter]))

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weights by their names in the block, with the gradients of the roundings."""
        return {name: make([each.fake_weight() for each in of]) for name, (of, make) in self.parts.items()}

    def __call__(self, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.block, dict(weights), args, kwargs)


def _stacker(transposed: bool) -> Callable[[list[Tensor]], Tensor]:
    def stack(weights: list[Tensor]) -> Tensor:
        return torch.stack([weight.T for weight in weights] if transposed else weights)

    return stack


@contextmanager
def rounded_inputs(layers: Mapping[str, Any], round_input: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Round the inputs of linear layers for the length of a ``with`` block; None leaves them. Experts' are not."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_input(args[0]), *args[1:])  # type: ignore[misc]

    with ExitStack() as stack:
        for layer in layers.values() if round_input is not None else ():
            if isinstance(layer, nn.Linear):
                stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield
