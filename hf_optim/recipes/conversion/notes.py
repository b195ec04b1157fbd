"""What a translation leaves out: what has no effect on the result, what changes it, and whole parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...errors import RecipeError
from ...trust.bounds import shown
from ...trust.text import one_line


@dataclass
class Notes:
    """Lines about what has no counterpart in hf_optim.

    Attributes:
        harmless: fields without an effect on the result: memory, speed, or what hf_optim does anyway.
        changed: fields whose loss changes the result.
        missing: whole modifiers, or parts of one, that no step replaces.
        hints: what to look at before the recipe is used.
    """

    harmless: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """True if the translation has the same result: at most harmless fields were left out."""
        return not self.changed and not self.missing

    def lines(self) -> list[str]:
        """Return all of them for people, the most important first."""
        return [
            *(f"no counterpart: {line}" for line in self.missing),
            *(f"differs: {line}" for line in self.changed),
            *(f"left out, without effect on the result: {line}" for line in self.harmless),
            *self.hints,
        ]


class Fields:
    """The fields of a mapping from a stranger's file, taken one by one, so that none is overlooked.

    Args:
        data: the mapping.
        label: what it is, for messages.
        notes: where ``rest`` reports what nobody took.
    """

    def __init__(self, data: Any, label: str, notes: Notes) -> None:
        self.label, self.notes = label, notes
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise RecipeError(f"{label} must be a mapping of fields, not {shown(data)}")
        self._left = {str(key): value for key, value in data.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = None) -> Any:
        """Return a field and mark it as translated."""
        return self._left.pop(name, default)

    def number(self, name: str, default: Any = None) -> Any:
        """Return a field that is a number, or the default for null. Raises ``RecipeError`` for another value."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RecipeError(f"{self.label}: {name} must be a number, not {shown(value)}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Return a field that is true or false, or the default for null. Raises ``RecipeError`` for another value."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise RecipeError(f"{self.label}: {name} must be true or false, not {shown(value)}")
        return value

    def names(self, name: str, default: tuple[str, ...] = ()) -> list[str]:
        """Return a field that is a name or a list of names. Raises ``RecipeError`` for another value."""
        value = self.take(name)
        value = list(default) if value is None else [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise RecipeError(f"{self.label}: {name} must be a list of names, not {shown(value)}")
        return value

    def drop(self, why: str, *names: str) -> None:
        """Leave out fields that do not affect the result. ``why`` completes the line."""
        for name in names:
            if name in self._left:
                self.notes.harmless.append(f"{self.label}: {name} ({why})")
                del self._left[name]

    def change(self, text: str) -> None:
        """Report a difference in the result."""
        self.notes.changed.append(f"{self.label}: {text}")

    def rest(self) -> None:
        """Report the fields that were neither taken nor dropped, unless they are null or false."""
        for name, value in self._left.items():
            if value is not None and value is not False and value != []:
                self.change(f"{one_line(name)}: {shown(value)} has no counterpart")
        self._left = {}
