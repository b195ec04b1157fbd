"""The names that the tensors of a checkpoint get in a model: transformers renames keys while it loads them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any


def model_names(
    keys: Iterable[str], conversions: Iterable[Any], base_model_prefix: str, names: Collection[str]
) -> dict[str, tuple[str, str | None]]:
    """Return, for every key of a checkpoint, its name in the model and the pattern of the conversion that reads it.

    The same rules as in transformers' own loader: keys in natural order, all renamings, then at most one conversion;
    the prefix of the base model is added or removed; and a key that the model has already is not renamed.

    Args:
        keys: names of tensors in the files.
        conversions: transformers' ``WeightRenaming`` and ``WeightConverter`` objects, in order.
        base_model_prefix: of the model.
        names: the names of the model's tensors.

    Returns:
        key -> (name, pattern); the pattern is None where the tensor is the parameter itself. Several keys that one
        conversion combines have the same name.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = list(conversions)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    known = dict.fromkeys(names, True)
    found: dict[str, tuple[str, str | None]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], base_model_prefix, known)
        found[key] = (name, pattern)
    return found
