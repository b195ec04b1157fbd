"""Models whose layers are steps: each step applies one of a few shared blocks, with signals added to its input.

    H_t = Block_g(t)(H_{t-1} + s (P + T_t)),    t = 1 ... steps

``P`` is a signal of a token's position, ``T_t`` one of the step, ``s`` their scale. The stock model keeps its loop over
layers: the entries of its block list are replaced by ``Step`` modules, of which the first of each block holds it. So a
cache has a slot for each step, and a checkpoint holds each block once.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .mixed_classes import mixed

FIELD = "tied_blocks"  # of a configuration: the settings, a dict
MOST_STEPS = 4096
SIGNALS = ("sinusoidal", "learned", "none")
ORDERS = ("consecutive", "cycle")
WORDS_OF_STEPS = ("blocks", "order", "position", "step", "scale")  # settings beside the numbers


def block_of_step(step: int, steps: int, groups: int, order: str) -> int:
    """Return the number of the block that a step applies; both count from 0."""
    return step % groups if order == "cycle" else step * groups // steps


def read_tied_blocks(settings: Any) -> dict[str, Any]:
    """Return the settings of tied blocks from a configuration. Raises ``ValueError`` for others.

    They are ``blocks`` (the name of the block list in the base model), ``steps``, ``groups``, ``order``, ``position``
    and ``step`` (kinds of signals), ``scale`` of the signals, ``width`` of the hidden state and ``context``, the number
    of positions with a learned signal.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"the configuration has no settings of tied blocks, but {str(settings)[:80]!r}")
    found = dict(settings)
    numbers = {"steps": MOST_STEPS, "groups": MOST_STEPS, "width": 1 << 20, "context": 1 << 26}
    for name, most in numbers.items():
        value = found.get(name)
        least = 0 if name == "context" else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"tied blocks: {name} is a number from {least} to {most}, not {str(value)[:80]!r}")
    if found["groups"] > found["steps"]:
        raise ValueError(f"tied blocks: {found['groups']} blocks cannot all be applied in {found['steps']} steps")
    for name, known in (("order", ORDERS), ("position", SIGNALS), ("step", SIGNALS)):
        if found.get(name) not in known:
            raise ValueError(f"tied blocks: {name} is one of {', '.join(known)}, not {str(found.get(name))[:80]!r}")
    scale = found.get("scale")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 <= scale < 1e6:
        raise ValueError(f"tied blocks: scale is a number from 0, not {str(scale)[:80]!r}")
    if not isinstance(found.get("blocks"), str):
        raise ValueError("tied blocks: blocks is the name of a list of blocks")
    unknown = sorted(str(name)[:40] for name in found.keys() - {*numbers, *WORDS_OF_STEPS})
    if unknown:
        raise ValueError(f"tied blocks have settings that they do not know: {unknown[:4]}")
    return found


def sinusoid(numbers: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return ``sin(n / 10000^(2j/d))`` in the even components 2j, and the cosine in the odd components 2j + 1.

    Args:
        numbers: ``[...]``, of positions or steps; the paper counts from 1.
        width: d.
        dtype: of the result ``[..., d]``; angles are computed in float64 if it is that, else in float32.
    """
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    place = torch.arange(width, device=numbers.device)
    rates = torch.pow(10000.0, -(place - place % 2).to(computed) / width)
    angles = numbers.to(computed)[..., None] * rates
    return torch.where(place % 2 == 0, angles.sin(), angles.cos()).to(dtype)


class Passage:
    """One forward of the base model, as its steps need to know it: what the caller said of positions and padding.

    Attributes:
        mask: ``[B, n]`` of all tokens, those in the cache among them, or None.
        places: ``position_ids`` of the new tokens, ``[1 or B, N]``, or None.
        cache: that of keys and values, or None.
        noted: a forward of the model is under way; False if its layers are called by themselves.
    """

    compares_attributes = True  # between forwards, what the model's settings say of it (``topology.trace_cache``)

    def __init__(self) -> None:
        self.begin(None, None, None)

    def begin(self, mask: Tensor | None, places: Tensor | None, cache: Cache | None) -> None:
        """Note what the caller gave to a forward."""
        self.mask, self.places, self.cache = mask, places, cache
        self.signal: Tensor | None = None
        self.noted = False
        self._past: int | None = None

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for arguments of a forward that the steps do not take."""

    @property
    def past(self) -> int:
        """Tokens in the cache before this forward; first read before its first layer, and only where it matters."""
        if self._past is None:
            self._past = 0 if self.cache is None else int(self.cache.get_seq_length())
        return self._past

    def valid(self, hidden: Tensor) -> Tensor | None:
        """Return which of the new tokens are not padding, bool ``[B, N]``; None if nothing says so."""
        columns = self._columns(hidden)
        return None if columns is None else columns[:, self.past :]

    def positions(self, hidden: Tensor) -> Tensor:
        """Return the positions of the new tokens in their rows, int64 ``[1 or B, N]``, from 0; of padding, any.

        Those that the caller gave; else a row begins with its first token that is not padding.
        """
        count = hidden.shape[1]
        if self.places is not None and self.places.dim() == 2 and self.places.shape[1] == count:
            return self.places
        columns = self._columns(hidden)
        if columns is not None:
            return (columns.long().cumsum(1) - 1).clamp_min(0)[:, self.past :]
        return torch.arange(self.past, self.past + count, device=hidden.device)[None]

    def _columns(self, hidden: Tensor) -> Tensor | None:
        """Return the padding mask up to the last new token, bool ``[B, past + N]``."""
        if self.mask is None:
            return None
        end = self.past + hidden.shape[1]
        if self.mask.shape[1] < end:
            raise ValueError(
                f"the attention_mask has {self.mask.shape[1]} columns for {end} tokens: pass that of all tokens, those "
                "in the cache among them"
            )
        return self.mask[:, :end].bool()


class Signals(nn.Module):
    """The signals that are added to the input of each step.

    Attributes:
        position: learned ones, ``[context, width]``, or None.
        step: learned ones, ``[steps, width]``, or None.
    """

    position: nn.Parameter | None
    step: nn.Parameter | None

    def __init__(self, settings: Mapping[str, Any], **about: Any) -> None:
        super().__init__()
        self.kinds = settings["position"], settings["step"]
        self.width, self.scale = settings["width"], float(settings["scale"])
        for name, rows in (("position", settings["context"]), ("step", settings["steps"])):
            learned = settings[name] == "learned"
            made = nn.Parameter(torch.zeros(rows, self.width, **about)) if learned else None
            self.register_parameter(name, made)

    def forward(self, hidden: Tensor, number: int, passage: Passage) -> Tensor:
        """Return ``hidden`` ``[B, N, d]`` with the signals of step ``number``, which counts from 0."""
        of_position, of_step = self.kinds
        if of_position != "none":
            if passage.signal is None:
                passage.signal = self._of_positions(hidden, passage)
            hidden = hidden + passage.signal
        if self.step is not None:
            hidden = hidden + (self.scale * self.step[number]).to(hidden.dtype)
        elif of_step == "sinusoidal":
            count = torch.full((), number + 1, device=hidden.device)
            hidden = hidden + self.scale * sinusoid(count, self.width, hidden.dtype)
        return hidden

    def _of_positions(self, hidden: Tensor, passage: Passage) -> Tensor:
        places = passage.positions(hidden)
        if self.position is None:
            return self.scale * sinusoid(places + 1, self.width, hidden.dtype)
        known = len(self.position)
        if passage.places is None and passage.mask is None and passage.past + hidden.shape[1] > known:
            raise ValueError(f"{passage.past + hidden.shape[1]} tokens, and signals for {known} positions")
        return (self.scale * nn.functional.embedding(places, self.position)).to(hidden.dtype)


class Step(nn.Module):
    """A step: a layer of a model that applies a shared block.

    Attributes:
        number: of the step, from 0; the slot of a cache.
        block: the block. It is a submodule of the first step that applies it, and of no other.
        signals: a submodule of the first step of all.
    """

    def __init__(self, number: int, home: Step | nn.Module, first: Step | Signals, passage: Passage) -> None:
        super().__init__()
        self.number, self.passage = number, passage
        # Entries of __dict__ are not submodules, so that names and tensors of a block occur once.
        if isinstance(home, Step):
            vars(self)["home"] = home
        else:
            self.own_block = home
        if isinstance(first, Step):
            vars(self)["first"] = first
        else:
            self.own_signals = first

    @property
    def block(self) -> nn.Module:
        """The block that the step applies."""
        return vars(self).get("home", self).own_block

    @property
    def signals(self) -> Signals:
        """The signals of all steps."""
        return vars(self).get("first", self).own_signals

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("own_block", "own_signals", "home", "first"):
                raise
            return getattr(self.block, name)  # stock models read attributes of a layer, such as its kind of attention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, args, kwargs = hidden_and_rest(args, kwargs)
        self.begin_alone(args, kwargs)
        return self.apply_block(self.signals(hidden, self.number, self.passage), args, kwargs)

    def begin_alone(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forget the last forward, where this is the first step and its model did not note another one."""
        if self.number == 0 and not self.passage.noted:
            self.passage.begin(None, None, _cache_of((*args, *kwargs.values())))

    def apply_block(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block as the layer of this step's number: caches have a slot for each step."""
        block = self.block
        for module in block.modules():
            if "layer_idx" in vars(module):
                module.layer_idx = self.number  # type: ignore[assignment]
        return block(hidden, *args, **kwargs)


def hidden_and_rest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return the hidden state from the arguments of a layer, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), args, rest


def _cache_of(values: Iterable[Any]) -> Cache | None:
    return next((value for value in values if isinstance(value, Cache)), None)


class NotesInputs:
    """Mixin of the model that calls the steps and notes what its steps need to know of each forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        passage = vars(self).get("passage")
        if passage is None:  # a model with a head: the model under it notes
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        given = {**dict(zip(_parameters(type(self)), args, strict=False)), **kwargs}  # type: ignore[arg-type]
        passage.check(given)
        mask, places = given.get("attention_mask"), given.get("position_ids")
        flat = isinstance(mask, Tensor) and mask.dim() == 2
        places = places if isinstance(places, Tensor) else None
        passage.begin(mask if flat else None, places, _cache_of(given.values()))
        passage.noted = True
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            passage.begin(None, None, None)


@cache
def _parameters(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def tie_blocks(model: Any, settings: Any, step_class: type[Step] = Step, passage: Passage | None = None) -> list[Step]:
    """Replace the layers of a model by steps, in place, and return them. Raises ``ValueError`` for other settings.

    The first layer of each group becomes its block. The model must have as many layers as ``settings`` has steps.
    """
    found = read_tied_blocks(settings)
    base = model.base_model
    try:
        layers: Any = base.get_submodule(found["blocks"])
    except AttributeError:
        layers = None
    count, groups = found["steps"], found["groups"]
    if not isinstance(layers, nn.ModuleList) or len(layers) != count:
        raise ValueError(f"tied blocks: {found['blocks'][:80]!r} is not a list of {count} layers")
    weight = next(p for p in layers.parameters() if p.is_floating_point())
    passage = Passage() if passage is None else passage
    first: Step | Signals = Signals(found, dtype=weight.dtype, device=weight.device).train(model.training)
    homes: dict[int, Step] = {}
    steps: list[Step] = []
    for number in range(count):
        group = block_of_step(number, count, groups, found["order"])
        step = step_class(number, homes.get(group, layers[number]), first, passage)
        step.training = model.training
        homes.setdefault(group, step)
        first = steps[0] if steps else step
        steps.append(step)
    for number, step in enumerate(steps):
        layers[number] = step
    caller = _caller(base, found["blocks"])
    caller.passage = passage
    if not isinstance(caller, NotesInputs):
        caller.__class__ = mixed(NotesInputs, type(caller))  # type: ignore[arg-type]
    return steps


def _caller(base: Any, blocks: str) -> Any:
    """Return the innermost model that holds the list of blocks: models with heads may call a part of the base model."""
    parts = blocks.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    inner = [base.get_submodule(name) for name in names]
    return next((module for module in inner if isinstance(module, PreTrainedModel)), base)


def has_steps(model: nn.Module) -> bool:
    """Return True if layers of a model are steps, by this code or by that of a checkpoint."""
    return any("passage" in vars(module) and "own_block" in module._modules for module in model.modules())


class TiedModel(NotesInputs):
    """Mixin of a model class, first among its bases: its layers are steps. Subclasses set ``tied_field``."""

    tied_field = ""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        settings = getattr(config, self.tied_field, None)
        if settings is None:
            raise ValueError(f"config.{self.tied_field} is missing: it says how the blocks of this model are tied")
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.tie(settings)

    def tie(self, settings: Any) -> None:
        """Make steps of the layers."""
        tie_blocks(self, settings)
