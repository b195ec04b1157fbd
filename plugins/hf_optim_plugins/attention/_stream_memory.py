"""A memory that a model holds from one forward to the next, for streams of segments.

``model(..., stream=pairs)`` asks for it: int64 ``[B, 2]``, for each row the number of its document and the place of the
row's first token in it. A row at place 0 begins with an empty memory; one at place p continues the row of the forward
before, which must have ended there. Without ``stream`` nothing is held and nothing is read: ``generate`` and ordinary
forwards do not see this memory. Training and evaluation have one each. ``forget_streams()`` drops both.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

STREAM = "stream"  # keyword of a model's forward
MEMORY = "hf_optim_stream_memory"  # keyword of the attention function
CORE = "_hf_optim_reads_streams"  # attribute of the part of a model that has the layers
ARRIVED = "hf_optim_stream_arrived"  # keyword from a model to the part of it that has the layers

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class StreamMemory:
    """What the layers hold between two forwards, and what they will hold after the present one.

    Attributes:
        there: bool ``[B, E]``: which of the E held tokens exist in a row; those next to its new tokens.
        index: int64 ``[B, W]``: which of the ``E + N`` tokens are held next.
        before, after: by layer, tensors whose second dimension from the end is that of tokens.
        readers: layers that have read the memory.
    """

    there: Tensor
    index: Tensor
    before: dict[int, tuple[Tensor, ...]]
    after: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    readers: set[int] = field(default_factory=set)

    def earlier(self, layer: int, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what a layer holds, E tokens; ``like`` are the new tensors, for a layer that holds nothing yet."""
        self.readers.add(layer)
        return self.before.get(layer) or tuple(part[..., :0, :].detach() for part in like)

    def keep(self, layer: int, held: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> None:
        """Hold the last tokens of what a layer held and of its new tensors, without their gradients.

        Called again for the same tokens, as in a forward that is recomputed, it does the same again.
        """
        kept = []
        for old, part in zip(held, new, strict=True):
            both = torch.cat([old, part.detach()], -2)
            index = self.index.view(len(self.index), *([1] * (both.dim() - 3)), -1, 1)
            kept.append(both.gather(-2, index.expand(*both.shape[:-2], -1, both.shape[-1])))
        self.after[layer] = tuple(kept)


@dataclass(eq=False)
class BetweenForwards:
    """The memory after a forward: of which rows, and which tokens of it exist (bool ``[B, E]``)."""

    documents: list[int]
    ends: list[int]
    there: Tensor
    layers: dict[int, tuple[Tensor, ...]]


def begin_stream(
    held: BetweenForwards | None,
    stream: Tensor,
    padding: Tensor | None,
    count: int,
    size: int,
    memory: int,
    device: Any,
) -> tuple[StreamMemory, BetweenForwards]:
    """Return the memory that a forward reads, and that after it, whose layers are filled by the attention.

    Args:
        held: the memory after the forward before; None for the first one.
        stream: int64 ``[B, 2]``, see above.
        padding: bool ``[B, N]``, True for tokens; None if all are. Rows are padded at the end.
        count: tokens of a row, N.
        size, memory: tokens of a segment and of the memory.
        device: of the model.

    Raises ``ValueError`` for rows that do not continue those before, or not at the border of a segment.
    """
    documents, places = stream.cpu().unbind(1)
    there = torch.zeros(len(stream), 0, dtype=torch.bool, device=device)
    if held is not None:
        there = held.there.to(device)
        _require_continued(held, documents.tolist(), places.tolist())
        there = there & (places > 0).to(device)[:, None]
    elif bool((places > 0).any()):
        logger.warning(
            "streams begin in the middle of documents, and their memory is not there: they begin with an empty one"
        )
    if bool((places % size != 0).any()) or bool((places < 0).any()):
        raise ValueError(f"rows of a stream begin at multiples of the segment, {size} tokens")
    valid = torch.ones(len(stream), count, dtype=torch.bool, device=device) if padding is None else padding
    if bool((valid[:, 1:] & ~valid[:, :-1]).any()):
        raise ValueError("rows of a stream are padded at the end only")
    both = torch.cat([there, valid], 1)
    width = min(memory, both.shape[1])
    index = both.to(torch.uint8).argsort(dim=1, stable=True)[:, both.shape[1] - width :]  # the last tokens that exist
    ends = (places.to(device) + valid.sum(1)).tolist()
    later = StreamMemory(there, index, {} if held is None else held.layers)
    return later, BetweenForwards(documents.tolist(), ends, both.gather(1, index), later.after)


def _require_continued(held: BetweenForwards, documents: list[int], places: list[int]) -> None:
    if len(documents) != len(held.documents):
        raise ValueError(f"the memory is of {len(held.documents)} streams, not of {len(documents)}")
    for row, (document, place) in enumerate(zip(documents, places, strict=True)):
        if place and (document, place) != (held.documents[row], held.ends[row]):
            raise ValueError(
                f"row {row} continues document {document} at token {place}, and the memory of this row ends at token "
                f"{held.ends[row]} of document {held.documents[row]}: batches must come in the order of their streams "
                "(no shuffling, a batch size that is the number of streams), or call forget_streams()"
            )


def require_stream(stream: Any, rows: int) -> None:
    """Raise ``ValueError`` unless ``stream`` is int64 ``[rows, 2]``."""
    if not isinstance(stream, Tensor) or stream.dtype != torch.int64 or stream.shape != (rows, 2):
        shape = f"{stream.dtype} {list(stream.shape)}" if isinstance(stream, Tensor) else type(stream).__name__
        raise ValueError(
            f"stream has two numbers for each row, its document and its first place in it: int64 [{rows}, 2], not "
            f"{shape}"
        )


def with_streams(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model's forward that takes ``stream``.

    The part of the model that has the layers prepares the call by ``prepare_body``; others pass it on.
    """
    stock = inspect.signature(forward)
    rest = next((p.name for p in stock.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)

    @functools.wraps(forward)
    def found(self: Any, *args: Any, stream: Tensor | None = None, **kwargs: Any) -> Any:
        if not self.__dict__.get(CORE):
            if stream is None:
                return forward(self, *args, **kwargs)
            arrived: list[bool] = []
            out = forward(self, *args, **{**kwargs, STREAM: stream, ARRIVED: arrived})
            _require_passed(bool(arrived), self)
            return out
        kwargs.pop(ARRIVED, []).append(True)
        given = dict(stock.bind_partial(self, *args, **kwargs).arguments)
        given.pop("self")
        given |= given.pop(rest, {}) if rest is not None else {}
        memory = self.prepare_body(given, stream)
        out = forward(self, **given)
        if memory is not None:
            used, after = memory
            _require_passed(len(used.readers) > 0, self)
            self.keep_stream(after)
        return out

    # Trainers read the names of columns here.
    own = inspect.Parameter(STREAM, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
    every = list(stock.parameters.values())
    at = next((i for i, each in enumerate(every) if each.kind is inspect.Parameter.VAR_KEYWORD), len(every))
    found.__signature__ = stock.replace(parameters=[*every[:at], own, *every[at:]])  # type: ignore[attr-defined]
    return found


def _require_passed(passed: bool, model: Any) -> None:
    if not passed:
        raise ValueError(f"{type(model).__name__} does not pass {STREAM} on to its attention")


def models_within(model: nn.Module) -> list[Any]:
    """Return the parts of a model that are models and have all of its attention, from the outermost to the core."""

    def attentions(module: nn.Module) -> int:
        return sum(hasattr(each, "is_causal") for each in module.modules())

    every = attentions(model)
    return [each for each in model.modules() if isinstance(each, PreTrainedModel) and attentions(each) == every]


class WithStreams:
    """Mixin of a class whose forward takes ``stream``."""

    takes_streams = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass of one whose forward takes streams, such as that of an offloaded model, inherits or calls it.
        if hasattr(cls, "forward") and not any(vars(base).get("takes_streams") for base in cls.__mro__[1:]):
            cls.forward = with_streams(cls.forward)
            cls.takes_streams = True

    def prepare_body(self, given: dict[str, Any], stream: Tensor | None) -> tuple[StreamMemory, BetweenForwards] | None:
        """Change the arguments of a body's forward, by name, in place, and return the memory of ``stream``."""
        raise NotImplementedError

    def start_stream(
        self, given: dict[str, Any], stream: Tensor, size: int, memory: int
    ) -> tuple[StreamMemory, BetweenForwards]:
        """Put the memory of the streams into the arguments of a forward, and return it; errors as of ``begin_stream``.

        Also refused are caches, masks of four dimensions and positions of the caller.
        """
        ids = given.get("input_ids")
        like: Tensor = given["inputs_embeds"][..., 0] if ids is None else ids
        require_stream(stream, len(like))
        padding = given.get("attention_mask")
        for what, bad in (
            ("an attention_mask of other dimensions than [batch, length]", padding is not None and padding.dim() != 2),
            ("a cache", any(given.get(name) is not None for name in ("cache", "past_key_values"))),
            ("use_cache=True", given.get("use_cache") is True),
            ("position_ids", given.get("position_ids") is not None),
        ):
            if bad:
                raise ValueError(f"stream does not go with {what}: a stream says where its rows are, and is its memory")
        valid = None if padding is None else padding.to(like.device).bool()
        held = self.__dict__.get("_streams", {}).get(self.training)  # type: ignore[attr-defined]
        found = begin_stream(held, stream, valid, like.shape[1], size, memory, like.device)
        places = stream[:, 1:].to(like.device) + torch.arange(like.shape[1], device=like.device)
        given |= {MEMORY: found[0], "use_cache": False, "position_ids": places}
        return found

    def keep_stream(self, after: BetweenForwards) -> None:
        """Hold a memory until the next forward of the same mode, training or evaluation."""
        self.__dict__.setdefault("_streams", {})[self.training] = after  # type: ignore[attr-defined]

    def forget_streams(self) -> None:
        """Drop what is held of streams."""
        for module in self.modules():  # type: ignore[attr-defined]
            module.__dict__.pop("_streams", None)
