"""Model cards: the ``README.md`` of a checkpoint, rendered from its record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...runs.record import Record
from ..reported import common_quality_metric, recipe_label, short_id
from . import sections
from .front_matter import front_matter
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
        self.name = name or f"{base}: {recipe_label(record.recipe)}"

    # -- sections of steps ----------------------------------------------------------------------------------------
    def paragraph(self, title: str, markdown: str) -> None:
        """Add a paragraph, or replace the one with this title (a model may be saved more than once)."""
        self._add({"kind": "paragraph", "title": title, "markdown": markdown})

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
        record = self.record
        quality = [p for p in plots if p[0] == sections.QUALITY_PLOT]
        layers = [p for p in plots if p[0] != sections.QUALITY_PLOT]
        parts = [
            f"# {self.name}",
            sections.summary(record),
            "" if record.finished else sections.UNFINISHED,
            "## Results",
            sections.results(record),
            *(_image_link(path, alt) for _, path, alt in quality),
            "## How to load",
            sections.loading(record, self.model_class()),
            "## Recipe",
            sections.recipe(record),
            sections.coverage(record),
            sections.step_metrics(record),
            *(f"**{title}**\n\n{_image_link(path, alt)}" for title, path, alt in layers),
            *map(_step_section, record.sections),
            "## Calibration data",
            sections.calibration(record),
            "## How it was made",
            sections.stages(record),
            "## Limits",
            sections.limits(record),
            sections.papers(record),
            "## Versions",
            sections.package_versions(record),
        ]
        body = "\n\n".join(part.strip("\n") for part in parts if part)
        return f"---\n{front_matter(record, self.name, self.model_class())}---\n\n{body}\n"

    def write(self, directory: Path | str | None = None) -> Path:
        """Draw the plots and write ``README.md`` into a directory (default: the card's own); return the file.

        Raises ``ValueError`` if there is no directory.
        """
        home = Path(directory) if directory is not None else self.directory
        if home is None:
            raise ValueError("this card has no directory: pass one to write()")
        path = home / CARD
        path.write_text(self.render(self._draw_plots(home)), encoding="utf-8")
        return path

    def model_class(self) -> str:
        """Return the class that loads the checkpoint, from its ``config.json`` or else that of the base model."""
        if self.directory is not None and (self.directory / "config.json").is_file():
            config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
            if config.get("architectures"):
                return str(config["architectures"][0])
        return str(self.record.base_model.get("class") or "")

    def _draw_plots(self, home: Path) -> list[tuple[str, str, str]]:
        from . import plots

        drawn = []
        before, after = (self.record.measured.get(side, {}) for side in ("before", "after"))
        quality = common_quality_metric(before, after)
        if quality is not None and before.get("bytes_on_disk") and after.get("bytes_on_disk"):
            path = f"{PLOTS}/quality_against_bytes.png"
            label = recipe_label(self.record.recipe)
            plots.plot_quality_against_bytes(
                plots.Point(before["bytes_on_disk"], before[quality.key], "original"),
                plots.Point(after["bytes_on_disk"], after[quality.key], label),
                quality,
                home / path,
                sections.evaluation_label(self.record),
            )
            alt = f"{quality.label} against the bytes of the weights: the original and {label}"
            drawn.append((sections.QUALITY_PLOT, path, alt))
        for index, technique, values, metric in plots.find_layer_values(self.record.steps):
            path = f"{PLOTS}/step_{int(index) + 1}_{metric.replace(' ', '_')}.png"
            title = f"Step {int(index) + 1} ({technique}): {metric} of each layer"
            plots.plot_layers(values, metric, home / path, title)
            drawn.append((title, path, f"{metric} of {len(values)} layers"))
        return drawn


def _image_link(path: str, alt: str) -> str:
    return f"![{alt.replace('[', '(').replace(']', ')')}]({path})"


def _step_section(section: dict[str, Any]) -> str:
    kind, title = section["kind"], section["title"]
    if kind == "paragraph":
        return f"### {title}\n\n{section['markdown']}"
    if kind == "table":
        return f"### {title}\n\n{markdown_table(section['header'], section['rows'])}"
    return f"### {title}\n\n{_image_link(section['path'], section['alt'])}"
