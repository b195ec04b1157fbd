"""HTML built of elements: text and attributes are escaped for their place, and links lead to files beside the page.

A page of results is published, and its names and notes may come from a stranger's record. There is no way to put such a
string into a page but as a child or an attribute of ``element``; only ``Html``, which the functions here return, is
taken as it is.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

from .text import one_line

# A fragment of the same page, or a relative path: no scheme, no host, no quotation mark.
_LOCAL = re.compile(r"#[\w-]+|(?!/)[\w\-.~%()/]+", re.ASCII)
_CODE = re.compile(r"(`+)(.+?)\1(?!`)")
_NAME = re.compile(r"[a-zA-Z][\w-]*", re.ASCII)
_LINKS = ("href", "src")
_VOID = ("br", "col", "input", "link", "meta")


class Html(str):
    """HTML, made by the functions of this module or read from a file of this package."""


def text(value: Any, limit: int = 2000) -> Html:
    """Return a value as text on one line, for an element or a quoted attribute. A space at its ends is kept."""
    ends = [" " if end.isspace() else "" for end in (str(value)[:1], str(value)[-1:])]
    return Html(html.escape(one_line(value, limit), quote=True).join(ends))


def breakable(value: Any) -> Html:
    """Return text that a narrow cell may break after an underscore, before it breaks inside a word."""
    return Html(text(value).replace("_", "_<wbr>"))


def preformatted(value: Any) -> Html:
    """Return text with its line breaks, for the element ``pre``."""
    marks = (mark if mark.isprintable() or mark in "\n\t" else "\ufffd" for mark in str(value).replace("\r\n", "\n"))
    return Html(html.escape("".join(marks), quote=True))


def with_code(value: Any) -> Html:
    """Return one line of Markdown as text in which only `` `code` `` has an effect."""
    # Escaped text holds no markup, so what is between backticks cannot end the element.
    return Html(_CODE.sub(r"<code>\2</code>", text(value)))


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return an element. Children that are not ``Html`` are text.

    An attribute is named as in Python: ``class_`` is ``class``, ``aria_label`` is ``aria-label``. It is left out if it
    is None or False, and has no value if it is True.

    Raises ``ValueError`` for a link that leads out of the folder of the page.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an element")
    written = "".join(
        f" {key}" if value is True else f' {key}="{text(value)}"'
        for key, value in ((_attribute(key), value) for key, value in attributes.items())
        if value is not None and value is not False and _checked(key, value)
    )
    inside = join(child for child in children if child is not None)
    return Html(f"<{name}{written}>{inside}" + ("" if name in _VOID else f"</{name}>"))


def join(parts: Iterable[Any], between: str = "") -> Html:
    """Return several pieces as one, with text between them. Pieces that are not ``Html`` are text."""
    return Html(html.escape(between).join(part if isinstance(part, Html) else text(part) for part in parts))


def _attribute(key: str) -> str:
    name = key.rstrip("_").replace("_", "-")
    if not _NAME.fullmatch(name) or name.startswith("on") or name == "style":
        raise ValueError(f"{key!r} is not an attribute that a page may have")
    return name


def _checked(key: str, value: Any) -> bool:
    if key in _LINKS and not (_LOCAL.fullmatch(str(value)) and ".." not in str(value).split("/")):
        raise ValueError(f"{str(value)[:80]!r} does not lead to a place beside the page")
    return True
