"""The last hidden states of a model, whatever its head makes of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LastStates:
    """Records what the body of a model gives its head, in the next forward and only while it is attached.

    Of an encoder-decoder these are the states of the encoder and of the decoder, else those of the one body, after its
    last norm. Every tensor is ``[batch, tokens, width]``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._found: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> LastStates:
        if not self._handles:
            self._handles = [
                body.register_forward_hook(self._hook(i)) for i, body in enumerate(bodies(self._model))
            ]  # fmt: skip
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()

    def take(self) -> list[Tensor]:
        """The states of the forward before, which are then forgotten; empty if there was none."""
        found = [self._found[i] for i in sorted(self._found)]
        self._found.clear()
        return found

    def _hook(self, index: int) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            states = getattr(output, "last_hidden_state", None)
            if states is None and isinstance(output, tuple) and isinstance(output[0], Tensor):
                states = output[0]
            if isinstance(states, Tensor) and states.dim() == 3:
                self._found[index] = states

        return record


def bodies(model: Any) -> list[nn.Module]:
    """The modules whose output the head reads: encoder and decoder, or the model without its head."""
    if model.config.is_encoder_decoder:
        return [model.get_encoder(), model.get_decoder()]
    return [model.base_model]
