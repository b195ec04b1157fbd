"""What exits need to know of a model: its one list of blocks, and the modules between the last one and the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ...trust.bounds import first_line
from ..modules.modes import eval_mode
from ..topology.block_lists import Block, blocks
from ..topology.fake_inputs import dummy_inputs
from .views import first_state, returned_state


@dataclass(frozen=True)
class Structure:
    """What is found in a model.

    Attributes:
        list_name: qualified name of the list of blocks.
        blocks: how many it has.
        values: how many values a block returns; 0 for a tensor that is not in a tuple.
        width: of the hidden state.
        tail: names of the modules with weights that run after the last block, in their order: final norm, pooler, head.
        has_head: False for a base model, whose output is the hidden state.
    """

    list_name: str
    blocks: int
    values: int
    width: int
    tail: tuple[str, ...]
    has_head: bool


def find_blocks(model: Any) -> list[nn.Module]:
    """Return the blocks of a model that exits can sit after. Raises ``ModelError``, with the reason, if there are none.

    Encoder-decoders are refused: an exit of the encoder would change what every layer of the decoder reads, and one of
    the decoder is not the first block of the model.
    """
    return [block.module for block in _blocks(model)]


def _blocks(model: Any) -> list[Block]:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{name} is not a model of transformers: exits sit after the blocks of one")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder, whose exits are not supported: its two stacks would need exits of their "
            "own. Use a decoder or an encoder"
        )
    found = blocks(model) or _packed_blocks(model)
    if not found:
        raise ModelError(
            f"{name} has no blocks, a list of modules that pass a hidden state on, so there is nowhere for an exit"
        )
    lists = list(dict.fromkeys(block.list_name for block in found))
    if len(lists) > 1:
        raise ModelError(
            f"{name} has {len(lists)} lists of blocks ({', '.join(lists[:3])}): exits are supported for models with one"
        )
    members = model.get_submodule(lists[0])
    if len(found) != len(members._modules):
        raise ModelError(
            f"{name} does not run its {len(members._modules)} blocks one after the other, each once: exits are not "
            "supported for it"
        )
    if len(found) < 2:
        raise ModelError(f"{name} has one block, after which the model ends: there is no place for an early exit")
    return found


def _packed_blocks(model: Any) -> list[Block]:
    """Return the blocks of a model whose weights are packed, in which a trace sees no matrices.

    They are the members of the list whose modules of one class run once each, in their order, on one hidden state.
    """
    lists: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inner:
            lists[name] = module
    calls: list[tuple[int, torch.Size, torch.Size]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        states = returned_state(output)
        if isinstance(states, Tensor):
            calls.append((id(module), first_state(args, kwargs).shape, states.shape))

    members = [module for listed in lists.values() for module in listed.children()]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in members]
    try:
        _run_once(model)
    except Exception:  # the forward of any model; find_structure says what it raises
        return []
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name, listed in lists.items():
        own = {id(module) for module in listed.children()}
        seen = [call for call in calls if call[0] in own]
        if [call[0] for call in seen] == [id(module) for module in listed.children()] and all(
            len(read) == 3 and read == written for _, read, written in seen
        ):
            found += [Block(f"{name}.{i}", module, name, i) for i, module in enumerate(listed.children())]
    return found


def _run_once(model: Any) -> None:
    """Run one forward on dummy inputs.

    Without weights, transformers cannot look at positions for packed rows, which it does before a mask is made: a mask
    of four dimensions, which it takes as it is, spares that.
    """
    inputs = dummy_inputs(model)
    with eval_mode(model):
        try:
            model(**inputs, **no_cache(model))
        except RuntimeError:
            ids = inputs.get("input_ids")
            if ids is None or not ids.is_meta or ids.dim() != 2:
                raise
            mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=model.dtype, device="meta")
            model(**inputs, attention_mask=mask, **no_cache(model))


def find_structure(model: Any) -> Structure:
    """Return what exits need to know of a model, from its blocks and one forward on dummy inputs.

    Raises ``ModelError`` for a model that exits do not fit.
    """
    found = _blocks(model)
    inside = found[0].list_name + "."
    last = found[-1].module
    order: list[str] = []
    form: list[tuple[int, Any]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if form and name not in order:
                order.append(name)

        return hook

    def end(module: nn.Module, args: Any, output: Any) -> None:
        form.append((len(output) if isinstance(output, tuple) else 0, returned_state(output)))

    handles = [last.register_forward_hook(end)]
    handles += [
        module.register_forward_hook(note(name))
        for name, module in model.named_modules()
        if name and not name.startswith(inside) and any(True for _ in module.parameters(recurse=False))
    ]
    try:
        _run_once(model)
    except Exception as error:  # the forward of any model
        raise ModelError(
            f"the forward of {type(model).__name__} fails on dummy inputs ({first_line(error, typed=True)}), so its "
            "exits cannot be placed"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if len(form) != 1 or not isinstance(form[0][1], Tensor) or form[0][1].dim() != 3:
        raise ModelError(f"the blocks of {type(model).__name__} do not return one hidden state [batch, tokens, width]")
    values, hidden = form[0]
    return Structure(
        found[0].list_name, len(found), values, int(hidden.shape[-1]), tuple(order), model.base_model is not model
    )


def no_cache(model: Any) -> dict[str, Any]:
    """Return the argument that keeps a forward from making a cache, for models that make one."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") and _takes_cache(model) else {}


def _takes_cache(model: Any) -> bool:
    import inspect

    parameters = inspect.signature(model.forward).parameters
    return "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's floating-point parameters, that of its hidden state."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
