"""The parts of a model card as text, each a function of the record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from ...data.tasks import Task, task_of
from ...recipes.config import KEYS
from ...recipes.contract import Paper, Reload
from ...recipes.traits import MOE, QUANTIZED, SPARSE, SPARSE_NM
from ...runs.record import Record
from ..reported import REPORTED_METRICS, bytes_text, change, is_number, recipe_label, short_id
from .front_matter import evaluation_name, is_hub_id, spec_of

QUALITY_PLOT = "Quality against bytes"
UNFINISHED = "> This checkpoint is from the middle of its recipe: training is not finished."
NOT_MEASURED = (
    "Not measured: no evaluation data was given. `hf-optim eval` measures a checkpoint, and `hf-optim compress --eval` "
    "puts the figures here."
)
NAMES_SHOWN = 8


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; every column after the first is aligned to the right when all its cells begin with a digit or sign."""
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [all(_numeric(row[i]) for row in cells) and bool(cells) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(line) + " |" for line in ([_cell(h) for h in header], rule, *cells))


def _cell(value: Any) -> str:
    written = f"{value:.6g}" if isinstance(value, float) else str(value)
    return written.replace("|", "\\|").replace("\n", " ")


def _numeric(cell: str) -> bool:
    return not cell or cell == "-" or cell.lstrip("+-").replace(",", "")[:1].isdigit()


# -- results ----------------------------------------------------------------------------------------------------------


def measured_on(record: Record) -> str:
    """``"babyllama-1m on eval.jsonl"``."""
    data = evaluation_name(record)
    return short_id(str(record.base_model.get("id") or "model")) + (f" on {data}" if data else "")


def sentence(record: Record) -> str:
    """What the checkpoint is, in one sentence."""
    base = str(record.base_model.get("id") or "a model")
    link = f"[`{base}`](https://huggingface.co/{base})" if is_hub_id(base) else f"`{base}`"
    size = ""
    if is_number(record.base_model.get("parameters")):
        size = f" ({record.base_model['parameters']:,} parameters in {record.base_model.get('dtype', 'float')})"
    parts = [f"{link}{size}, made cheaper to run with hf_optim: {recipe_label(record.recipe)}"]
    before, after = (record.measured.get(side, {}) for side in ("before", "after"))
    if is_number(before.get("bytes_on_disk")) and is_number(after.get("bytes_on_disk")):
        parts.append(f"{bytes_text(before['bytes_on_disk'])} of weights became {bytes_text(after['bytes_on_disk'])}")
    return "; ".join(parts) + "."


def results(record: Record) -> str:
    """The table before against after. Quality that nobody measured is said to be not measured."""
    before, after = (record.measured.get(side, {}) for side in ("before", "after"))
    rows = []
    for figure in REPORTED_METRICS:
        old, new = before.get(figure.key), after.get(figure.key)
        if is_number(old) or is_number(new):
            written = [figure.write(v) if is_number(v) else "-" for v in (old, new)]
            rows.append([figure.label, *written, change(figure, old, new)])
    measured = any(is_number(after.get(f.key)) for f in REPORTED_METRICS if f.metric)
    table = markdown_table(["", "original", "this checkpoint", "change"], rows) if rows else ""
    return "\n\n".join(part for part in (table, _conditions(record) if measured else NOT_MEASURED) if part)


def _conditions(record: Record) -> str:
    before, after = (record.measured.get(side, {}) for side in ("before", "after"))
    said = []
    evaluation = record.measured.get("evaluation", {})
    if evaluation:
        amount = f", {evaluation['samples']} samples" if evaluation.get("samples") else ""
        length = f" of {evaluation['seq_len']} tokens" if evaluation.get("seq_len") else ""
        split = f", split {evaluation['split']}" if evaluation.get("split") and is_hub_id(evaluation["dataset"]) else ""
        said.append(f"Measured on {evaluation_name(record)}{split}{amount}{length}")
        if is_number(after.get("tokens")):
            said[-1] += f" ({after['tokens']:,} tokens scored)"
    if after.get("device"):
        other = before.get("device")
        where = f"on {after['device']}"
        where += f" (the original on {other})" if other and other != after["device"] else ""
        said.append(f"Both sides ran {where} with plain transformers")
    if after.get("peak_memory_of"):
        said.append(f"Peak memory is that of the {after['peak_memory_of']}, loading included")
    return ". ".join(said) + "." if said else ""


# -- loading ----------------------------------------------------------------------------------------------------------


def loading(record: Record, class_name: str) -> str:
    """The snippet that is right for the reload level."""
    task = task_of(class_name)
    level = Reload[record.reload]
    parts = [f"{level.value[0].upper()}{level.value[1:]}."]
    trust = ", trust_remote_code=True" if level is Reload.REMOTE_CODE else ""
    parts.append(_code(_stock_snippet(task, trust)))
    if level is Reload.REMOTE_CODE:
        parts.append("With hf_optim installed, `import hf_optim` does instead of `trust_remote_code`.")
    if str(QUANTIZED) in record.traits and level is Reload.STOCK_FORMAT:
        parts.append("To run it compressed, on hf_optim's kernels:")
        parts.append(
            _code(
                "import hf_optim\n"
                f"from transformers import {task.auto_class}\n\n"
                f'model = {task.auto_class}.from_pretrained(checkpoint, optim_config="auto")'
            )
        )
    return "\n\n".join(parts)


def _stock_snippet(task: Task, trust: str) -> str:
    processor = "AutoImageProcessor" if task.tag.startswith("image-class") else "AutoTokenizer"
    return (
        f"from transformers import {', '.join(sorted((task.auto_class, processor)))}\n\n"
        'checkpoint = "..."  # this repository, or the folder it was downloaded to\n'
        f"model = {task.auto_class}.from_pretrained(checkpoint{trust})\n"
        f"{'processor' if processor == 'AutoImageProcessor' else 'tokenizer'} = {processor}.from_pretrained(checkpoint)"
    )


def _code(source: str, language: str = "python") -> str:
    return f"```{language}\n{source.rstrip()}\n```"


# -- what was done ----------------------------------------------------------------------------------------------------


def recipe(record: Record) -> str:
    """The recipe as YAML, in the order of recipe files (the record's JSON is sorted)."""
    shown = {key: record.recipe[key] for key in KEYS if key in record.recipe}
    shown["steps"] = [dict(sorted(s.items(), key=_technique_first)) for s in shown.get("steps", ())]
    if shown.get("calibration", {}).get("dataset") and record.calibration.get("dataset"):
        # The recipe may name a path of the machine it ran on; the record of the data has the public name.
        shown["calibration"] = {**shown["calibration"], "dataset": record.calibration["dataset"]}
    return _code(yaml.safe_dump(shown, sort_keys=False), "yaml")


def _technique_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] != "technique", item[0]


def coverage(record: Record) -> str:
    """How many weights each step touched, and what it left out for what reason."""
    if not record.coverage:
        return ""
    rows, skipped = [], []
    for step, counted in record.coverage.items():
        rows.append(
            [
                step,
                f"{counted['weights_touched']:,}",
                f"{counted['weights_total']:,}",
                f"{100 * counted['share']:.2f} %",
            ]
        )
        for reason, names in counted.get("skipped", {}).items():
            listed = ", ".join(f"`{name}`" for name in names[:NAMES_SHOWN])
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            skipped.append(f"- {step} left out {len(names)}: {reason} ({listed}{more})")
    table = markdown_table(["step", "weights touched", "of", "share"], rows)
    return "### Coverage\n\n" + table + ("\n\n" + "\n".join(skipped) if skipped else "")


def step_figures(record: Record) -> str:
    """The numbers and words that steps reported; what they report per layer is drawn instead."""
    rows = []
    for position, figures in sorted(record.steps.items()):
        label = f"step {int(position) + 1} ({figures.get('technique', '')})"
        for key, value in sorted(figures.items()):
            if key not in ("technique", "layer_metric") and isinstance(value, (int, float, str)):
                rows.append([label, key.replace("_", " "), value])
    return "### Figures of the steps\n\n" + markdown_table(["step", "figure", "value"], rows) if rows else ""


def calibration(record: Record) -> str:
    """Which data the steps saw, with its hash."""
    if not record.calibration:
        return "None: no step of this recipe looks at data."
    order = ("dataset", "split", "text_column", "image_column", "samples", "seq_len", "tokens", "seed", "sha256")
    found = [(key, record.calibration[key]) for key in order if record.calibration.get(key) is not None]
    rows = [
        [key.replace("_", " "), f"{v:,}" if key == "tokens" else f"`{v}`" if key == "sha256" else v] for key, v in found
    ]
    return markdown_table(["", "value"], rows) + "\n\nThe hash is over the model inputs (token ids), in order."


def stages(record: Record) -> str:
    """The stages, with seconds and peak memory."""
    if not record.stages:
        return "No stage was recorded."
    rows = []
    for number, stage in enumerate(record.stages, 1):
        peak = stage.get("peak_memory_bytes")
        memory = ", ".join(filter(None, (bytes_text(peak), stage.get("peak_memory_of")))) if peak else "-"
        rows.append(
            [
                number,
                ", ".join(stage.get("steps", ())),
                stage.get("driver") or "-",
                f"{stage['seconds']:.1f}" if is_number(stage.get("seconds")) else "-",
                memory,
                stage.get("device") or "-",
            ]
        )
    return markdown_table(["stage", "steps", "driver", "seconds", "peak memory", "device"], rows)


def limits(record: Record) -> str:
    """What the reader must not expect, and the notes of the run."""
    said = list(record.notes)
    traits = set(record.traits)
    if str(QUANTIZED) in traits and record.reload == Reload.STOCK_FORMAT.name:
        said.append(
            "Plain transformers decompresses the weights at the first forward: the checkpoint is smaller on disk, "
            'but there it is neither faster nor smaller in memory. `optim_config="auto"` runs it compressed.'
        )
    if str(SPARSE) in traits and str(SPARSE_NM) not in traits and str(QUANTIZED) not in traits:
        said.append(
            "Zeros are stored and multiplied like other numbers: alone, this sparsity saves neither bytes nor time."
        )
    if str(SPARSE_NM) in traits and str(QUANTIZED) not in traits:
        said.append("The N:M zeros are stored; they save time only on kernels that skip them.")
    if str(MOE) in traits:
        said.append("All experts are held in memory; only those that a token is routed to are computed.")
    if record.calibration.get("dataset"):
        said.append(f"Calibrated on {record.calibration['dataset']}; text of other kinds may lose more.")
    if any(is_number(record.measured.get("after", {}).get(f.key)) for f in REPORTED_METRICS if f.metric):
        said.append(
            f"Measured on {evaluation_name(record) or 'one dataset'} alone; nothing else was evaluated, "
            "and what is known of the original's biases and risks holds here too."
        )
    else:
        said.append("Nothing was evaluated: the loss against the original is not known.")
    return "\n".join(f"- {line}" for line in said)


def papers(record: Record) -> str:
    """The papers of the techniques, with BibTeX."""
    found: dict[str, Paper] = {}
    for step in record.recipe.get("steps", ()):
        spec = spec_of(step)
        if spec is not None and spec.paper is not None:
            found.setdefault(spec.name, spec.paper)
    if not found:
        return ""
    lines = [f"- {name}: [{paper.title}]({paper.url}) ({paper.year})" for name, paper in found.items()]
    entries = [
        f"@misc{{{name},\n  title = {{{paper.title}}},\n  year = {{{paper.year}}},\n  url = {{{paper.url}}}\n}}"
        for name, paper in found.items()
    ]
    return "## Papers\n\n" + "\n".join(lines) + "\n\n" + _code("\n\n".join(entries), "bibtex")


def package_versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items())) or "Not recorded."
