"""The index of a folder of model cards: one table and one plot of all of them, rendered from their records."""

from __future__ import annotations

from pathlib import Path

from ...errors import CheckpointError
from ...runs.record import FILE_NAME, Record
from ...trust.text import Markdown, code, link_target, plain
from ..reported import QUALITY_METRICS, ReportedMetric, format_bytes, is_number, recipe_label, short_id
from .card import write_page
from .sections import evaluation_label, markdown_table

PLOT = "quality_against_bytes"
INTRODUCTION = (
    "Checkpoints made with hf_optim. Every number is measured and comes from the `hf_optim.json` beside its card. "
    "`hf-optim card` renders this page from those files."
)


def render_index(folder: Path | str) -> str:
    """Write the ``README.md`` of a folder of cards, with its plots; return the text.

    Raises ``CheckpointError`` if no sub-folder has a record, or if one cannot be read.
    """
    folder = Path(folder)
    cards = [(path.parent.name, Record.read(path.parent)) for path in sorted(folder.glob(f"*/{FILE_NAME}"))]
    if not cards:
        raise CheckpointError(f"no folder in {folder} has a {FILE_NAME}")
    parts = ["# Model cards", INTRODUCTION, _table(cards)]
    for metric in QUALITY_METRICS:
        name = _draw(cards, metric, folder)
        if name:
            parts.append(f"![{metric.label} against the bytes of the weights, for each card]({name})")
    text = "\n\n".join(parts) + "\n"
    write_page(folder / "README.md", text)
    return text


def _table(cards: list[tuple[str, Record]]) -> str:
    rows = []
    for name, record in cards:
        before, after = (record.measured.get(side, {}) for side in ("before", "after"))
        quality = next((m for m in QUALITY_METRICS if is_number(after.get(m.key))), None)
        rows.append(
            [
                Markdown(f"[{plain(name)}]({link_target(name)}/README.md)"),
                short_id(str(record.base_model.get("id") or "-")),
                recipe_label(record.recipe),
                quality.label if quality else "not measured",
                quality.format(before[quality.key]) if quality and is_number(before.get(quality.key)) else "-",
                quality.format(after[quality.key]) if quality else "-",
                f"{after['top1_agreement']:.2%}" if is_number(after.get("top1_agreement")) else "-",
                f"{after['kl']:.5f}" if is_number(after.get("kl")) else "-",
                *(
                    format_bytes(m["bytes_on_disk"]) if is_number(m.get("bytes_on_disk")) else "-"
                    for m in (before, after)
                ),
                code(record.reload),
            ]
        )
    header = ("card", "base model", "recipe", "metric", "original", "result", "top-1 agreement", "KL (nats)")
    return markdown_table([*header, "original weights", "weights", "reload"], rows)


def _draw(cards: list[tuple[str, Record]], quality: ReportedMetric, folder: Path) -> str:
    """Draw the plot of one quality metric. Return its file name, or an empty string if no card has the metric."""
    from . import plots

    points: dict[tuple[float, float, str, str], plots.Point] = {}
    for _, record in cards:
        series = evaluation_label(record)
        for side, label in (("before", "original"), ("after", recipe_label(record.recipe))):
            measured = record.measured.get(side, {})
            if plots.is_drawable(measured.get("bytes_on_disk")) and plots.is_drawable(
                measured.get(quality.key), signed=True
            ):
                point = plots.Point(measured["bytes_on_disk"], measured[quality.key], label, series)
                # The cards of one model share its original: it is one point.
                points.setdefault((point.bytes, round(point.quality, 4), label, series), point)
    if not points:
        return ""
    name = f"{PLOT}_{quality.key}.png"
    plots.plot_pareto(list(points.values()), quality, folder / name, "Quality against bytes")
    return name
