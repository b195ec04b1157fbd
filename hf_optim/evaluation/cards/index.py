"""The index of a folder of model cards, rendered from their records: a page of HTML, and a README with plots."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ...errors import CheckpointError
from ...trust.bounds import shown
from ...trust.documents import read_mapping
from ...trust.text import Markdown, code, link_target, plain
from ..reported import QUALITY_METRICS, ReportedMetric, format_bytes
from .card import write_page
from .page import render_page
from .page_plot import METRICS
from .sections import markdown_table
from .summary import CardSummary, comparable_points, read_cards

PLOT, PAGE, README = "quality_against_bytes", "index.html", "README.md"
INTRODUCTION = (
    "Checkpoints made with hf_optim. Every number is measured and comes from the `hf_optim.json` beside its card. "
    f"`hf-optim card` renders this page from those files, and [{PAGE}]({PAGE}): the same figures in a browser, to "
    "filter and to sort."
)
HEADING = "# Model cards"
# What the pages of any version of hf_optim begin with: a file without it is somebody else's.
OURS = {README: f"{HEADING}\n\nCheckpoints made with hf_optim.", PAGE: "<title>Model cards - hf_optim</title>"}
MARKED_BYTES = 4096
PAGES = "pages.json"
PAGES_NOTE = "Measured on pages of their own, each with its record."
PLOT_NOTE = "The numbers in the plot are those of the first column."


def render_index(folder: Path | str) -> str:
    """Write ``README.md``, its plots and ``index.html`` into a folder of cards; return the text of the README.

    Raises ``CheckpointError`` if no sub-folder has a record, or if one cannot be read; likewise for ``pages.json``, and
    if the folder has a ``README.md`` or ``index.html`` that hf_optim did not write, which stays as it is.
    """
    folder = Path(folder)
    for name, mark in OURS.items():
        _require_ours(folder / name, mark)
    cards = read_cards(folder)
    parts = [HEADING, INTRODUCTION, _table(cards)]
    names = [(metric, _draw(cards, metric, folder)) for metric in QUALITY_METRICS]
    drawn = [(metric, name) for metric, name in names if name]
    if drawn:
        parts.append(PLOT_NOTE)
    parts += [f"![{metric.label} against the bytes of the weights, for each card]({name})" for metric, name in drawn]
    parts += _pages(folder)
    text = "\n\n".join(parts) + "\n"
    write_page(folder / README, text)
    write_page(folder / PAGE, render_page(cards))
    return text


def _require_ours(path: Path, mark: str) -> None:
    """Refuse to replace a page that hf_optim did not write: the folder may hold a project with pages of its own."""
    if not os.path.lexists(path):
        return
    begins = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            begins = file.read(MARKED_BYTES)
    if mark.encode() not in begins.replace(b"\r\n", b"\n"):
        raise CheckpointError(
            f"{path} was not written by `hf-optim card` and would be replaced: move it, or move the checkpoints into a "
            "folder of their own"
        )


def _table(cards: Sequence[CardSummary]) -> str:
    rows = []
    for card in cards:
        quality = card.metric
        values = [quality.format(v) if quality and v is not None else "-" for v in card.quality]
        compared = [(METRICS[key], card.figure("after", key)) for key in ("top1_agreement", "kl")]
        rows.append(
            [
                card.number,
                Markdown(f"[{plain(card.folder)}]({link_target(card.folder)}/README.md)"),
                card.base,
                card.recipe,
                quality.label if quality else "not measured",
                *values,
                *(metric.format(value) if value is not None else "-" for metric, value in compared),
                *(format_bytes(size) if size is not None else "-" for size in card.size),
                code(card.record.reload),
            ]
        )
    header = ("", "card", "base model", "recipe", "metric", "original", "result", "top-1 agreement", "KL (nats)")
    return markdown_table([*header, "original weights", "weights", "reload"], rows)


def _pages(folder: Path) -> list[str]:
    """Return the list of techniques that are measured on pages, if the folder has one.

    ``pages.json`` is ``{technique: {"page", "record", "title", "why"}}`` with paths in the folder.
    """
    if not (folder / PAGES).exists():
        return []
    rows = []
    for name, entry in sorted(read_mapping(folder / PAGES).items()):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("page", "title", "why")):
            raise CheckpointError(f"{folder / PAGES}: {shown(name)} needs a page, a title and why, each a text")
        link = Markdown(f"[{plain(entry['title'].strip('`'))}]({link_target(entry['page'])})")
        rows.append([code(name), link, entry["why"]])
    return ["## Techniques on pages", PAGES_NOTE, markdown_table(["technique", "page", "why no card"], rows)]


def _draw(cards: Sequence[CardSummary], quality: ReportedMetric, folder: Path) -> str:
    """Draw the plot of one quality metric. Return its file name, or an empty string if there is nothing to compare."""
    from . import plots

    path = folder / f"{PLOT}_{quality.key}.png"
    series = comparable_points(cards, quality)
    if not series:
        path.unlink(missing_ok=True)  # of an earlier index
        return ""
    plots.plot_pareto(series, quality, path, "Quality against bytes")
    return path.name
