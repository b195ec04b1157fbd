"""What the key/value cache of a batch takes, in 16 bits and quantized, beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..errors import RecipeError
from ..toolkit.quantization import KeyValueScheme, cache_layers, cache_size, scheme_of
from ..trust.bounds import shown
from .reported import format_bytes

LARGEST = 2**31


def parse_batch_length(text: str) -> tuple[int, int]:
    """Return the batch and the length of ``"512x2048"``. Raises ``RecipeError`` for other texts."""
    found = re.fullmatch(r"([0-9]{1,10})\s*[x×]\s*([0-9]{1,10})", text.strip().lower())
    batch, length = map(int, found.groups()) if found else (0, 0)
    if not (0 < batch < LARGEST and 0 < length < LARGEST):
        raise RecipeError(f"--kv takes BATCHxLENGTH, such as 8x32768, not {shown(text)}")
    return batch, length


def scheme_of_steps(steps: Iterable[Any]) -> KeyValueScheme | None:
    """Return the quantization of keys and values that the steps of a recipe set; None if none does."""
    schemes = [getattr(step, "scheme", None) for step in steps]
    return next((each for each in reversed(schemes) if isinstance(each, KeyValueScheme)), None)


def cache_report(
    config: Any, batch: int, length: int, scheme: KeyValueScheme | None = None, weight_bytes: int = 0
) -> dict[str, Any]:
    """Return the bytes of the cache of a model, in JSON types, with rows of text under ``readable``.

    Args:
        config: the configuration of the model.
        batch, length: sequences, and tokens of each.
        scheme: None for the one in the configuration, if there is one.
        weight_bytes: of the weights, for the ratio; 0 leaves it out.

    Raises ``ModelError`` as ``cache_layers`` does.
    """
    scheme = scheme or scheme_of(config)
    layers = cache_layers(config)
    plain = cache_size(layers, batch, length)
    found: dict[str, Any] = {"batch": batch, "length": length, "layers": len(layers), "bytes_16_bits": plain.total}
    share = f", {plain.total / weight_bytes:.3g} times the weights" if weight_bytes else ""
    rows = {f"cache of {batch} x {length} tokens, 16 bits": f"{format_bytes(plain.total)}{share}"}
    if any(layer.patterns is not None for layer in layers):
        full = cache_size([replace(layer, patterns=None) for layer in layers], batch, length).total
        found["bytes_of_full_attention"] = full
        rows["the same, under full attention"] = f"{format_bytes(full)}, {full / plain.total:.3g} times that"
    if scheme is not None:
        size = cache_size(layers, batch, length, scheme)
        found |= {
            "scheme": scheme.to_dict(),
            "bytes": size.total,
            "code_bytes": size.codes,
            "scale_bytes": size.scales,
            "full_precision_bytes": size.plain,
        }
        name = "float8" if scheme.bits == "float8" else f"{scheme.bits} bits"
        rows[f"the same, {name}"] = f"{format_bytes(size.total)}, {size.total / plain.total:.2f} of that"
        rows["of which codes, scales, full precision"] = ", ".join(
            format_bytes(part) for part in (size.codes, size.scales, size.plain)
        )
    if weight_bytes:
        found["times_weights"] = plain.total / weight_bytes
    return {**found, "readable": rows}
