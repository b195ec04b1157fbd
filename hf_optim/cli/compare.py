"""``hf-optim compare``: Compare checkpoints on the same data: quality, agreement with the first, size, memory and time.

Each is evaluated in a process of its own, which gives its peak memory; then each is loaded beside the reference to
compare their predictions, and all are timed in turn. Models of another task or vocabulary are refused before that.
--record writes the figures into the records and cards of those that were made from the reference."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..evaluation.reported import REPORTED_METRICS, ReportedMetric, format_bytes, format_share, is_number
from ..evaluation.timings import SPREAD
from ..runs.record import FILE_NAME
from .options import add_data_options, add_model_options, data_config_from_args
from .table import print_json, print_line, print_table

EXAMPLE = """\
hf-optim compare org/model llama-w8a8 llama-w4a16 --data eval.jsonl --plot sizes.png
hf-optim compare org/model trained --data eval.jsonl --record    # the card of what a Trainer saved"""
HEADINGS = {
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "spearman": "Spearman",
    "top1_agreement": "agreement",
    "kl": "KL",
    "bytes_on_disk": "on disk",
    "peak_memory_bytes": "peak memory",
    "ms_per_token": "ms/token",
    "ms_per_example": "ms/example",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="Hub ids or directories of checkpoints")
    parser.add_argument("--data", required=True, metavar="DATA", help="evaluation data")
    parser.add_argument("--reference", metavar="MODEL", help="compare the others with this one (default: the first)")
    parser.add_argument("--auto", action="store_true", help="run compressed checkpoints on hf_optim's kernels")
    parser.add_argument("--no-time", action="store_true", help="measure no time")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw quality against bytes")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the figures into the record and the card of each checkpoint that is compared with the reference, "
        "its original; as compress --eval does, for checkpoints that a Trainer or save_pretrained wrote",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_data_options(parser, "default: all")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..checkpoints.source import ModelSource
    from ..errors import OptimError
    from .jobs import comparing, recording

    if args.plot is not None and args.plot.suffix.lower() != ".png":
        raise OptimError(f"--plot writes PNG files: name one with .png, not {args.plot.name}")
    if args.record and (args.auto or args.dtype != "auto"):
        raise OptimError(
            "--record measures checkpoints as stock transformers runs them, and on kernels where they run there: leave "
            f"out {'--auto' if args.auto else '--dtype'}"
        )
    models = comparing.require_models(args.models, args.reference)
    job = comparing.Comparison(
        models,
        ModelSource("", args.revision, args.dtype, args.trust_remote_code),
        data_config_from_args(args, args.data),
        kernels=args.auto,
        speed=not args.no_time,
        device=args.device,
    )
    with recording.recordable(models[1:] if args.record else (), job.source_of(models[0])) as targets:
        job = recording.with_kernels(job, targets)
        found = comparing.compare_checkpoints(job)
        recorded = recording.record_comparison(targets, found, job.data)
    labels = comparing.short_labels(models)
    if args.json:
        print_json(found | ({"recorded": recorded} if recorded else {}))
    else:
        _print(found, labels)
        for home in recorded:
            print_line(f"wrote the figures into {home}: {FILE_NAME} and README.md")
    if args.plot is not None:
        comparing.plot(found, labels, args.plot)
        print_line(f"wrote {args.plot}") if not args.json else None
    return 0


def _print(found: dict[str, Any], labels: dict[str, str]) -> None:
    measured = found["models"]
    known = {key for values in measured.values() for key, value in values.items() if is_number(value)}
    metrics = [metric for metric in REPORTED_METRICS if metric.key in HEADINGS and metric.key in known]
    header = ["model", *(HEADINGS[m.key] for m in metrics)]
    rows = [[labels[model], *(_cell(metric, values) for metric in metrics)] for model, values in measured.items()]
    rows[0][0] += " (reference)"
    base = measured[found["reference"]]
    key = next((key for key in SPREAD if is_number(base.get(key))), None)
    if key is not None:
        header.append("time")
        for row, values in zip(rows, measured.values(), strict=True):
            row.append(_relative(values.get(key), base[key]))
    print_table(header, rows)
    if found["timing"]:
        order = "in turn in one process" if found["timing"]["in_turn"] else "one model after the other"
        print_line(f"time: {found['timing']['what']}; median ± half the interquartile range, {order}")


def _cell(metric: ReportedMetric, values: dict[str, Any]) -> str:
    value: Any = values.get(metric.key)
    spread: Any = values.get(SPREAD.get(metric.key, ""))
    if not is_number(value):
        return "not finite" if isinstance(value, float) else "-"
    if metric.key in ("bytes_on_disk", "peak_memory_bytes"):
        return format_bytes(value)
    return metric.format(value) + (f" ± {metric.format(spread / 2)}" if is_number(spread) else "")


def _relative(value: Any, base: float) -> str:
    return format_share(value / base, 0) if is_number(value) and base else "-"
