"""Describe the fields of a technique, from the class, the declared ranges and the docstring."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from ..recipes.field_checks import describe_type, literal_choices
from ..recipes.technique import Technique

SECTION = "Attributes:"
LIMITS = {"low": ">=", "above": ">", "high": "<=", "below": "<"}


def fields_of(cls: type[Technique]) -> list[dict[str, Any]]:
    """Return name, type, choices (or None), required, default, range and description of each field."""
    hints, described = typing.get_type_hints(cls), field_descriptions(cls)
    rows = []
    for field in dataclasses.fields(typing.cast(Any, cls)):
        required = field.default is dataclasses.MISSING
        choices = field.metadata.get("choices") or literal_choices(hints[field.name])
        if choices and None not in choices and _admits_none(hints[field.name]):
            choices = (*choices, None)
        rows.append(
            {
                "name": field.name,
                "type": describe_type(hints[field.name]),
                "choices": list(choices) or None,
                "required": required,
                "default": None if required else field.default,
                "range": " and ".join(f"{LIMITS[k]} {field.metadata[k]}" for k in LIMITS if k in field.metadata),
                "description": described.get(field.name, ""),
            }
        )
    return rows


def introduction(cls: type) -> str:
    """Return the docstring of a class up to its Attributes section."""
    return _split_docstring(cls)[0]


def field_descriptions(cls: type) -> dict[str, str]:
    """Return field -> description, from the Attributes sections of a class and of its bases."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        name = ""
        for line in _split_docstring(each)[1].splitlines():
            if line[4:5].strip():  # a new entry; continuation lines are indented further
                name, _, line = line.strip().partition(":")
                found[name] = ""
            if name:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _split_docstring(cls: type) -> tuple[str, str]:
    """Split a docstring into the text before the Attributes section, and that section."""
    before, _, after = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition(f"{SECTION}\n")
    section = []
    for line in after.splitlines():
        if line and not line.startswith("    "):
            break
        section.append(line)
    return before.strip(), "\n".join(section)


def _admits_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)
