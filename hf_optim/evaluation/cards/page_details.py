"""The figures of one card within the page of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...recipes.contract import Reload
from ...trust.figures import format_bytes, format_count, format_seconds, format_share
from ...trust.html import Html, element, preformatted, with_code
from ...trust.text import link_target, one_line
from ..comparison import CARD_TITLES, column_titles, comparison_notes, comparison_rows
from ..reported import is_number, recipe_trains
from .sections import recipe_text
from .summary import CardSummary

NAMES_SHOWN = 8
# Of rows in one table and of notes: a card that is longer is read in its own file.
MOST_ROWS = 60


def details(card: CardSummary, place_id: str) -> Html:
    """Return the element that unfolds to what a card says, with links to its files."""
    record = card.record
    summary = element(
        "summary",
        element("span", str(card.number), class_="count"),
        element("span", card.folder, class_="title"),
        element("span", card.recipe, class_="made"),
    )
    home = link_target(card.folder)
    links = element(
        "p",
        element("a", "Model card", href=f"{home}/README.md"),
        " (README.md) · ",
        element("a", "record", href=f"{home}/hf_optim.json"),
        " (hf_optim.json) · ",
        element("a", "back to the table", href="#table"),
        class_="links",
    )
    parts = [
        links,
        None if record.finished else element("p", "Saved before its recipe was finished: training is not complete."),
        *_section("Results", _results(card)),
        *_section("Recipe", element("pre", preformatted(recipe_text(record)), tabindex="0", aria_label="Recipe")),
        *_section("Coverage", _coverage(card)),
        *_section("Reported by the steps", _steps(card)),
        *_section("Data", _data(card)),
        *_section("Stages", _stages(card)),
        *_section("Notes", _notes(card)),
    ]
    return element("details", summary, element("div", *parts, class_="body"), id=place_id, data_card=card.number)


def _section(title: str, content: Html | None) -> list[Html]:
    return [element("section", element("h3", title), content)] if content else []


def _table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> Html | None:
    """Return a table whose first column names its rows; None without rows."""
    listed = list(rows)[:MOST_ROWS]
    if not listed:
        return None
    head = element("tr", *(element("th", name, scope="col") if name else element("td") for name in header))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", value) for value in row[1:]))
        for row in listed
    ]
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, class_="scroll", tabindex="0", role="group", aria_label="Table")


def _results(card: CardSummary) -> Html | None:
    measured, trained = card.record.measured, recipe_trains(card.record.recipe)
    table = _table(column_titles(measured, CARD_TITLES), comparison_rows(measured, trained))
    if table is None:
        return element("p", "Not measured.")
    notes = [element("p", f"{note}.") for note in comparison_notes(measured, trained)]
    return element("div", table, *notes)


def _coverage(card: CardSummary) -> Html | None:
    rows = []
    for step, counted in card.record.coverage.items():
        skipped = [
            f"{reason}: {', '.join(names[:NAMES_SHOWN])}"
            + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
            for reason, names in counted.get("skipped", {}).items()
        ]
        touched, total, share = (counted[key] for key in ("weights_touched", "weights_total", "share"))
        rows.append((step, format_count(touched), format_count(total), format_share(share), "; ".join(skipped) or "-"))
    return _table(("step", "weights changed", "of", "share", "left alone"), rows)


def _steps(card: CardSummary) -> Html | None:
    rows = []
    for index, reported in sorted(card.record.steps.items(), key=lambda item: int(item[0])):
        label = f"step {int(index) + 1} ({one_line(reported.get('technique', ''), 60)})"
        for key, value in sorted(reported.items()):
            if key not in ("technique", "layer_metric") and isinstance(value, (int, float, str)):
                rows.append((label, key.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else value))
    return _table(("step", "metric", "value"), rows)


def _data(card: CardSummary) -> Html | None:
    record = card.record
    keys = ("dataset", "split", "samples", "seq_len", "tokens", "seed", "sha256")
    rows = []
    for use, data in (("calibration", record.calibration), ("evaluation", record.measured.get("evaluation") or {})):
        shown = [f"{key.replace('_', ' ')} {data[key]}" for key in keys[1:] if data.get(key) is not None]
        if data.get("dataset"):
            rows.append((use, data["dataset"], ", ".join(shown)))
    return _table(("use", "dataset", "settings"), rows)


def _stages(card: CardSummary) -> Html | None:
    rows = []
    for number, stage in enumerate(card.record.stages, 1):
        peak, seconds = stage.get("peak_memory_bytes"), stage.get("seconds")
        rows.append(
            (
                number,
                ", ".join(stage.get("steps", ())),
                stage.get("driver") or "-",
                format_seconds(float(seconds or 0)) if is_number(seconds) else "-",
                format_bytes(float(peak or 0)) if is_number(peak) else "-",
                stage.get("device") or "-",
            )
        )
    return _table(("stage", "steps", "driver", "time", "peak memory", "device"), rows)


def _notes(card: CardSummary) -> Html | None:
    level = Reload[card.record.reload]
    notes = [f"Loads as {level.value}.", *card.record.notes[:MOST_ROWS]]
    return element("ul", *(element("li", with_code(note)) for note in notes))
