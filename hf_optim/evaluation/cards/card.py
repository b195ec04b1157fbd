"""Model cards: ``README.md`` of a checkpoint, rendered from its record and never typed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...runs.record import Record
from ..reported import quality_of, recipe_label, short_id
from . import sections as text
from .front_matter import front_matter
from .index import render_index
from .sections import markdown_table

CARD = "README.md"
PLOTS = "plots"

__all__ = ["Card", "render_index"]


class Card:
    """The model card of a checkpoint.

    Steps add to it in their ``export`` hook; what they add is kept in ``record.sections``, so that the card can be
    rendered again from ``hf_optim.json`` alone.

    Attributes:
        record: what is rendered.
        directory: the checkpoint, where there is one: its ``config.json`` names the class that loads it.
        name: the title; by default made of the base model and the recipe.
    """

    def __init__(self, record: Record, directory: Path | str | None = None, name: str | None = None) -> None:
        self.record = record
        self.directory = Path(directory) if directory is not None else None
        base = short_id(str(record.base_model.get("id") or "")) or "model"
        self.name = name or f"{base}: {recipe_label(record.recipe)}"

    # -- what steps add -------------------------------------------------------------------------------------------
    def paragraph(self, title: str, markdown: str) -> None:
        """Add a paragraph. One of the same title is replaced, since a model may be saved more than once."""
        self._add({"kind": "paragraph", "title": title, "markdown": markdown})

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Add a table. Cells are numbers or strings."""
        listed = [list(row) for row in rows]
        if any(len(row) != len(header) for row in listed):
            raise ValueError(f"table {title!r}: every row needs {len(header)} cells")
        self._add({"kind": "table", "title": title, "header": list(header), "rows": listed})

    def image(self, title: str, path: str | Path, alt: str) -> None:
        """Add a picture that lies in the checkpoint, by its path there; ``alt`` says what it shows."""
        place = Path(path)
        if place.is_absolute() and self.directory is not None and place.is_relative_to(self.directory):
            place = place.relative_to(self.directory)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"figure {title!r}: {place} does not lie in the checkpoint")
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
        """The card as text. ``plots`` are ``(title, path in the checkpoint, what it shows)``; ``write`` draws them."""
        record = self.record
        quality = [p for p in plots if p[0] == text.QUALITY_PLOT]
        layers = [p for p in plots if p[0] != text.QUALITY_PLOT]
        sections = [
            f"# {self.name}",
            text.sentence(record),
            "" if record.finished else text.UNFINISHED,
            "## Results",
            text.results(record),
            *(_picture(path, alt) for _, path, alt in quality),
            "## How to load",
            text.loading(record, self.model_class()),
            "## Recipe",
            text.recipe(record),
            text.coverage(record),
            text.step_figures(record),
            *(f"**{title}**\n\n{_picture(path, alt)}" for title, path, alt in layers),
            *map(_section, record.sections),
            "## Calibration data",
            text.calibration(record),
            "## How it was made",
            text.stages(record),
            "## Limits",
            text.limits(record),
            text.papers(record),
            "## Versions",
            text.package_versions(record),
        ]
        body = "\n\n".join(part.strip("\n") for part in sections if part)
        return f"---\n{front_matter(record, self.name, self.model_class())}---\n\n{body}\n"

    def write(self, directory: Path | str | None = None) -> Path:
        """Draw the plots and write ``README.md`` into a directory (its own by default). Returns the file."""
        home = Path(directory) if directory is not None else self.directory
        if home is None:
            raise ValueError("a card without a directory needs one to be written to")
        path = home / CARD
        path.write_text(self.render(self._draw(home)), encoding="utf-8")
        return path

    def model_class(self) -> str:
        """The class that loads the checkpoint: of its ``config.json``, else of the base model."""
        if self.directory is not None and (self.directory / "config.json").is_file():
            config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
            if config.get("architectures"):
                return str(config["architectures"][0])
        return str(self.record.base_model.get("class") or "")

    def _draw(self, home: Path) -> list[tuple[str, str, str]]:
        from . import plots

        drawn = []
        before, after = (self.record.measured.get(side, {}) for side in ("before", "after"))
        quality = quality_of(before, after)
        if quality is not None and before.get("bytes_on_disk") and after.get("bytes_on_disk"):
            path = f"{PLOTS}/quality_against_bytes.png"
            label = recipe_label(self.record.recipe)
            plots.quality_against_bytes(
                plots.Point(before["bytes_on_disk"], before[quality.key], "original"),
                plots.Point(after["bytes_on_disk"], after[quality.key], label),
                quality,
                home / path,
                text.measured_on(self.record),
            )
            alt = f"{quality.label} against the bytes of the weights: the original and {label}"
            drawn.append((text.QUALITY_PLOT, path, alt))
        for position, technique, values, metric in plots.layer_plots(self.record.steps):
            path = f"{PLOTS}/step_{int(position) + 1}_{metric.replace(' ', '_')}.png"
            title = f"Step {int(position) + 1} ({technique}): {metric} of each layer"
            plots.layers(values, metric, home / path, title)
            drawn.append((title, path, f"{metric} of {len(values)} layers"))
        return drawn


def _picture(path: str, alt: str) -> str:
    return f"![{alt.replace('[', '(').replace(']', ')')}]({path})"


def _section(section: dict[str, Any]) -> str:
    kind, title = section["kind"], section["title"]
    if kind == "paragraph":
        return f"### {title}\n\n{section['markdown']}"
    if kind == "table":
        return f"### {title}\n\n{markdown_table(section['header'], section['rows'])}"
    return f"### {title}\n\n{_picture(section['path'], section['alt'])}"
