"""What a step adds to the card of a finished run: its paragraphs and tables, by title."""

from __future__ import annotations

from pathlib import Path

from hf_optim import run_of


class Sections:
    """Takes the place of a card and keeps what a step adds."""

    def __init__(self):
        self.paragraphs, self.tables, self.images = {}, {}, {}

    def paragraph(self, title, markdown):
        self.paragraphs[title] = markdown

    def when(self, sentence, **conditions):
        return f" {sentence}"

    def table(self, title, header, rows):
        self.tables[title] = [list(header), *(list(row) for row in rows)]

    def image(self, title, path, alt):
        self.images[title] = (path, alt)


def exported(model, step: int = 0) -> Sections:
    """Return the sections that a step of the model's recipe adds."""
    run, sections = run_of(model), Sections()
    run.recipe.steps[step].export(run, Path("unused"), sections)
    return sections
