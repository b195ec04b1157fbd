"""Compression of the inputs of an attention: the tokens of a window made one, and the losses that train it.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FUNCTIONS = ("conv", "mean", "max")
LOSSES = ("attention", "autoencoding", "task")


class WindowConv1d(nn.Conv1d):
    """A convolution over windows that do not overlap, and that begins as their mean: ``[d, d, ratio]`` and a bias."""

    def __init__(self, width: int, ratio: int, **about: Any) -> None:
        super().__init__(width, width, ratio, stride=ratio, **about)

    def reset_parameters(self) -> None:
        """Make the output the mean of each window."""
        with torch.no_grad():
            eye = torch.eye(self.in_channels, dtype=self.weight.dtype, device=self.weight.device)
            self.weight.copy_((eye / self.kernel_size[0])[:, :, None].expand_as(self.weight))
            self.bias.zero_()  # type: ignore[union-attr]


class WindowDecoder(nn.ConvTranspose1d):
    """A convolution that gives the tokens of a window back, and that begins as copies of it."""

    def __init__(self, width: int, ratio: int, **about: Any) -> None:
        super().__init__(width, width, ratio, stride=ratio, **about)

    def reset_parameters(self) -> None:
        """Make each token of the output its window."""
        with torch.no_grad():
            eye = torch.eye(self.in_channels, dtype=self.weight.dtype, device=self.weight.device)
            self.weight.copy_(eye[:, :, None].expand_as(self.weight))
            self.bias.zero_()  # type: ignore[union-attr]


class Compression(nn.Module):
    """What one attention has to compress its inputs.

    Args:
        width: of the inputs.
        ratio: tokens of a window.
        function: ``conv``, ``mean`` or ``max``.
        loss: ``autoencoding`` has a decoder.
    """

    def __init__(self, width: int, ratio: int, function: str, loss: str, **about: Any) -> None:
        super().__init__()
        self.function = function
        self.conv = WindowConv1d(width, ratio, **about) if function == "conv" else None
        self.decoder = WindowDecoder(width, ratio, **about) if function == "conv" and loss == "autoencoding" else None
        self.loss: Tensor | None = None  # of the last forward in training

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss": None}  # tensors with a gradient are not copied

    def forward(self, windows: Tensor) -> Tensor:
        """Return ``[B, W, d]`` of ``[B, W, ratio, d]``."""
        if self.conv is None:
            return windows.mean(2) if self.function == "mean" else windows.amax(2)
        if not windows.shape[1]:
            return windows[:, :, 0]
        # Windows that do not overlap are rows of a matrix.
        matrix = self.conv.weight.transpose(1, 2).flatten(1)
        return functional.linear(windows.flatten(2).to(matrix.dtype), matrix, self.conv.bias).to(windows)

    def autoencoding(self, windows: Tensor, made: Tensor, real: Tensor | None) -> Tensor:
        """Return the mean square of what is lost of ``[B, W, ratio, d]`` in ``[B, W, d]``.

        ``real``, bool ``[B, W]``, says which windows there are; None: all.
        """
        decoder: Any = self.decoder
        back = decoder(made.transpose(1, 2).to(decoder.weight.dtype)).transpose(1, 2)
        lost = (back.unflatten(1, windows.shape[1:3]) - windows.to(back)).square().mean((2, 3))
        return lost.mean() if real is None else (lost * real).sum() / real.sum().clamp_min(1)


def reconstruction(
    query: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], sizes: tuple[int, int, int], scale: float,
    tokens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the attention-reconstruction loss of rows: the mean square of what queries read less of the compressed.

    For each segment, its queries attend to the tokens that leave the memory behind it, and to the windows that these
    become.

    Args:
        query: ``[B, H, N, D]``, without gradient as ``old``.
        old: keys and values of the tokens, ``[B, G, N, D]``.
        new: of the windows, ``[B, G, W, D]``; the gradient flows to them.
        sizes: tokens of a segment, of the memory, and of a window.
        scale: of the scores.
        tokens: int64 ``[B]``: tokens of each row; None if all have N.
    """
    size, memory, ratio = sizes
    count, total, number = query.shape[2], query.new_zeros(()), query.new_zeros(())
    for begin in range(0, count, size):
        end = min(begin + size, count)
        low, high = max(0, begin - memory), begin + size - memory
        if high <= low or end - begin < size:
            continue
        asked = query[:, :, begin:end]
        read = [
            functional.scaled_dot_product_attention(
                asked, key[:, :, first:last], value[:, :, first:last], scale=scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
            for (key, value), first, last in ((old, low, high), (new, low // ratio, high // ratio))
        ]  # fmt: skip
        lost = (read[0] - read[1]).square().mean((1, 2, 3))
        whole = None if tokens is None else (tokens >= end).to(lost)
        total = total + (lost.sum() if whole is None else (lost * whole).sum())
        number = number + (torch.ones_like(lost) if whole is None else whole).sum()
    return total / number.clamp_min(1)
