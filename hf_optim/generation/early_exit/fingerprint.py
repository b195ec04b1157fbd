"""The weights that a certificate is for, as one number: equal for a model and its checkpoint, on any device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...toolkit.exits import exits_of

# Elements of a weight that are read: all sums would read the whole model.
SAMPLED = 4096
GLANCED = 64
# Places within the parts: a number without a common factor with usual widths.
STEP = 40503


def fingerprint(model: Any) -> str:
    """Return a hash, in hexadecimal, of up to 4096 values of each weight, in the dtype they are computed in.

    The weights of exits count. Packed weights are read as the numbers that their codes stand for. A change of few
    values of a large weight may be missed; training, pruning, quantizing or another dtype is not. The configuration is
    not read.
    """
    found = hashlib.sha256()
    for name, weight in sorted(_weights(model).items()):
        flat = sampled(weight, SAMPLED)
        found.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        found.update(flat.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def sampled(weight: Tensor, count: int) -> Tensor:
    """Return up to ``count`` values of a weight: one of each of as many equal parts of it, at a place of its own.

    A fixed stride would meet the same columns in every row.
    """
    flat = weight.detach().reshape(-1)
    if len(flat) <= count:
        return flat
    part = torch.arange(count, device=flat.device)
    return flat[part * len(flat) // count + part * STEP % (len(flat) // count)]


def glance(tensors: Iterable[Tensor]) -> tuple[bytes, ...]:
    """Return a few values of each tensor, as bytes: less than ``fingerprint`` reads, for a look before every call."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for each in tensors:
        by_kind.setdefault((each.device, each.dtype), []).append(sampled(each, GLANCED))
    joined = (torch.cat(each).cpu().contiguous().view(torch.uint8) for each in by_kind.values() if each)
    return tuple(each.numpy().tobytes() for each in joined)


def _weights(model: Any) -> dict[str, Tensor]:
    """Return the floating-point weights by name, tied ones under each of their names."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        held = {key: value for key, value in module._parameters.items() if value is not None}
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            held["weight"] = weight
        prefix = f"{name}." if name else ""
        found |= {f"{prefix}{key}": value for key, value in held.items() if value.is_floating_point()}
    if (exits := exits_of(model)) is not None:
        found |= {f"exits.{name}": value for name, value in exits.state_dict().items()}
    # Scales of a quantized weight are in the numbers that they give.
    return {name: value for name, value in found.items() if not name.endswith(("_scale", "_zero_point", "_g_idx"))}
