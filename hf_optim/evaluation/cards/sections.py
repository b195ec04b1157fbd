"""The sections of a model card, each rendered by one function of the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from ...data.tasks import Task
from ...recipes.config import KEYS
from ...recipes.contract import Paper, Reload
from ...runs.record import Record
from ...trust.figures import format_bytes, format_count, format_share
from ...trust.text import bibtex, cell, code, code_block, plain, sentence
from ..comparison import CARD_TITLES, column_titles, comparison_notes, comparison_rows
from ..reported import (
    REPORTED_METRICS,
    has_hub_metrics,
    is_number,
    recipe_label,
    recipe_trains,
    short_id,
)
from .front_matter import evaluation_name, is_hub_id, technique_spec
from .result import LIMITS, Result, claims_of

QUALITY_PLOT = "Quality against bytes"
UNFINISHED = "> This checkpoint was saved before its recipe was finished: training is not complete."
NOT_MEASURED = (
    "Not measured: no evaluation data was given. `hf-optim compare ORIGINAL CHECKPOINT --data DATA --record` measures "
    "both and writes the results into this card, as `hf-optim compress --eval` does."
)
STEPS_IN_MEMORY = (
    "The following sections were written by the steps: their figures are those of the model in memory, when the stage "
    "of the step ended."
)
NAMES_SHOWN = 8


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; cells are escaped, except ``Markdown``.

    Columns are right-aligned if all their cells begin with a digit or a sign.
    """
    cells = [[cell(value) for value in row] for row in rows]
    numeric = [all(_is_numeric(row[i]) for row in cells) and bool(cells) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(line) + " |" for line in ([cell(h) for h in header], rule, *cells))


def _is_numeric(cell: str) -> bool:
    return not cell or cell == "-" or cell.lstrip("+-").replace(",", "")[:1].isdigit()


# -- results ----------------------------------------------------------------------------------------------------------


def evaluation_label(record: Record) -> str:
    """Return the base model and the evaluation data: ``"babyllama-1m on eval.jsonl"``."""
    data = evaluation_name(record)
    return short_id(str(record.base_model.get("id") or "model")) + (f" on {data}" if data else "")


def summary(record: Record) -> str:
    """Render one sentence: the base model, the recipe, and the bytes before and after."""
    base = str(record.base_model.get("id") or "a model")
    link = f"[{code(base)}](https://huggingface.co/{base})" if is_hub_id(base) else code(base)
    size = ""
    if is_number(record.base_model.get("parameters")):
        dtype = plain(record.base_model.get("dtype", "float"))
        size = f" ({format_count(record.base_model['parameters'])} parameters in {dtype})"
    parts = [f"{link}{size}, optimized with hf_optim: {plain(recipe_label(record.recipe))}"]
    before, after = (record.measured.get(side, {}) for side in ("before", "after"))
    if is_number(before.get("bytes_on_disk")) and is_number(after.get("bytes_on_disk")):
        old, new = format_bytes(before["bytes_on_disk"]), format_bytes(after["bytes_on_disk"])
        parts.append(f"weights on disk: {new} (original: {old})")
    return "; ".join(parts) + "."


def results(record: Record) -> str:
    """Render the table of original, control and result, with the conditions; states if quality was not measured."""
    after = record.measured.get("after", {})
    rows = comparison_rows(record.measured, recipe_trains(record.recipe))
    table = markdown_table(column_titles(record.measured, CARD_TITLES), rows) if rows else ""
    conditions = _conditions(record) if has_hub_metrics(after) else NOT_MEASURED
    return "\n\n".join(part for part in (table, conditions) if part)


def _conditions(record: Record) -> str:
    before, after = (record.measured.get(side, {}) for side in ("before", "after"))
    sentences = []
    evaluation = record.measured.get("evaluation", {})
    if evaluation:
        amount = f", {plain(evaluation['samples'])} samples" if evaluation.get("samples") else ""
        length = f" of {plain(evaluation['seq_len'])} tokens" if evaluation.get("seq_len") else ""
        split = (
            f", split {plain(evaluation['split'])}"
            if evaluation.get("split") and is_hub_id(evaluation["dataset"])
            else ""
        )
        sentences.append(f"Evaluated on {plain(evaluation_name(record))}{split}{amount}{length}")
        if is_number(after.get("tokens")):
            sentences[-1] += f" ({format_count(after['tokens'])} tokens scored)"
    if after.get("device"):
        other = before.get("device")
        where = f"on {plain(after['device'])}"
        where += f" (the original on {plain(other)})" if other and other != after["device"] else ""
        sentences.append(f"Original and checkpoint ran {where} with stock transformers, unless a column says otherwise")
    compared = [m.label for m in REPORTED_METRICS if m.in_memory and is_number(after.get(m.key))]
    if compared and not after.get("compared_reloaded"):
        sentences.append(
            f"Measured on the model in memory, before it was saved: {', '.join(compared)}; all other figures of this "
            "checkpoint were measured on its files, loaded again"
        )
    sentences += map(plain, comparison_notes(record.measured, recipe_trains(record.recipe)))
    if after.get("peak_memory_of"):
        sentences.append(
            f"Peak memory is that of the {plain(after['peak_memory_of'])}, each model in a process of its own, and "
            "includes loading"
        )
    return "\n".join(f"- {one}." for one in sentences)


# -- loading ----------------------------------------------------------------------------------------------------------


def loading(result: Result) -> str:
    """Render the code that loads the checkpoint, according to its reload level, format and files."""
    task = result.task()
    level = result.reload
    text = f"{level.value[0].upper()}{level.value[1:]}"
    if level is Reload.STOCK_ARCH and result.model_class() == result.record.base_model.get("class"):
        text = "The class of the original, which ships in transformers"
    if level is Reload.STOCK_FORMAT and not result.is_compressed_tensors:
        text = "A format that transformers reads natively"  # that of the checkpoint that was optimized
    if result.is_compressed_tensors and level is not Reload.STOCK_FORMAT:
        text += f", with weights in {Reload.STOCK_FORMAT.value}"
    parts = [f"{text}."]
    trust = ", trust_remote_code=True" if level is Reload.REMOTE_CODE else ""
    parts.append(_code(_stock_snippet(task, result.processor(), trust)))
    if level is Reload.REMOTE_CODE:
        parts.append(
            "With hf_optim installed, `hf_optim.remote_code.register(...)`, called with the `model_type` of "
            "`config.json`, replaces `trust_remote_code` in these calls."
        )
    if result.is_compressed_encoder_decoder:
        parts += _generating(task, result, trust)
    if result.has_capacity:
        parts.append(
            "**This computes the experts without their capacity**, which no class of transformers has: nothing is "
            "dropped, and outputs differ from those of the optimized model. With the capacity in `config.json`:"
        )
    elif result.has_narrow_inputs:
        parts.append(
            "No kernel multiplies inputs of 4 bits: layers that have them are decoded, however the checkpoint is "
            "loaded, and compute in floating point with rounded inputs. Where other layers are compressed, these run "
            "on the kernels of hf_optim:"
        )
    elif result.is_compressed_tensors:
        parts.append("To keep the weights compressed and run them on the kernels of hf_optim:")
    if result.has_capacity or result.is_compressed_tensors:
        parts.append(
            _code(
                "import hf_optim\n"
                f"from transformers import {task.auto_class}\n\n"
                f'model = {task.auto_class}.from_pretrained(checkpoint, optim_config="auto"{trust})'
            )
        )
    return "\n\n".join(parts)


def _generating(task: Task, result: Result, trust: str) -> list[str]:
    """Render how an encoder-decoder with compressed layers generates in stock transformers."""
    text = (
        "Loaded so, stock transformers does not `generate` (as of 5.24): it calls the encoder by itself, and before a "
        "forward of the whole model its layers have no weights. "
    )
    if not result.has_one_weight_scheme:
        return [text + '`optim_config="auto"` does, and so does the dense equivalent (`hf-optim compress --dense`).']
    loaded = (
        f"from transformers import CompressedTensorsConfig, {task.auto_class}\n\n"
        "decoded = CompressedTensorsConfig(dequantize=True)\n"
        f"model = {task.auto_class}.from_pretrained(checkpoint, quantization_config=decoded{trust})"
    )
    return [text + "With its weights decoded as they are read, it does, with the same logits:", _code(loaded)]


def _stock_snippet(task: Task, processor: str, trust: str) -> str:
    names = sorted({task.auto_class, processor} - {""})
    variable = "tokenizer" if processor == "AutoTokenizer" else "processor"
    second = f"\n{variable} = {processor}.from_pretrained(checkpoint{trust})" if processor else ""
    return (
        f"from transformers import {', '.join(names)}\n\n"
        'checkpoint = "..."  # this repository, or the folder it was downloaded to\n'
        f"model = {task.auto_class}.from_pretrained(checkpoint{trust}){second}"
    )


def _code(source: str, language: str = "python") -> str:
    return code_block(source, language)


# -- how it was made --------------------------------------------------------------------------------------------------


def recipe(record: Record) -> str:
    """Render the recipe as a block of YAML."""
    return _code(recipe_text(record), "yaml")


def recipe_text(record: Record) -> str:
    """Return the recipe as YAML, in the order of recipe files (the JSON of the record is sorted)."""
    shown = {key: record.recipe[key] for key in KEYS if key in record.recipe}
    shown["steps"] = [dict(sorted(s.items(), key=_technique_first)) for s in shown.get("steps", ())]
    if shown.get("calibration", {}).get("dataset") and record.calibration.get("dataset"):
        # The recipe may name a path of the machine it ran on; the record of the data has the public name.
        shown["calibration"] = {**shown["calibration"], "dataset": record.calibration["dataset"]}
    return yaml.safe_dump(shown, sort_keys=False)


def _technique_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] != "technique", item[0]


def coverage(record: Record) -> str:
    """Render how many weights each step changed, what it left alone and why, and the layers it skipped."""
    if not record.coverage:
        return ""
    rows, skipped = [], []
    for step, counted in record.coverage.items():
        numbers = (format_count(counted[key]) for key in ("weights_touched", "weights_total"))
        rows.append([step, *numbers, format_share(counted["share"])])
        for reason, names in counted.get("skipped", {}).items():
            if reason in counted.get("left_alone", {}):
                continue  # a role, which is in the table
            listed = ", ".join(map(code, names[:NAMES_SHOWN]))
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            skipped.append(f"- {plain(step)} skipped {len(names)}: {sentence(reason)} ({listed}{more})")
    counted = "Counted on the model in memory, when the stage of the step ended."
    parts = ["### Coverage", markdown_table(["step", "weights changed", "of", "share"], rows), counted]
    return "\n\n".join([*parts, *left_alone(record), *(["\n".join(skipped)] if skipped else [])])


def _largest_first(entry: tuple[str, Mapping[str, Any]]) -> tuple[int, str]:
    """Sort key of an entry of ``left_alone``: a record does not keep the order of a dictionary."""
    role, part = entry
    return -part["weights"], role


def left_alone(record: Record) -> list[str]:
    """Render a table of the weights that steps left alone, by role; steps that left the same share a table."""
    tables: dict[str, list[str]] = {}
    for step, counted in record.coverage.items():
        total = counted["weights_total"] or 1
        rows = [
            [role, f"{part['weights']:,}", f"{100 * part['weights'] / total:.2f} %", part["reason"]]
            for role, part in sorted(counted.get("left_alone", {}).items(), key=_largest_first)
        ]
        if rows:
            tables.setdefault(markdown_table(["left alone", "weights", "share", "why"], rows), []).append(plain(step))
    if len(tables) == 1 and len(record.coverage) == len(next(iter(tables.values()))):
        return list(tables)
    return [part for table, steps in tables.items() for part in (f"{', '.join(steps)}:", table)]


def step_metrics(record: Record) -> str:
    """Render the numbers and texts that steps report; what they report per layer is drawn as a plot instead."""
    rows = []
    for index, reported in sorted(record.steps.items()):
        label = f"step {int(index) + 1} ({reported.get('technique', '')})"
        for key, value in sorted(reported.items()):
            if key not in ("technique", "layer_metric") and isinstance(value, (int, float, str)):
                rows.append([label, key.replace("_", " "), value])
    where = "Computed on the model in memory, while the recipe ran."
    table = markdown_table(["step", "metric", "value"], rows)
    return f"### Metrics of the steps\n\n{where}\n\n{table}" if rows else ""


def calibration(record: Record) -> str:
    """Render which data the steps used, with its hash."""
    trained = _training_data(record)
    if not record.calibration:
        return trained or "None: no step of this recipe uses data."
    order = (
        "dataset",
        "split",
        "text_column",
        "chat_column",
        "image_column",
        "samples",
        "seq_len",
        "tokens",
        "seed",
        "sha256",
    )
    found = [(key, record.calibration[key]) for key in order if record.calibration.get(key) is not None]
    rows = [
        [
            key.replace("_", " "),
            format_count(v) if key == "tokens" and is_number(v) else code(v) if key == "sha256" else v,
        ]
        for key, v in found
    ]
    hashed = (
        f"The hash covers the model inputs ({'token ids' if _is_text(record) else 'pixels or features'}), in order."
    )
    return "\n\n".join(filter(None, (markdown_table(["", "value"], rows), hashed, trained)))


def _is_text(record: Record) -> bool:
    """Return True if a record says how many tokens the calibration data has."""
    return is_number(record.calibration.get("tokens"))


def data_title(record: Record) -> str:
    """Return the heading of ``calibration``: of a recipe that only trains, its training data."""
    return "Training data" if not record.calibration and _training_data(record) else "Calibration data"


def _training_data(record: Record) -> str:
    """Return which data the stages that train read; an empty string if none trained, or on data of the caller's own."""
    trained = [stage for stage in record.stages if stage.get("driver") == "training"]
    names = dict.fromkeys(filter(None, (stage.get("data") for stage in trained)))
    if trained and not names and not record.calibration:
        return "No step was calibrated; on what the model was trained is not recorded."
    return f"Trained on {plain(', '.join(names))}." if names else ""


def stages(record: Record) -> str:
    """Render the stages, with their seconds and peak memory; without the latter if no stage has it."""
    if not record.stages:
        return "No stage was recorded."
    header = ["stage", "steps", "driver", "seconds", "peak memory", "device"]
    rows: list[list[Any]] = []
    for number, stage in enumerate(record.stages, 1):
        peak = stage.get("peak_memory_bytes")
        size = format_bytes(float(peak or 0)) if is_number(peak) else ""
        memory = ", ".join(filter(None, (size, stage.get("peak_memory_of")))) if size else "-"
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
    if not any(is_number(stage.get("peak_memory_bytes")) for stage in record.stages):
        place = header.index("peak memory")
        for row in (header, *rows):
            del row[place]
    return markdown_table(header, rows)


def limits(result: Result) -> str:
    """Render the notes of the run, and what a reader must not expect of the checkpoint."""
    record = result.record
    sentences: list[str] = [*map(sentence, record.notes), *claims_of(result, LIMITS)]
    if record.calibration.get("dataset"):
        sentences.append(
            f"Calibrated on {plain(record.calibration['dataset'])}; {'text' if _is_text(record) else 'data'} of other "
            "kinds may lose more quality."
        )
    if has_hub_metrics(record.measured.get("after", {})):
        sentences.append(
            f"Evaluated on {plain(evaluation_name(record)) or 'one dataset'} only. The known biases and risks of the "
            "original apply to this checkpoint, too."
        )
    else:
        sentences.append("Not evaluated: the loss of quality against the original is not known.")
    return "\n".join(f"- {line}" for line in sentences)


def papers(record: Record) -> str:
    """Render the papers of the techniques, with BibTeX."""
    found: dict[str, Paper] = {}
    for step in record.recipe.get("steps", ()):
        spec = technique_spec(step)
        if spec is not None and spec.paper is not None:
            found.setdefault(spec.name, spec.paper)
    if not found:
        return ""
    lines = [f"- {name}: [{plain(paper.title)}]({paper.url}) ({paper.year})" for name, paper in found.items()]
    entries = [
        f"@misc{{{name},\n  title = {{{bibtex(paper.title)}}},\n  year = {{{paper.year}}},\n  url = {{{paper.url}}}\n}}"
        for name, paper in found.items()
    ]
    return "## Papers\n\n" + "\n".join(lines) + "\n\n" + _code("\n\n".join(entries), "bibtex")


def package_versions(record: Record) -> str:
    """Render the versions of the packages that made the checkpoint."""
    return (
        ", ".join(f"{plain(name)} {plain(version)}" for name, version in sorted(record.versions.items()))
        or "Not recorded."
    )
