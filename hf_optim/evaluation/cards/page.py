"""The page of results of a folder of cards: one HTML file without outside requests, rendered from the records.

What is fixed is in ``static/``: the frame of the page, its style and its script. Everything else is built of elements
that escape what they hold (``trust/html.py``). The page's content security policy allows that one style and that one
script, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from string import Template

from ...trust.html import Html, element, join
from ...trust.text import file_stem
from ..reported import QUALITY_METRICS
from .page_details import details
from .page_plot import mark, plot
from .page_table import reading_notes, table
from .points import style_of
from .summary import CardSummary, comparable_points

# Of plots: a folder with cards of more base models is read in the table.
MOST_PLOTS = 40


def render_page(cards: Sequence[CardSummary]) -> str:
    """Return the page as text. The same records give the same bytes."""
    places = place_ids(cards)
    families = sorted({family for card in cards for family in card.families}, key=lambda f: (style_of(f), f))
    bases = sorted({card.base for card in cards})
    style, script = static("page.css"), static("page.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(static("page.html")).substitute(
        policy=policy,
        style=style,
        script=script,
        introduction=_introduction(cards, bases),
        controls=_controls(cards, families, bases),
        plots=_plots(cards, places),
        table=table(cards, places, families, bases),
        cards=join((details(card, places[card.number]) for card in cards), "\n"),
        notes=reading_notes(cards),
    )


def place_ids(cards: Sequence[CardSummary]) -> dict[int, str]:
    """Return for each number of a card the id of its place in the page, which is part of its address."""
    taken: Counter[str] = Counter()
    found = {}
    for card in cards:
        name = f"card-{file_stem(card.folder)}"
        taken[name] += 1
        found[card.number] = name if taken[name] == 1 else f"{name}--{taken[name]}"
    return found


@cache
def static(name: str) -> str:
    """Return a file of ``static/``."""
    return resources.files(__package__).joinpath("static", name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _introduction(cards: Sequence[CardSummary], bases: Sequence[str]) -> Html:
    made = f"{_count(len(cards), 'checkpoint')} made with hf_optim from {_count(len(bases), 'base model')}."
    rest = " Every figure is measured and comes from the record beside its card, "
    how = " renders this page from these records."
    code = [element("code", text) for text in ("hf_optim.json", "hf-optim card FOLDER")]
    return element("p", made, rest, code[0], ". ", code[1], how, class_="introduction")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _controls(cards: Sequence[CardSummary], families: Sequence[str], bases: Sequence[str]) -> Html:
    chips = []
    for index, family in enumerate(families):
        count = sum(family in card.families for card in cards)
        box = element("input", type="checkbox", name="family", value=index)
        chips.append(element("label", box, mark(family), family, " ", element("span", str(count), class_="count")))
    options = [element("option", f"all {len(bases)}" if len(bases) > 1 else "all", value="")]
    options += [element("option", base, value=index) for index, base in enumerate(bases)]
    hint = "name, recipe, format"
    search = element("input", type="search", name="words", autocomplete="off", spellcheck="false", placeholder=hint)
    return element(
        "form",
        element("fieldset", element("legend", "Family"), element("div", *chips, class_="chips"), class_="families"),
        element("label", element("span", "Base model"), element("select", *options, name="base"), class_="field"),
        element("label", element("span", "Search"), search, class_="field"),
        element("button", "Clear", type="reset"),
        id="controls",
        role="search",
        aria_label="Filter the cards",
        hidden=True,
    )


def _plots(cards: Sequence[CardSummary], places: Mapping[int, str]) -> Html:
    known = {card.number: (card, places[card.number]) for card in cards}
    figures = [
        plot(series, points, metric, known)
        for metric in QUALITY_METRICS
        for series, points in comparable_points(cards, metric).items()
    ]
    if not figures:
        return Html("")
    more = len(figures) - MOST_PLOTS
    return element(
        "section",
        element("h2", "Quality against bytes", id="plots-title"),
        element("div", *figures[:MOST_PLOTS], class_="plots"),
        element("p", f"{_count(more, 'further plot')} not shown.") if more > 0 else None,
        aria_labelledby="plots-title",
    )
