"""Hidden states of a model, recorded while it runs: of its bodies or of every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..topology.block_lists import blocks


class HiddenStates:
    """Records what ``modules`` give, in the next forward and only while it is attached.

    Every tensor is ``[batch, tokens, width]``. A forward that gradient checkpointing repeats in the backward is not
    recorded again.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._found: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> HiddenStates:
        if not self._handles:
            self._handles = [each.register_forward_hook(self._hook(i)) for i, each in enumerate(self._modules)]
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
            if states is None:
                states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, Tensor) and states.dim() == 3 and not _in_backward():
                self._found[index] = states

        return record


class HiddenStatesCallback(TrainerCallback):
    """Records the states of ``modules()`` in every training step, and only then: ``own.states`` holds the recorder.

    ``own`` is the state of a step of a run.
    """

    def __init__(self, own: Any, modules: Callable[[], Sequence[nn.Module]]) -> None:
        self._own, self._modules = own, modules

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        remove_recorder(self._own)  # of a step that failed
        self._own.states = HiddenStates(self._modules()).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        remove_recorder(self._own)


def take_hidden_states(own: Any) -> list[Tensor]:
    """What the recorder of ``HiddenStatesCallback`` found in the forward before; empty outside a training step."""
    recorder: HiddenStates | None = getattr(own, "states", None)
    return [] if recorder is None else recorder.take()


def remove_recorder(own: Any) -> None:
    """Take the recorder of ``HiddenStatesCallback`` off the model, if there is one."""
    recorder = vars(own).pop("states", None)
    if recorder is not None:
        recorder.__exit__()


def base_models(model: Any) -> list[nn.Module]:
    """The modules whose output the head reads, after the last norm: encoder and decoder, or the one body."""
    if model.config.is_encoder_decoder:
        return [model.get_encoder(), model.get_decoder()]
    return [model.base_model]


def base_model_of_blocks(model: Any) -> list[int]:
    """For every block of ``blocks(model)`` the index in ``base_models(model)`` of the one that it lies in."""
    inside = [set(map(id, body.modules())) for body in base_models(model)]
    return [next(i for i, held in enumerate(inside) if id(block.module) in held) for block in blocks(model)]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
