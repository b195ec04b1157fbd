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
from torch.utils._pytree import tree_leaves

from ...errors import ModelError
from .plan import OffloadPlan
from .streamer import Streamer
from .tensors import point_at

STATE = "_hf_optim_offload"
RESTORE = "call hf_optim.restore(model) first"


class Absent(Tensor):
    """Stands for a weight of a streamed block while the block does not compute.

    It has shape, dtype and device of the weight, and no values: whatever reads or writes them raises ``ModelError``.
    """

    offloaded: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(tensor: Tensor, name: str, is_parameter: bool) -> Absent:
        """Return what stands for a tensor with this name."""
        made: Absent = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            Absent, tensor.shape, strides=tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        made.offloaded = name
        made._is_param = is_parameter  # type: ignore[attr-defined]
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.offloaded}: {list(self.shape)} of {self.dtype}, offloaded"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        given = tree_leaves((args, kwargs))
        name = next(each.offloaded for each in given if isinstance(each, Absent))
        raise ModelError(
            f"{name} is offloaded, and has values only while its block computes: read it from model.state_dict(); to "
            f"change it, or to run a part of the block, {RESTORE}"
        )


class BlockState:
    """What a streamed block needs: its place in the ring, the class it had, and how its tensors were left."""

    def __init__(self, streamer: Streamer, index: int, name: str, block: nn.Module) -> None:
        self.streamer, self.index, self.name, self.former = streamer, index, name, type(block)
        self.at_store = False
        self._inside = 0
        self._left: list[tuple[str, Any, str, Tensor, int, int, Absent]] = []

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
                    absent = Absent.of(tensor, unit.name, place.is_parameter)
                    state = _version_of(tensor), tensor.data_ptr()
                    self._left.append((unit.name, held, place.key, tensor, *state, absent))

    def withdraw(self) -> None:
        """Put what has no values in the place of the tensors of the block, until it computes."""
        for _, held, key, tensor, _, _, absent in self._left:
            if held.get(key) is tensor:
                held[key] = absent

    def present(self) -> None:
        """Put the tensors of the block in their places."""
        for _, held, key, tensor, _, _, absent in self._left:
            if held.get(key) is absent:
                held[key] = tensor

    def written(self) -> str:
        """Return the name of a tensor of the block that was written to or replaced since; empty if there is none.

        A fetch leaves the versions of tensors as they are.
        """
        for name, held, key, tensor, version, address, absent in self._left:
            found = held.get(key)
            if found is not tensor and found is not absent:
                return name
            if _version_of(tensor) != version or tensor.data_ptr() != address:
                return name
        return ""

    def require_unwritten(self) -> None:
        """Raise ``ModelError`` for a block whose weights were written to: the next fetch, or a save, would undo it."""
        name = self.written()
        if name:
            raise ModelError(
                f"{name} is offloaded and was written to or replaced, which the next fetch undoes: {RESTORE}, change "
                "the weights, and offload the model again"
            )

    def to_store(self) -> None:
        """Point the tensors of the block at its stored bytes, on the CPU, each in a storage of its own."""
        self.present()
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
        self._inside += 1
        self.present()

    @torch.compiler.disable
    def leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self.withdraw()
        self.streamer.leave(self.index)


class ModelState:
    """What an offloaded model needs: its plan, and how to undo it."""

    def __init__(
        self, plan: OffloadPlan, streamer: Streamer | None, former: type[nn.Module], trained: set[str]
    ) -> None:
        self.plan, self.streamer, self.former, self.trained = plan, streamer, former, trained


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


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
            sample = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
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
            if state is None:
                return former.forward(self, *args, **kwargs)
            if _is_traced(values):
                state.present()
                try:
                    return former.forward(self, *args, **kwargs)
                finally:
                    state.withdraw()
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
            state.withdraw()
            state.at_store = False
