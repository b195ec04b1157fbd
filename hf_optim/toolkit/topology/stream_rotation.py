"""Rotations of the residual stream: the parameters that take one, and where the gain of each norm moves to.

With an orthogonal matrix Q, ``x -> x Q`` leaves a transformer's function unchanged if every tensor that reads or writes
the stream follows, and if the norms commute with it. RMSNorm without a gain does: ``|x Q| = |x|``. LayerNorm without a
gain does for a Q that keeps the mean, ``Q 1 = 1``. So the gain of each norm is first multiplied into the weights that
read it: linear layers, routers and experts. That is possible if nothing else reads the norm; it is not if the norm's
output is the residual stream (post-norm) or is added to it (a norm behind the attention).

What commutes with a rotation is found on a trace, by re-executing the operations on reflected random numbers
(``channel_search``), and what takes the gains likewise, on scaled ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import ModelError
from .block_lists import blocks
from .channel_search import ChannelSearch, reflection, scaling
from .fake_model import copy_with_tensors
from .graph import Call, Trace
from .norm_groups import is_norm, norm_offset
from .reexecution import random_tensor
from .tracing import trace

PRECISION = 1e-4
"""Relative tolerance for a norm that computes in float32."""


@dataclass(frozen=True, eq=False)
class RotatedNorm:
    """A norm of a stream, ``(weight + offset) n(x) + bias``, and the weights that take its gain.

    Attributes:
        name: of the norm.
        offset: of its gain; None for a norm without parameters.
        readers: name -> dimension of each parameter that is multiplied by the gain.
        linears: the linear layers among the readers.
    """

    name: str
    offset: float | None
    readers: dict[str, int]
    linears: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class StreamRotation:
    """A residual stream that can be rotated.

    Attributes:
        width: number of channels.
        blocks: name of the list of blocks through which it runs first.
        parameters: name (one of them, if tied) -> the dimensions along which the parameter is rotated.
        norms: the norms that read it.
        readers, writers: names of the linear layers.
        keeps_mean: True if the rotation must keep the mean of the channels, for LayerNorm.
    """

    width: int
    blocks: str
    parameters: dict[str, tuple[int, ...]]
    norms: tuple[RotatedNorm, ...]
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    keeps_mean: bool


def find_stream_rotations(source: PreTrainedModel | Trace) -> tuple[list[StreamRotation], dict[str, str]]:
    """Return the residual streams of a model that can be rotated, and why others cannot: list of blocks -> reason.

    Tied embeddings must have been untied before: a weight that is read behind a norm and elsewhere takes no gain.
    """
    traced = source if isinstance(source, Trace) else trace(source)
    norms = dict(_norms(traced))
    calls = tuple(call for call in traced.calls if call.name in norms)
    found: list[StreamRotation] = []
    refused: dict[str, str] = {}
    seen: set[int] = set()
    for block in blocks(traced):
        reads = traced.calls_of(block.name)[0].reads
        start = next((value for value in reads if traced.dtypes[value].is_floating_point), None)
        if start is None or start in seen or block.list_name in refused or block.index:
            continue
        width = traced.shapes[start][-1]
        keeps_mean = any(norms[call.name] for call in calls if width == traced.shapes[call.reads[0]][-1])
        search = ChannelSearch(traced, width, reflection(width, keeps_mean), calls)
        try:
            search.follow(start)
            if search.carried & traced.outputs:
                raise ModelError("the model returns its residual stream")
            taken = tuple(_readers_of(traced, calls, name, width) for name in search.norm_calls)
        except ModelError as error:
            refused[block.list_name] = str(error)
            continue
        seen |= search.carried
        found.append(
            StreamRotation(
                width=width,
                blocks=block.list_name,
                parameters={name: tuple(sorted(dims)) for name, dims in search.parameters.items()},
                norms=taken,
                readers=tuple(search.readers),
                writers=tuple(search.writers),
                keeps_mean=any(norms[name] for name in search.norm_calls),
            )
        )
    return found, refused


def _readers_of(traced: Trace, calls: tuple[Call, ...], name: str, width: int) -> RotatedNorm:
    """Return the norm ``name`` with the weights that take its gain. Raises ``ModelError`` if others see the gain."""
    if not any(True for _ in traced.modules[name].parameters()):
        return RotatedNorm(name, None, {}, ())
    search = ChannelSearch(traced, width, scaling(width), calls)
    try:
        for call in traced.calls_of(name):
            search.follow(call.writes[0])
        if search.carried & traced.outputs:
            raise ModelError("the model returns its output")
        growing = [parameter for parameter, dims in search.parameters.items() if any(dim >= 0 for dim in dims)]
        if growing or search.writers:
            raise ModelError(f"{next(iter((*search.writers, *growing)))} also writes what reads it")
        several = [parameter for parameter, dims in search.parameters.items() if len(dims) > 1]
        if several:
            raise ModelError(f"{several[0]} reads it along two dimensions")
        for op in traced.ops:
            maker = search.in_norm.get(op.position)
            if maker is not None and maker.name != name and search.carried.intersection(op.produces):
                raise ModelError(f"another norm ({maker.name}) makes what is added to it")
    except ModelError as error:
        raise ModelError(f"the gain of {name} cannot move into the weights behind it: {error}") from error
    offset = norm_offset(traced, name)
    assert offset is not None
    readers = {parameter: ~next(iter(dims)) for parameter, dims in search.parameters.items()}
    return RotatedNorm(name, offset, readers, tuple(search.readers))


def _norms(traced: Trace) -> Iterator[tuple[str, bool]]:
    """Yield the norms over the last dimension that a rotation can pass, and whether they subtract the mean."""
    cache: dict[object, bool | None] = {}
    for name in dict.fromkeys(call.name for call in traced.calls):
        module = traced.modules[name]
        plain = not any(True for _ in module.parameters()) and not any(True for _ in module.children())
        if not (is_norm(traced, name) and norm_offset(traced, name) is not None) and not (
            plain and "Norm" in type(module).__name__ and _keeps_shape(traced, name)
        ):
            continue
        width = traced.shapes[traced.calls_of(name)[0].reads[0]][-1]
        settings = tuple((k, v) for k, v in vars(module).items() if isinstance(v, (int, float, str)))
        key = (type(module), width, settings)
        if key not in cache:
            offset = 0.0 if plain else norm_offset(traced, name)
            cache[key] = _subtracts_mean(module, width, 1.0 - (offset or 0.0))
        subtracts = cache[key]
        if subtracts is not None:
            yield name, subtracts


def _keeps_shape(traced: Trace, name: str) -> bool:
    return all(
        len(call.reads) == len(call.writes) == 1 and traced.shapes[call.reads[0]] == traced.shapes[call.writes[0]]
        for call in traced.calls_of(name)
    )


@torch.no_grad()
def _subtracts_mean(module: nn.Module, width: int, gain: float) -> bool | None:
    """Return whether a norm commutes with mean-keeping reflections only; None if it does not commute with them."""
    copied = copy_with_tensors(module, lambda tensor: torch.ones(tensor.shape, dtype=torch.float64))
    for name, parameter in copied.named_parameters():
        parameter.fill_(gain if name == "weight" else 0.0)
    x = random_tensor((1, 8, width), seed=3) + torch.linspace(-1, 1, width, dtype=torch.float64)
    for keeps_mean in (False, True):
        motion = reflection(width, keeps_mean)
        try:
            before, after = copied(x).double(), copied(motion.moved(x, 2)).double()
        except Exception:  # it needs other inputs than [batch, tokens, channels]
            return None
        if float((after - motion.moved(before, 2)).abs().max()) <= PRECISION * float(before.abs().max()):
            return keeps_mean
    return None
