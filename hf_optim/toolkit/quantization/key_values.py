"""The settings of quantized keys and values, and where a model keeps them.

A model's setting is the entry ``hf_optim_key_values`` of its configuration. It changes no weight, and stock
transformers ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import ModelError, RecipeError
from ...trust.bounds import shown

SETTING = "hf_optim_key_values"
BITS = (4, 8, "float8")
KEYS = ("channel", "token")
GROUPS = (32, 64, 128)
LONGEST_RESIDUAL = 4096
# Tokens that are quantized at once where no group says so.
TOKEN_STEP = 64


@dataclass(frozen=True)
class KeyValueScheme:
    """How keys and values are quantized.

    Attributes:
        bits: 4, 8, or ``"float8"`` (e4m3).
        keys: ``"channel"`` gives each channel of ``group`` consecutive tokens a scale (KIVI), ``"token"`` each token
            and head. Values always have one for each token and head.
        group: 32, 64 or 128 tokens.
        residual: the latest tokens that stay in full precision; up to ``group`` more wait until their group is full.
        symmetric: no zero points; None is False with 4 bits and True otherwise.

    Raises ``RecipeError`` for other values.
    """

    bits: int | str = 8
    keys: str = "channel"
    group: int = 64
    residual: int = 128
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        for name, choices in (("bits", BITS), ("keys", KEYS), ("group", GROUPS)):
            value = getattr(self, name)
            if isinstance(value, bool) or value not in choices:
                raise RecipeError(f"{name} must be one of {', '.join(map(repr, choices))}, not {shown(value)}")
        kept = self.residual
        if isinstance(kept, bool) or not isinstance(kept, int) or not 0 <= kept <= LONGEST_RESIDUAL:
            raise RecipeError(f"residual must be a number of tokens up to {LONGEST_RESIDUAL}, not {shown(kept)}")
        if self.symmetric not in (None, True, False):
            raise RecipeError(f"symmetric must be True, False or None, not {shown(self.symmetric)}")
        if self.bits == "float8" and self.symmetric is False:
            raise RecipeError("float8 has no zero points: leave symmetric out")

    @property
    def width(self) -> int:
        """Bits of a code."""
        return 8 if self.bits == "float8" else int(self.bits)

    @property
    def is_symmetric(self) -> bool:
        """True without zero points."""
        return self.bits != 4 if self.symmetric is None else self.symmetric

    @property
    def step(self) -> int:
        """Tokens that are quantized at once."""
        return TOKEN_STEP if self.keys == "token" else self.group

    def quantized_tokens(self, tokens: int) -> int:
        """Return how many of the first ``tokens`` are quantized; the rest are in full precision."""
        return max(0, (tokens - self.residual) // self.step * self.step)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for a configuration."""
        return asdict(self)


def scheme_of(config: Any) -> KeyValueScheme | None:
    """Return the scheme in the configuration of a model (or of its text part); None if there is none.

    Raises ``ModelError`` for an entry that is not one.
    """
    found = getattr(config.get_text_config(decoder=True), SETTING, None)
    if found is None:
        return None
    known = [field.name for field in fields(KeyValueScheme)]
    if not isinstance(found, Mapping):
        raise ModelError(f"{SETTING} in the configuration is {shown(found)}, not a mapping with {', '.join(known)}")
    unknown = sorted(str(key) for key in found if key not in known)
    if unknown:
        raise ModelError(f"{SETTING} in the configuration has {shown(unknown[0])}; it has {', '.join(known)}")
    try:
        return KeyValueScheme(**found)
    except RecipeError as error:
        raise ModelError(f"{SETTING} in the configuration: {error}") from error


def set_scheme(config: Any, scheme: KeyValueScheme | None) -> None:
    """Write a scheme into the configuration of a model, or remove it."""
    own = config.get_text_config(decoder=True)
    if scheme is not None:
        setattr(own, SETTING, scheme.to_dict())
    elif hasattr(own, SETTING):
        delattr(own, SETTING)
