"""The table of the page of results: one row for each card, in columns that have a figure in at least one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ...recipes.contract import Reload
from ...trust.html import Html, breakable, element
from ..comparison import NOISE
from ..reported import REPORTED_METRICS, format_bytes
from ..timings import SPREAD, is_hidden_by_noise
from .page_plot import mark
from .summary import CardSummary


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        group: the heading above that of the column.
        label: its heading.
        number: returns the figure of a card that it sorts by, or None.
        shown: returns the text of that figure.
        note: what it is, for the notes below the table; empty if the heading says it.
    """

    group: str
    label: str
    number: Callable[[CardSummary], float | None]
    shown: Callable[[CardSummary, float], str]
    note: str = ""


def _bytes(card: CardSummary, value: float) -> str:
    return format_bytes(value)


def _quality(card: CardSummary, value: float) -> str:
    return card.metric.format(value) if card.metric else ""


def _fixed(form: str) -> Callable[[CardSummary, float], str]:
    return lambda card, value: form.format(value)


def _metric(key: str, side: str = "after") -> dict[str, Any]:
    """Return the figures of a reported metric and their form, for a ``Column``."""
    form = next(metric.format for metric in REPORTED_METRICS if metric.key == key)
    return {"number": lambda card: card.figure(side, key), "shown": lambda card, value: form(value)}


def _time(side: str) -> dict[str, Any]:
    """Return the milliseconds per token on a side, half their interquartile range, and if a difference is noise."""
    key = "ms_per_token"

    def number(card: CardSummary) -> float | None:
        return card.figure(side, key)

    def shown(card: CardSummary, value: float) -> str:
        spread = card.figure(side, SPREAD[key])
        noise = f" ({NOISE})" if is_hidden_by_noise(card.record.measured, side, key) else ""
        return f"{value:.2f}" + (f" ± {spread / 2:.2f}" if spread is not None else "") + noise

    return {"number": number, "shown": shown}


QUALITY, COMPARED, WEIGHTS, TIME = "quality", "against the original", "weights on disk", "ms per token"
COLUMNS = (
    Column(QUALITY, "original", lambda c: c.quality[0], _quality),
    Column(QUALITY, "result", lambda c: c.quality[1], _quality),
    Column(
        QUALITY,
        "change",
        lambda c: c.change,
        _fixed("{:+.1f} %"),
        "Of the quality metric, in percent of the original's. A higher perplexity is worse, a higher accuracy better.",
    ),
    Column(
        COMPARED,
        "agreement",
        note="Share of the positions at which original and result rate the same token or class highest.",
        **_metric("top1_agreement"),
    ),
    Column(
        COMPARED,
        "KL",
        note="Divergence of the result's distribution from the original's: nats per position. 0 is equal.",
        **_metric("kl"),
    ),
    Column(WEIGHTS, "original", lambda c: c.size[0], _bytes),
    Column(WEIGHTS, "result", lambda c: c.size[1], _bytes),
    Column(WEIGHTS, "ratio", lambda c: c.ratio, _fixed("{:.2f}"), "How many times smaller the weights are."),
    Column(
        WEIGHTS,
        "bits",
        lambda c: c.bits,
        _fixed("{:.2f}"),
        "On disk for each parameter of the original, with scales and with all that was left alone, such as embeddings.",
    ),
    Column(TIME, "original", **_time("before")),
    Column(
        TIME,
        "result",
        note="Milliseconds per token of greedy decoding at batch 1, in stock transformers: the median, with half the "
        "interquartile range where several rounds were timed.",
        **_time("after"),
    ),
    Column(TIME, "on kernels", note="The result on the kernels of hf_optim.", **_time("accelerated")),
)


def table(
    cards: Sequence[CardSummary], places: Mapping[int, str], families: Sequence[str], bases: Sequence[str]
) -> Html:
    """Return the table; cards are in the order of their numbers.

    Args:
        places: by number of a card, the id of its details in the page.
        families, bases: all families and base models, in the order of the filters.
    """
    columns = _columns(cards)
    metrics = {card.metric.label for card in cards if card.metric}
    one_metric = next(iter(metrics)) if len(metrics) == 1 else ""
    rows = [_row(card, places[card.number], columns, families, bases, bool(one_metric)) for card in cards]
    return element(
        "table",
        element("caption", f"{len(cards)} cards", class_="unseen"),
        element("thead", *_header(columns, one_metric)),
        element("tbody", *rows),
        id="table",
    )


def reading_notes(cards: Sequence[CardSummary]) -> Html:
    """Return what the columns mean, and the levels at which transformers loads the checkpoints."""
    levels = [level for level in Reload if any(card.record.reload == level.name for card in cards)]
    terms = [(f"{c.group}: {c.label}", c.note) for c in _columns(cards) if c.note]
    terms += [(f"loads as: {_level(level.name)}", f"{level.value[:1].upper()}{level.value[1:]}.") for level in levels]
    pairs = [element("div", element("dt", term), element("dd", note)) for term, note in terms]
    return element("dl", *pairs)


def _columns(cards: Sequence[CardSummary]) -> list[Column]:
    return [column for column in COLUMNS if any(column.number(card) is not None for card in cards)]


def _level(name: str) -> str:
    return name.lower().replace("_", " ")


def _header(columns: Sequence[Column], metric: str) -> list[Html]:
    """Return two rows: groups of columns, and their columns. ``metric``: the one that all cards have, or empty."""
    texts = ["card", "base model", "recipe", "family", *([] if metric else ["metric"])]
    top = [_head("no.", "number", rowspan=2, class_="n")]
    top += [_head(text, "text", rowspan=2, class_="name" if text == "card" else None) for text in texts]
    below = []
    for group, members in groupby(columns, key=lambda column: column.group):
        listed = list(members)
        title = metric if metric and group == QUALITY else group
        top.append(element("th", element("span", title), scope="colgroup", colspan=len(listed), class_="group"))
        below += [
            _head(column.label, "number", class_="n first" if i == 0 else "n", aria_label=f"{title}: {column.label}")
            for i, column in enumerate(listed)
        ]
    top.append(_head("loads as", "text", rowspan=2, class_="last"))
    return [element("tr", *top), element("tr", *below)]


def _head(text: str, kind: str, **attributes: object) -> Html:
    return element("th", text, scope="col", data_sort=kind, **attributes)


def _row(
    card: CardSummary, place: str, columns: Sequence[Column], families: Sequence[str], bases: Sequence[str], one: bool
) -> Html:
    cells = [
        element("td", str(card.number), class_="n count", data_v=card.number),
        element("th", element("a", breakable(card.folder), href=f"#{place}"), scope="row", class_="name"),
        element("td", breakable(card.base), class_="base"),
        element("td", breakable(card.recipe), class_="recipe"),
        element("td", *(element("span", mark(family), family) for family in card.families), class_="families"),
    ]
    if not one:
        cells.append(element("td", card.metric.label) if card.metric else _missing("not measured"))
    group = ""
    for column in columns:
        value = column.number(card)
        first = " first" if column.group != group else ""
        group = column.group
        if value is None:
            cells.append(_missing("not measured", f"n{first}"))
        else:
            cells.append(element("td", column.shown(card, value), class_=f"n{first}", data_v=repr(float(value))))
    unfinished = None if card.record.finished else element("span", " unfinished", class_="warning")
    cells.append(element("td", _level(card.record.reload), unfinished, class_="last"))
    return element(
        "tr",
        *cells,
        data_card=card.number,
        data_families=" ".join(str(families.index(family)) for family in card.families),
        data_base=bases.index(card.base),
    )


def _missing(text: str, class_: str = "") -> Html:
    dash, words = element("span", "–", aria_hidden="true"), element("span", text, class_="unseen")
    return element("td", dash, words, class_=f"{class_} missing".strip(), data_v="")
