"""The classes of an offloaded model: those of the model and of its blocks, with a forward that waits for the weights.

Classes are changed in place and keep their names, so modules, hooks on them and references to them stay. Nothing refers
to the model: a deleted model is freed at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import ModelError
from .plan import OffloadPlan
from .streamer import Streamer
from .tensors import point_at

STATE = "_hf_optim_offload"
RESTORE = "call hf_optim.restore(model) first"


class BlockState:
    """What a streamed block needs: its place in the ring, the class it had, and how its tensors were left."""

    def __init__(self, streamer: Streamer, index: int, name: str, block: nn.Module) -> None:
        self.streamer, self.index, self.name, self.former = streamer, index, name, type(block)
        self.at_store = False
        self._left: list[tuple[str, Any, str, Tensor, int, int]] = []
        self._merged = [
            (f"{name}.{path}", module, _merged_of(module))
            for path, module in block.named_modules()
            if _merged_of(module) is not None
        ]

    def to_slot(self) -> None:
        """Point the tensors of the block at its slot in the ring."""
        units = self.streamer.stored[self.index].units
        point_at(units, self.streamer.memory_of(self.index))
        self._left = []
        for unit in units:
            for place in unit.places:
                held = place.held
                if held is not None and place.key in held:
                    tensor = held[place.key]
                    self._left.append((unit.name, held, place.key, tensor, _version_of(tensor), tensor.data_ptr()))

    def written(self) -> str:
        """Return the name of a tensor of the block that was written to or replaced since; empty if there is none.

        A fetch leaves the versions of tensors as they are. What is written through ``.data`` is seen only where
        adapters say that they are merged.
        """
        for name, held, key, tensor, version, address in self._left:
            if held.get(key) is not tensor or _version_of(tensor) != version or tensor.data_ptr() != address:
                return name
        return next((name for name, module, merged in self._merged if _merged_of(module) != merged), "")

    def forget_writes(self) -> None:
        """Have the adapters say again what is merged into the stored weights."""
        for _, module, merged in self._merged:
            module.merged_adapters[:] = merged or ()

    def require_unwritten(self) -> None:
        """Raise ``ModelError`` for a block whose weights were written to: the next fetch, or a save, would undo it."""
        name = self.written()
        if name:
            raise ModelError(
                f"{name} is offloaded and was written to or replaced, or an adapter was merged into it, which the next "
                f"fetch undoes: {RESTORE}, change the weights, and offload the model again"
            )

    def to_store(self) -> None:
        """Point the tensors of the block at its stored bytes, on the CPU, each in a storage of its own."""
        stored = self.streamer.stored[self.index]
        for unit in stored.units:
            point_at([replace(unit, begin=0)], stored.unit_memory(unit))

    @torch.compiler.disable
    def enter(self, block: nn.Module, values: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and any(_needs_gradient(block, values)):
            raise ModelError(
                f"{self.name} is offloaded, and its weights are overwritten before a backward pass could read them: "
                f"{RESTORE} to train the model, or run it under torch.no_grad()"
            )
        self.require_unwritten()
        self.streamer.enter(self.index)

    @torch.compiler.disable
    def leave(self) -> None:
        self.streamer.leave(self.index)


class ModelState:
    """What an offloaded model needs: its plan, and how to undo it."""

    def __init__(
        self, plan: OffloadPlan, streamer: Streamer | None, former: type[nn.Module], trained: set[str]
    ) -> None:
        self.plan, self.streamer, self.former, self.trained = plan, streamer, former, trained


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _merged_of(module: nn.Module) -> tuple[str, ...] | None:
    """Return the adapters that are merged into a layer of peft; None for another module."""
    merged = vars(module).get("merged_adapters")
    return tuple(merged) if isinstance(merged, list) else None


def _needs_gradient(block: nn.Module, values: tuple[Any, ...]) -> Iterator[bool]:
    yield from (isinstance(value, Tensor) and value.requires_grad for value in values)
    yield from (parameter.requires_grad for parameter in block.parameters())


def _is_traced(values: tuple[Any, ...]) -> bool:
    return any(isinstance(value, FakeTensor) or (isinstance(value, Tensor) and value.is_meta) for value in values)


def _refuse(doing: str) -> Callable[..., Any]:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise ModelError(f"this {type(self).__name__} is offloaded and cannot be {doing}: {RESTORE}")

    return refuse


class _Offloaded(nn.Module):
    """What the model and its blocks refuse while they are offloaded."""

    __deepcopy__ = _refuse("copied")
    __reduce_ex__ = _refuse("pickled")
    _load_from_state_dict = _refuse("given other weights")

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise ModelError(
                f"this {type(self).__name__} is offloaded, so that its weights are not there in a backward pass and it "
                f"cannot be trained: {RESTORE}"
            )
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for tensor in self.parameters():
            sample = tensor.detach().reshape(-1)[:0]
            moved = fn(sample)
            if moved.device != sample.device or moved.dtype != sample.dtype:
                raise ModelError(
                    f"this {type(self).__name__} is offloaded and cannot be moved or cast: {RESTORE}, or load it with "
                    "the dtype"
                )
        return self


@functools.cache
def block_class(former: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a streamed block, in place of ``former``."""

    class Streamed(_Offloaded, former):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            state: BlockState | None = self.__dict__.get(STATE)
            values = (*args, *kwargs.values())
            if state is None or _is_traced(values):
                return former.forward(self, *args, **kwargs)
            state.enter(self, values)
            try:
                return former.forward(self, *args, **kwargs)
            finally:
                state.leave()

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            with _at_store([self]):
                return former.state_dict(self, *args, **kwargs)

    return _named_like(Streamed, former)


@functools.cache
def model_class(former: type[nn.Module]) -> type[nn.Module]:
    """Return the class of an offloaded model, in place of ``former``."""

    class Offloaded(_Offloaded, former):  # type: ignore[misc, valid-type]
        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            with stored_weights(self):
                return former.save_pretrained(self, *args, **kwargs)  # type: ignore[attr-defined]

    return _named_like(Offloaded, former)


def _named_like(made: type[nn.Module], former: type[nn.Module]) -> type[nn.Module]:
    made.__name__, made.__qualname__, made.__module__ = former.__name__, former.__qualname__, former.__module__
    made.__doc__ = former.__doc__
    if "forward" in vars(made):
        made.forward.__wrapped__ = former.forward  # type: ignore[attr-defined]  # the signature that others look at
    return made


def streamed_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model that are not on the device."""
    return [module for module in model.modules() if isinstance(module.__dict__.get(STATE), BlockState)]


def find_state(model: nn.Module) -> ModelState | None:
    """Return the state of an offloaded model, or of the one inside a wrapper (peft)."""
    for module in model.modules():
        state = module.__dict__.get(STATE)
        if isinstance(state, ModelState):
            return state
    return None


@contextmanager
def stored_weights(model: nn.Module) -> Iterator[None]:
    """Have the weights of streamed blocks on the CPU as they are stored, for what reads them outside of a forward.

    Those on disk are mapped. Nothing may run the model meanwhile.
    """
    with _at_store(streamed_blocks(model)):
        yield


@contextmanager
def _at_store(blocks: list[nn.Module]) -> Iterator[None]:
    states = [block.__dict__[STATE] for block in blocks]
    outer = [state for state in states if not state.at_store]
    for state in outer:
        state.require_unwritten()
    try:
        for state in outer:
            state.at_store = True
            state.to_store()
        yield
    finally:
        for state in outer:
            state.to_slot()
            state.at_store = False
