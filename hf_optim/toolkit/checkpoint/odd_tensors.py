"""Which tensors of a checkpoint differ from their siblings: the same tensor of the other experts, or other layers.

transformers joins the matrices of experts while it loads them. If one is missing or has another shape, its error names
none; this module finds the tensors to name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from .safetensors import TensorInfo


def odd_tensors(entries: Mapping[str, TensorInfo]) -> list[str]:
    """Return what is odd about single tensors: ``a.1.b is missing``, ``a.1.b is F32 [2, 3], not I8 [4, 3]``.

    Tensors are compared over each number in their names, the last number first. A tensor is missing if more than half
    of the others with that name exist. It is odd if more than half have one dtype and shape, and it has another.
    """
    for place in (-1, -2):
        found = sorted(_odd(entries, place))
        if found:
            return found
    return []


def _odd(entries: Mapping[str, TensorInfo], place: int) -> Iterable[str]:
    groups: dict[str, dict[str, dict[str, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    for key, entry in entries.items():
        parts = key.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if len(numbers) >= -place:
            at = numbers[place]
            groups[".".join(parts[:at])][".".join(parts[at + 1 :])][parts[at]] = entry
    for prefix, suffixes in groups.items():
        indices = {index for found in suffixes.values() for index in found}
        for suffix, found in suffixes.items():
            if len(found) * 2 > len(indices):
                yield from (f"{prefix}.{index}.{suffix} is missing" for index in indices - found.keys())
            common, count = Counter((e.type, tuple(e.shape)) for e in found.values()).most_common(1)[0]
            for index, entry in found.items():
                if count * 2 > len(found) and (entry.type, tuple(entry.shape)) != common:
                    yield (
                        f"{prefix}.{index}.{suffix} is {entry.type} {list(entry.shape)}, "
                        f"not {common[0]} {list(common[1])}"
                    )
