"""Recording of hidden states while a model runs: the outputs of its base models, or of every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..topology.block_lists import blocks


class Recorder:
    """Context manager that records the outputs of ``modules`` in every forward.

    Each tensor is ``[batch, tokens, width]``. A forward that gradient checkpointing repeats in the backward is not
    recorded again.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._found: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        if not self._handles:
            self._handles = [each.register_forward_hook(self._hook(i)) for i, each in enumerate(self._modules)]
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._found.clear()

    def take(self) -> list[Tensor]:
        """Return the states of the last forward, and clear them; empty if there was none."""
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


class RecorderCallback(TrainerCallback):
    """Callback that records the states of ``modules()`` in training steps only.

    The recorder is the attribute ``states`` of ``step_state``, the state of a step of a run.
    """

    def __init__(self, step_state: Any, modules: Callable[[], Sequence[nn.Module]]) -> None:
        self._step_state, self._modules = step_state, modules

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        remove_recorder(self._step_state)  # left by a step that failed
        self._step_state.states = Recorder(self._modules()).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        remove_recorder(self._step_state)


def take_recorded(step_state: Any) -> list[Tensor]:
    """Return what ``RecorderCallback`` recorded in the last forward; empty outside a training step."""
    recorder: Recorder | None = getattr(step_state, "states", None)
    return [] if recorder is None else recorder.take()


def remove_recorder(step_state: Any) -> None:
    """Remove the recorder of ``RecorderCallback`` from the model, if there is one."""
    recorder = vars(step_state).pop("states", None)
    if recorder is not None:
        recorder.__exit__()


def base_models(model: Any) -> list[nn.Module]:
    """Return the modules whose output the head reads, after the last norm: encoder and decoder, or the base model."""
    if model.config.is_encoder_decoder:
        return [model.get_encoder(), model.get_decoder()]
    return [model.base_model]


def base_model_of_blocks(model: Any) -> list[int]:
    """Return the index in ``base_models(model)`` of the base model of each block of ``blocks(model)``."""
    members = [set(map(id, base.modules())) for base in base_models(model)]
    return [next(i for i, ids in enumerate(members) if id(block.module) in ids) for block in blocks(model)]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
