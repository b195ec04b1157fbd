"""The fields of a technique, for people and programs: from the class, its stated ranges and its docstring."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from ..recipes.field_checks import choices_of, spell
from ..recipes.technique import Technique

SECTION = "Attributes:"
LIMITS = {"low": ">=", "above": ">", "high": "<=", "below": "<"}


def fields_of(cls: type[Technique]) -> list[dict[str, Any]]:
    """Name, type, choices (or None), whether it is required, default, range and description of each field."""
    hints, described = typing.get_type_hints(cls), descriptions(cls)
    rows = []
    for field in dataclasses.fields(typing.cast(Any, cls)):
        required = field.default is dataclasses.MISSING
        choices = field.metadata.get("choices") or choices_of(hints[field.name])
        if choices and None not in choices and _admits_none(hints[field.name]):
            choices = (*choices, None)
        rows.append(
            {
                "name": field.name,
                "type": spell(hints[field.name]),
                "choices": list(choices) or None,
                "required": required,
                "default": None if required else field.default,
                "range": " and ".join(f"{LIMITS[k]} {field.metadata[k]}" for k in LIMITS if k in field.metadata),
                "description": described.get(field.name, ""),
            }
        )
    return rows


def introduction(cls: type) -> str:
    """The first paragraph of the docstring and those that follow before its Attributes section."""
    return _halves(cls)[0]


def descriptions(cls: type) -> dict[str, str]:
    """Field -> description, from the Attributes sections of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        name = ""
        for line in _halves(each)[1].splitlines():
            if line[4:5].strip():  # an entry; what continues one is indented further
                name, _, line = line.strip().partition(":")
                found[name] = ""
            if name:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _halves(cls: type) -> tuple[str, str]:
    """The docstring before its Attributes section, and that section, without what follows it."""
    before, _, after = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition(f"{SECTION}\n")
    section = []
    for line in after.splitlines():
        if line and not line.startswith("    "):
            break
        section.append(line)
    return before.strip(), "\n".join(section)


def _admits_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)
