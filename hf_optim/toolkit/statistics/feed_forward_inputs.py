"""A sample of the inputs of feed-forward layers, over one pass of the calibration data."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from torch import Tensor, nn

from ...errors import ModelError
from ..topology import FeedForward, not_reached
from .row_sample import RowSample


def sample_feed_forwards(
    model: nn.Module, layers: Sequence[FeedForward], label: str, tokens: int
) -> Generator[None, None, tuple[dict[str, Tensor], list[FeedForward], dict[str, list[str]]]]:
    """Sample the inputs of feed-forward layers: ``samples, layers, unreached = yield from sample_feed_forwards(...)``.

    Args:
        model: the model.
        layers: its feed-forward layers.
        label: the step, in messages.
        tokens: rows of each sample, at most.

    Returns:
        The inputs ``[n, in_features]`` by the name of a layer's last linear layer, the layers that tokens reached, and
        the names of the others, by reason.

    Raises ``ModelError`` if tokens reached no layer.
    """
    inputs = {layer.down: layer.producers[0] for layer in layers}
    with RowSample({name: model.get_submodule(name) for name in inputs.values()}, label, tokens) as found:
        yield
    reached = [layer for layer in layers if inputs[layer.down] in found]
    if not reached:
        raise ModelError(f"{label}: no calibration token reached a feed-forward layer; calibrate with other data")
    samples = {layer.down: found[inputs[layer.down]] for layer in reached}
    return samples, reached, not_reached(inputs, samples)
