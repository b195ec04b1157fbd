"""Where the exits of a model are, and how a configuration keeps that.

The entry ``hf_optim_exits`` of ``config.json`` has every field of ``ExitSettings`` and what ties the exits to a model:
the number of its blocks, its width, and the checksum of ``exits.safetensors``. Stock transformers ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import CheckpointError, RecipeError
from ...trust.bounds import shown

ENTRY = "hf_optim_exits"
# The entry of early exits in generation, whose fields are those of ``hf_optim.early_exit.EarlyExit``.
EARLY_EXIT = "hf_optim_early_exit"
HEADS = ("shared", "own")
CLASSIFIERS = ("none", "sequence", "token")
LAWS = ("multinomial", "geometric")
MOST_BLOCKS = 4096


@dataclass(frozen=True)
class ExitSettings:
    """The exits of a model. The last exit, after the last block, is the model itself and is not listed.

    Attributes:
        layers: indices of the blocks after which an early exit sits, counted from 0, ascending.
        heads: ``"shared"``: the model's own final norm and output head read every exit; ``"own"``: each exit has copies
            of them that are trained.
        classifiers: what learns where to stop: ``"none"``, one decision for a ``"sequence"``, or one for each
            ``"token"``.
        law: of a classifier: ``"multinomial"``, a softmax over exits from the state after the first exit's block, or
            ``"geometric"``, a sigmoid at each early exit from its own state.

    Raises ``RecipeError`` for other values.
    """

    layers: tuple[int, ...]
    heads: str = "shared"
    classifiers: str = "none"
    law: str = "multinomial"

    def __post_init__(self) -> None:
        layers = self.layers
        if not isinstance(layers, (list, tuple)) or not layers:
            raise RecipeError(f"layers must name at least one block after which an exit sits, not {shown(layers)}")
        for each in layers:
            if not isinstance(each, int) or isinstance(each, bool) or not 0 <= each < MOST_BLOCKS:
                raise RecipeError(f"layers must be indices of blocks, counted from 0, not {shown(each)}")
        if list(layers) != sorted(set(layers)):
            raise RecipeError(f"layers must ascend, each named once, not {shown(list(layers))}")
        object.__setattr__(self, "layers", tuple(layers))
        for name, known in (("heads", HEADS), ("classifiers", CLASSIFIERS), ("law", LAWS)):
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}, not {shown(getattr(self, name))}")

    @property
    def count(self) -> int:
        """Exits with the last one, the model itself."""
        return len(self.layers) + 1


@dataclass(frozen=True)
class StoredExits:
    """The entry of a configuration: the settings, and what ties them to a model and a file.

    Attributes:
        settings: the exits.
        blocks: of the model.
        width: of its hidden state.
        checksum: SHA-256 of ``exits.safetensors``, in hexadecimal.
    """

    settings: ExitSettings
    blocks: int
    width: int
    checksum: str


def store_settings(config: Any, stored: StoredExits | None) -> None:
    """Write the entry into a configuration; None removes it."""
    if stored is None:
        if hasattr(config, ENTRY):
            delattr(config, ENTRY)
        return
    given = asdict(stored.settings) | {"layers": list(stored.settings.layers)}
    setattr(config, ENTRY, given | {key: getattr(stored, key) for key in ("blocks", "width", "checksum")})


def stored_settings(config: Any) -> StoredExits | None:
    """Return the entry of a configuration, or None. Raises ``CheckpointError`` if it is malformed or incomplete."""
    found = getattr(config, ENTRY, None)
    if found is None:
        return None
    what = f"config.json: {ENTRY}"
    own = [field.name for field in fields(ExitSettings)]
    known = [*own, "blocks", "width", "checksum"]
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{what} must be a mapping with {', '.join(known)}, not {shown(found)}")
    if missing := [name for name in known if name not in found]:
        raise CheckpointError(f"{what} has no {missing[0]}: the file is incomplete; save the model again")
    if unknown := sorted(str(name) for name in found if name not in known):
        raise CheckpointError(f"{what} has the unknown field {shown(unknown[0])}; a newer hf_optim may have written it")
    for name in ("blocks", "width"):
        value = found[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 24:
            raise CheckpointError(f"{what}.{name} must be a positive integer, not {shown(value)}")
    checksum = found["checksum"]
    if not isinstance(checksum, str) or len(checksum) != 64 or set(checksum) - set("0123456789abcdef"):
        raise CheckpointError(f"{what}.checksum must be 64 hexadecimal digits, not {shown(checksum)}")
    try:
        settings = ExitSettings(**{name: found[name] for name in own})
    except (RecipeError, TypeError) as error:
        raise CheckpointError(f"{what}: {error}") from error
    return StoredExits(settings, found["blocks"], found["width"], checksum)
