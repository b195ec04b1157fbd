"""Text from records and recipes in Markdown: escaped for the place where it goes.

A card is published, and its names, notes and descriptions may come from a stranger's record. Every function returns
text that cannot end the construct that it stands in, and that holds no HTML.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

MAX_LINE = 2000
_SPACES = re.compile(r"\s+")
_ENTITY = re.compile(r"&(?=#?\w{1,32};)")
_SPECIAL = re.compile(r"([\\`*\[\]])")
# Underscores inside a word are text, as in `squared_error`.
_EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
_BLOCK = re.compile(r"^(\s*)(#{1,6}(?=\s|$)|>|[+-](?=\s|$)|=+\s*$|-{2,}\s*$)")
_NUMBERED = re.compile(r"^(\s*\d{1,9})([.)])(?=\s|$)")
_LINK = re.compile(r"\](?=\()")
_SAFE_LINK = re.compile(r"\]\((?:https?://[\w\-./~%?=#+:@,]*|#?[\w\-./]*)\)")
_DEFINITION = re.compile(r"\](?=:)")
_FENCE = re.compile(r"^([ \t>]*)(`{3,}|~{3,})", re.MULTILINE)
_RULE = re.compile(r"^([ \t>]*)(#{1,6}(?=\s|$)|=+[ \t]*$|-{2,}[ \t]*$|(?:[*_-][ \t]*){3,}$)", re.MULTILINE)


def one_line(value: Any, limit: int = MAX_LINE) -> str:
    """Return a value as one line of printable text, shortened to ``limit`` characters."""
    text = _SPACES.sub(" ", str(value)[: 4 * limit]).strip()
    text = "".join(mark if mark.isprintable() else "\ufffd" for mark in text)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def plain(value: Any, limit: int = MAX_LINE) -> str:
    """Return a value as plain text in a paragraph, a heading or the text of a link: no markup in it has an effect."""
    return _BLOCK.sub(r"\1\\\2", _NUMBERED.sub(r"\1\\\2", _inline(value, limit)))


def cell(value: Any) -> str:
    """Return Markdown on one line for the cell of a table; numbers have six significant digits, text is plain."""
    if isinstance(value, Markdown):
        return value.replace("|", "\\|")
    written = f"{value:.6g}" if isinstance(value, float) else str(value)
    if _is_number(written):
        return written
    return _inline(written, MAX_LINE).replace("|", "\\|")


_NUMBER = re.compile(r"[-+]?[\d,]+(\.\d+)?([eE][-+]?\d+)?( ?%)?")


def _is_number(text: str) -> bool:
    return text == "-" or (_NUMBER.fullmatch(text[:60]) is not None and len(text) <= 60)


class Markdown(str):
    """Text that is Markdown already, made by the functions of this module."""


def code(value: Any) -> Markdown:
    """Return a value as inline code: nothing in it has an effect."""
    text = one_line(value) or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{ticks}{space}{text}{space}{ticks}")


def code_block(source: str, language: str) -> str:
    """Return a fenced block of code, with a fence that is longer than any in ``source``."""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in source.replace("\r\n", "\n").rstrip())
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def paragraphs(markdown: Any) -> str:
    """Return Markdown of a step: emphasis, code, lists, tables and links work; HTML, headings and fences do not.

    Links lead to http(s) addresses or to files of the repository. Images do not work: a card has sections for them.
    """
    text = "".join(mark if mark.isprintable() or mark in "\n\t" else " " for mark in str(markdown))
    text = _RULE.sub(r"\1\\\2", _FENCE.sub(_without_fence, _html(text)))
    text = _escape_links(text.replace("![", "!\\["))
    return _DEFINITION.sub(r"\\]", text)


def sentence(markdown: Any) -> Markdown:
    """Return Markdown of a step on one line, as ``paragraphs``."""
    text = paragraphs(one_line(markdown))
    # A lone backtick would pair with one in the text around.
    paired = "\\`" not in text and _has_paired_backticks(text)
    return Markdown(text if paired else re.sub(r"\\*`", r"\\`", text))


def bibtex(value: Any) -> str:
    """Return a value for a field of BibTeX in braces."""
    return re.sub(r"[{}\\\"%@]", "", one_line(value, 300))


def link_target(path: str) -> str:
    """Return a relative path for the target of a link or an image."""
    return quote(path, safe="/")


def file_stem(name: Any, default: str = "value") -> str:
    """Return a name for a file: letters, digits, hyphens and underscores of ``name``, at most 60."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", str(name)[:400])[:60].strip("_") or default


def plot_label(value: Any, limit: int = 80) -> str:
    """Return a value for a label of matplotlib, which would read text between dollar signs as mathematics."""
    return one_line(value, limit).replace("\\", "/").replace("$", "\\$")


def tag(value: Any) -> str:
    """Return a name for the tags of the Hub, and an empty string if it is not a plain name."""
    text = str(value)
    return text if re.fullmatch(r"[A-Za-z0-9][\w.:-]{0,95}", text, re.ASCII) else ""


def _without_fence(match: re.Match[str]) -> str:
    return match[1] + "".join(f"\\{mark}" for mark in match[2])


def _has_paired_backticks(text: str) -> bool:
    """Return True if every run of backticks opens or closes code, so that none pairs with one of the text around."""
    open_run = 0
    for run in re.findall(r"`+", text):
        if not open_run:
            open_run = len(run)
        elif len(run) == open_run:
            open_run = 0
    return not open_run


def _inline(value: Any, limit: int) -> str:
    text = _html(_SPECIAL.sub(r"\\\1", one_line(value, limit)))
    return _EMPHASIS.sub(r"\\_", text.replace("~", "\\~"))


def _html(text: str) -> str:
    # `>` alone opens nothing (a quotation is escaped with the other marks at the start of a line).
    return _ENTITY.sub("&amp;", text).replace("<", "&lt;")


def _escape_links(text: str) -> str:
    parts, at = [], 0
    for match in _LINK.finditer(text):
        if _SAFE_LINK.match(text, match.start()):
            continue
        parts.append(text[at : match.start()] + "\\")
        at = match.start()
    return "".join([*parts, text[at:]])
