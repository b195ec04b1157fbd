"""The setting of ``parallelism`` in the configuration of a model: how many ranks its layers are cut for.

It changes no weight, and stock transformers ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import ModelError, RecipeError
from ...trust.bounds import shown

SETTING = "hf_optim_parallelism"
MOST_RANKS = 1024
FIELDS = ("ranks", "timeout")


@dataclass(frozen=True)
class RankSetting:
    """How a checkpoint is divided.

    Attributes:
        ranks: how many ranks its layers are cut for; 1 cuts nothing.
        timeout: seconds without a sign of a rank after which the others end.

    Raises ``RecipeError`` for other values.
    """

    ranks: int
    timeout: float

    def __post_init__(self) -> None:
        if isinstance(self.ranks, bool) or not isinstance(self.ranks, int) or not 1 <= self.ranks <= MOST_RANKS:
            raise RecipeError(f"ranks must be a number from 1 to {MOST_RANKS}, not {shown(self.ranks)}")
        valid = isinstance(self.timeout, (int, float)) and not isinstance(self.timeout, bool)
        if not valid or not 2 <= self.timeout <= 3600:
            raise RecipeError(f"timeout must be 2 to 3600 seconds, not {shown(self.timeout)}")


def rank_setting_of(config: Any) -> RankSetting | None:
    """Return the setting in the configuration of a model, or None. Raises ``ModelError`` for one that is not whole."""
    found = getattr(config, SETTING, None)
    if found is None:
        return None
    if not isinstance(found, Mapping) or set(found) != set(FIELDS):
        raise ModelError(f"{SETTING} in the configuration is {shown(found)}, not a mapping with {' and '.join(FIELDS)}")
    try:
        return RankSetting(**found)
    except RecipeError as error:
        raise ModelError(f"{SETTING} in the configuration: {error}") from error


def set_rank_setting(config: Any, setting: RankSetting) -> None:
    """Write a setting into the configuration of a model."""
    setattr(config, SETTING, asdict(setting))
