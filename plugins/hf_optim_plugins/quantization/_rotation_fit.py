"""Rotations that are learned: gradient steps on orthogonal matrices, with the quantizers of the model simulated.

The model's parameters are functions of the rotations (``torch.func``); weights are rounded to their grid and inputs per
token, with straight-through gradients. The loss is the distance of the outputs from those of the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_optim.toolkit.modules import eval_mode
from hf_optim.toolkit.permutation import orthogonal, rotating
from hf_optim.toolkit.quantization import fake_quant, make_grid
from hf_optim.toolkit.statistics import counted_positions
from hf_optim.toolkit.topology import ExpertLinear, StreamRotation, ValueHeads

from ._weights import weight_spec


@dataclass(frozen=True)
class Simulated:
    """What is simulated while rotations are learned.

    Attributes:
        layers: the linear layers and matrices of experts that will be quantized.
        bits, group_size, symmetric: of their weights; ``bits`` None leaves them as they are.
        activation_bits: of their inputs, per token; None leaves them as they are. Inputs of experts stay as they are.
    """

    layers: Mapping[str, Any]
    bits: int | None
    group_size: int | None
    symmetric: bool
    activation_bits: int | None


@dataclass(eq=False)
class RotationFit:
    """Learns the rotations of a model whose gains are folded; the model is not changed.

    Attributes:
        model: the model.
        streams, heads: what is rotated.
        simulated: the quantizers.
        stream_rotations: float64 ``[width, width]`` for each stream.
        head_rotations: float64 ``[heads, channels, channels]`` for each attention.
    """

    model: PreTrainedModel
    streams: Sequence[StreamRotation]
    heads: Sequence[ValueHeads]
    simulated: Simulated
    stream_rotations: list[Tensor]
    head_rotations: list[Tensor]
    losses: list[float] = field(default_factory=list)

    def learn(self, batches: Sequence[Mapping[str, Any]], steps: int, rate: float) -> None:
        """Take ``steps`` steps, a batch each, of lengths that fall from ``rate`` to 0; keep the best state.

        The loss over all batches is taken at the start and at five points; ``losses`` has them.
        """
        momenta = [torch.zeros_like(rotation) for rotation in self._all]
        keeps = [stream.keeps_mean for stream in self.streams] + [False] * len(self.heads)
        best = [rotation.clone() for rotation in self._all]
        self.losses = [self.mean_loss(batches)]
        every = max(1, -(-steps // 5))
        for step in range(steps):
            leaves = [rotation.clone().requires_grad_(True) for rotation in self._all]
            with torch.enable_grad():
                loss = self.loss(batches[step % len(batches)], leaves)
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            length = rate * (1 - step / steps)
            moved = [
                rotation if gradient is None else orthogonal.cayley_step(rotation, gradient, length, momentum, keep)
                for rotation, gradient, momentum, keep in zip(self._all, gradients, momenta, keeps, strict=True)
            ]
            self._set(moved)
            if (step + 1) % every == 0 or step + 1 == steps:
                self.losses.append(self.mean_loss(batches))
                if self.losses[-1] <= min(self.losses):
                    best = [rotation.clone() for rotation in self._all]
        self._set(best)

    @property
    def _all(self) -> list[Tensor]:
        return [*self.stream_rotations, *self.head_rotations]

    def _set(self, rotations: list[Tensor]) -> None:
        count = len(self.streams)
        self.stream_rotations, self.head_rotations = rotations[:count], rotations[count:]

    def mean_loss(self, batches: Sequence[Mapping[str, Any]]) -> float:
        """Return the mean loss over batches."""
        with torch.no_grad():
            return sum(float(self.loss(batch, self._all)) for batch in batches) / len(batches)

    def loss(self, batch: Mapping[str, Any], rotations: Sequence[Tensor]) -> Tensor:
        """Return the loss of one batch: ``KL(p || q)`` of logits, mean over positions; else a relative square error."""
        learns = torch.is_grad_enabled()
        with eval_mode(self.model):  # without gradients
            expected = _output(self.model(**batch))
            with torch.set_grad_enabled(learns), self._rounded_inputs():
                found = _output(torch.func.functional_call(self.model, self.parameters(rotations), (), dict(batch)))
        found, expected = found.float(), expected.float()
        kept = counted_positions(self.model, batch, expected)
        if expected.shape[-1] > 1 and getattr(self.model, "get_output_embeddings", lambda: None)() is not None:
            each = F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        else:
            each = (found - expected).square().sum(-1) / expected.square().mean().clamp_min(1e-12)
        return (each * kept).sum() / kept.sum().clamp_min(1)

    def parameters(self, rotations: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the parameters that rotations and rounding change, by name."""
        found: dict[str, Tensor] = {}

        def now(name: str) -> Tensor:
            return found[name] if name in found else self.model.get_parameter(name).detach()

        for stream, rotation in zip(self.streams, rotations, strict=False):
            for name, dims in stream.parameters.items():
                for dim in dims:
                    found[name] = rotating.rotated(now(name), dim, rotation)
            for norm in stream.norms:
                name = f"{norm.name}.bias"
                if getattr(self.model.get_submodule(norm.name), "bias", None) is not None:
                    found[name] = rotating.rotated(now(name), 0, rotation)
        for heads, rotation in zip(self.heads, rotations[len(self.streams) :], strict=True):
            for name, dim, index in rotating.value_moves(self.model, heads):
                found[name] = rotating.rotated_parts(now(name), dim, index, rotation)
        for name, dim in self._rounded_weights().items():
            found[name] = self._rounded(now(name), dim)
        return found

    def _rounded_weights(self) -> dict[str, int]:
        """Return the parameters to round: name -> the dimension of the inputs."""
        if self.simulated.bits is None:
            return {}
        dims: dict[str, int] = {}
        for name, layer in self.simulated.layers.items():
            if isinstance(layer, ExpertLinear):
                dims[layer.parameter_name] = 1 if layer.transposed else 2
            else:
                dims[f"{name}.weight"] = 0 if isinstance(layer, Conv1D) else 1
        return dims

    def _rounded(self, weight: Tensor, dim: int) -> Tensor:
        last = weight.movedim(dim, -1)
        rows = last.flatten(0, -2)
        spec = weight_spec(rows.shape[1], self.simulated.bits or 8, self.simulated.group_size, self.simulated.symmetric)
        grid = make_grid(rows.detach(), spec)
        return fake_quant.fake_quantize(rows, grid).unflatten(0, last.shape[:-1]).movedim(-1, dim)

    @contextmanager
    def _rounded_inputs(self) -> Iterator[None]:
        """Round the inputs of the layers for the length of a ``with`` block."""
        bits = self.simulated.activation_bits
        layers = [layer for layer in self.simulated.layers.values() if isinstance(layer, nn.Module)]
        hook: Callable[..., Any] = lambda module, args: (rounded_tokens(args[0], bits), *args[1:])  # noqa: E731
        handles = [layer.register_forward_pre_hook(hook) for layer in layers if bits is not None]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def rounded_tokens(x: Tensor, bits: int | None) -> Tensor:
    """Return ``x`` ``[..., channels]`` with each token rounded to a symmetric grid of its own, straight-through."""
    assert bits is not None
    half = (2**bits - 1) / 2
    scale = (x.detach().abs().amax(-1, keepdim=True) / half).clamp_min(torch.finfo(x.dtype).tiny)
    codes = (x.detach() / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return x + (codes * scale - x.detach())


def _output(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", None)
    return logits if logits is not None else outputs[0]
