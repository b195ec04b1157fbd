"""The attention of packed models in transformers' registries, beside the implementation that a model had before.

A packed batch comes with its documents, as a keyword that the model hands through to its attention. Without them, the
function and the mask of the same name are those of the former implementation, so a model whose batch is not packed
computes what it did, to the bit.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .documents import Documents
from .per_document import attend_documents

DOCUMENTS = "hf_optim_documents"  # the keyword
PREFIX = "hf_optim_packed_"
BASES = ("eager", "sdpa")

_users: dict[str, WeakSet[nn.Module]] = {}


def name_for(base: str) -> str:
    """Return the name of the implementation that is ``base`` for batches that are not packed."""
    return PREFIX + base


def base_of(name: str | None) -> str | None:
    """Return the former implementation of one of ours, or None."""
    return name[len(PREFIX) :] if name is not None and name.startswith(PREFIX) else None


def register(base: str, user: nn.Module) -> None:
    """Register function and mask for a module that uses them."""
    name = name_for(base)
    users = _users.setdefault(name, WeakSet())
    if user in users:
        return
    if not users:
        AttentionInterface.register(name, partial(attention, base))
        AttentionMaskInterface.register(name, AttentionMaskInterface()[base])
    # Callbacks of weak references run from the latest to the first: the set forgets a module before this one looks.
    weakref.finalize(user, _collect, name).atexit = False
    users.add(user)


def unregister(base: str, user: nn.Module) -> None:
    """Remove both again when the last module that used them is gone."""
    name = name_for(base)
    users = _users.get(name)
    if users is None:
        return
    users.discard(user)
    _collect(name)


def _collect(name: str) -> None:
    """Take a name out of the registries when no module uses it: all were restored, or deleted."""
    if not _users.get(name, True):
        del _users[name]
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(name, None)


def attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a module of transformers: within documents if there are some, else as ``base`` does.

    query, key, value: ``[1, H, total, D]``. sliding_window: one more than a token sees on each side.
    """
    documents: Documents | None = kwargs.pop(DOCUMENTS, None)
    if documents is None:
        if position_bias is not None:
            kwargs["position_bias"] = position_bias
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        former = _former(base, module)
        return former(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    reach = None if sliding_window is None else sliding_window - 1
    query, key, value = (x.transpose(1, 2)[0] for x in (query, key, value))
    return attend_documents(query, key, value, documents, scale, dropout, position_bias, reach)[None], None


def per_row(arguments: dict[str, Any], documents: Documents) -> dict[str, Any]:
    """Return arguments of a forward by which its attention learns of the documents."""
    # A mask of four dimensions is handed on as it is, and our attention does not read it.
    mask = documents.cu[:1].view(1, 1, 1, 1)
    setattr(mask, DOCUMENTS, documents)
    return {**arguments, DOCUMENTS: documents, "attention_mask": mask}


def _former(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the function of an implementation; that of eager attention belongs to the file of the module's class."""
    registry = AttentionInterface()
    if base in registry:
        return registry[base]
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise ValueError(f"{type(module).__name__} has no attention function for {base!r}")
