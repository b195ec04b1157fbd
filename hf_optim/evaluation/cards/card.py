"""Model cards: the ``README.md`` of a checkpoint, rendered from its record."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...recipes.contract import Reload
from ...recipes.traits import Trait
from ...runs.record import Record
from ...trust.text import file_stem, link_target, one_line, paragraphs, plain, sentence
from ..reported import common_quality_metric, recipe_label, short_id
from . import sections
from .detached import run_detached
from .front_matter import front_matter
from .points import ORIGINAL, Point, bytes_differ, is_drawable, layers_differ, models_differ
from .result import Claim, Result
from .sections import markdown_table

CARD = "README.md"
PLOTS = "plots"


class Card:
    """The model card of a checkpoint.

    Steps add sections in their ``export`` hook. These are kept in ``record.sections``, so that the card can be rendered
    again from ``hf_optim.json`` alone.

    Attributes:
        record: the record to render.
        directory: the checkpoint, if there is one: its ``config.json`` names the class that loads it.
        name: the title; by default built from the base model and the recipe.
    """

    def __init__(self, record: Record, directory: Path | str | None = None, name: str | None = None) -> None:
        self.record = record
        self.directory = Path(directory) if directory is not None else None
        base = short_id(str(record.base_model.get("id") or "")) or "model"
        self.name = one_line(name or f"{base}: {recipe_label(record.recipe)}", 300)

    @property
    def result(self) -> Result:
        """The facts of the checkpoint that the card describes."""
        return Result(self.record, self.directory)

    # -- sections of steps ----------------------------------------------------------------------------------------
    def paragraph(self, title: str, markdown: str) -> None:
        """Add a paragraph, or replace the one with this title (a model may be saved more than once)."""
        self._add({"kind": "paragraph", "title": title, "markdown": markdown})

    def when(
        self,
        sentence: str,
        *,
        has: Iterable[Trait] = (),
        lacks: Iterable[Trait] = (),
        reload: Iterable[Reload] = (),
    ) -> str:
        """Return a sentence about the checkpoint, with a space before it, if it is true of the result; else "".

        A step knows what it did; how the weights are stored, loaded and computed depends on the steps after it, too.

        Args:
            sentence: Markdown for ``paragraph``.
            has: traits of the result under which the sentence is true.
            lacks: traits under which it is not.
            reload: the reload levels for which it is true; any if empty.
        """
        claim = Claim(sentence, frozenset(has), frozenset(lacks), frozenset(reload))
        return f" {sentence}" if claim.holds(self.result) else ""

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Add a table, or replace the one with this title. Cells are numbers or strings.

        Raises ``ValueError`` if a row has more or fewer cells than the header.
        """
        listed = [list(row) for row in rows]
        if any(len(row) != len(header) for row in listed):
            raise ValueError(f"table {title!r}: every row needs {len(header)} cells")
        self._add({"kind": "table", "title": title, "header": list(header), "rows": listed})

    def image(self, title: str, path: str | Path, alt: str) -> None:
        """Add an image file of the checkpoint, or replace the one with this title; ``alt`` describes what it shows.

        Raises ``ValueError`` if the path is outside the checkpoint.
        """
        place = Path(path)
        if place.is_absolute() and self.directory is not None and place.is_relative_to(self.directory):
            place = place.relative_to(self.directory)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"image {title!r}: {place} is outside the checkpoint")
        self._add({"kind": "figure", "title": title, "path": place.as_posix(), "alt": alt})

    def _add(self, section: dict[str, Any]) -> None:
        key = (section["kind"], section["title"])
        for i, known in enumerate(self.record.sections):
            if (known["kind"], known["title"]) == key:
                self.record.sections[i] = section
                return
        self.record.sections.append(section)

    # -- rendering ------------------------------------------------------------------------------------------------
    def render(self, plots: Sequence[tuple[str, str, str]] = ()) -> str:
        """Return the card as text; ``plots`` are ``(title, path in the checkpoint, alt text)``, drawn by ``write``."""
        record, result = self.record, self.result
        quality = [p for p in plots if p[0] == sections.QUALITY_PLOT]
        layers = [p for p in plots if p[0] != sections.QUALITY_PLOT]
        parts = [
            f"# {plain(self.name)}",
            sections.summary(record),
            "" if record.finished else sections.UNFINISHED,
            "## Results",
            sections.results(record),
            *(_image_link(path, alt) for _, path, alt in quality),
            "## How to load",
            sections.loading(result),
            "## Recipe",
            sections.recipe(record),
            sections.coverage(record),
            sections.step_metrics(record),
            *(f"**{plain(title)}**\n\n{_image_link(path, alt)}" for title, path, alt in layers),
            sections.STEPS_IN_MEMORY if record.sections else "",
            *map(_step_section, record.sections),
            f"## {sections.data_title(record)}",
            sections.calibration(record),
            "## How it was made",
            sections.stages(record),
            "## Limits",
            sections.limits(result),
            sections.papers(record),
            "## Versions",
            sections.package_versions(record),
        ]
        body = "\n\n".join(part.strip("\n") for part in parts if part)
        return f"---\n{front_matter(result, self.name)}---\n\n{body}\n"

    def write(self, directory: Path | str | None = None) -> Path:
        """Draw the plots and write ``README.md`` into a directory (default: the card's own); return the file.

        Raises ``ValueError`` if there is no directory, and ``CheckpointError`` if it cannot be written.
        """
        home = Path(directory) if directory is not None else self.directory
        if home is None:
            raise ValueError("this card has no directory: pass one to write()")
        path = home / CARD
        write_page(path, self.render(run_detached(self._draw_plots, home)))
        return path

    def _draw_plots(self, home: Path) -> list[tuple[str, str, str]]:
        """Draw the plots that tell something, and remove those of an earlier card that do not."""
        from . import plots

        drawn = []
        before, after = (self.record.measured.get(side, {}) for side in ("before", "after"))
        quality = common_quality_metric(before, after)
        plots.require_own_folder(home / PLOTS)
        if quality is not None and all(is_drawable(side.get("bytes_on_disk")) for side in (before, after)):
            path = f"{PLOTS}/quality_against_bytes.png"
            label = recipe_label(self.record.recipe)
            points = (
                Point(before["bytes_on_disk"], before[quality.key], ORIGINAL),
                Point(after["bytes_on_disk"], after[quality.key], label),
            )
            if bytes_differ(points) and models_differ(points, quality):
                plots.plot_quality_against_bytes(*points, quality, home / path, sections.evaluation_label(self.record))
                alt = f"{quality.label} against the bytes of the weights: the original and {label}"
                drawn.append((sections.QUALITY_PLOT, path, alt))
            else:
                (home / path).unlink(missing_ok=True)
        for index, technique, values, metric in plots.find_layer_values(self.record.steps):
            path = f"{PLOTS}/step_{int(index) + 1}_{file_stem(metric)}.png"
            title = f"Step {int(index) + 1} ({technique}): {metric} of each layer"
            if layers_differ(values.values()):
                plots.plot_layers(values, metric, home / path, title)
                drawn.append((title, path, f"{metric} of {len(values)} layers"))
            else:
                (home / path).unlink(missing_ok=True)
        return drawn


def write_page(path: Path, text: str) -> None:
    """Write a page in place of the file at ``path``; a link there is replaced, not followed.

    Raises ``CheckpointError``.
    """
    partial = path.with_name(f".{path.name}.writing")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def _image_link(path: str, alt: str) -> str:
    return f"![{plain(alt)}]({link_target(path)})"


def _step_section(section: dict[str, Any]) -> str:
    kind, title = section["kind"], plain(section["title"])
    if kind == "paragraph":
        return f"### {title}\n\n{paragraphs(section['markdown'])}"
    if kind == "table":
        rows = [[sentence(value) if isinstance(value, str) else value for value in row] for row in section["rows"]]
        return f"### {title}\n\n{markdown_table([sentence(name) for name in section['header']], rows)}"
    return f"### {title}\n\n{_image_link(section['path'], section['alt'])}"
