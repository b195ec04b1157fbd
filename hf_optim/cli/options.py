"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..checkpoints.source import ModelSource
    from ..recipes.config import DataConfig, OptimConfig

DRIVERS = ("auto", "whole_model", "blockwise", "streamed")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def data_options(parser: argparse.ArgumentParser, samples: str) -> None:
    """How DATA is read: the same options wherever a command takes data. ``samples`` says what the default is."""
    group = parser.add_argument_group(
        "data", "DATA is a Hub dataset id, or a local text, json, jsonl, csv, tsv or parquet file."
    )
    group.add_argument(
        "--text-column", metavar="NAME", help="the column with the text (default: `text`, or the only one)"
    )
    group.add_argument("--split", metavar="NAME", help="split of a Hub dataset (default: train)")
    group.add_argument("--samples", type=_count, metavar="N", help=f"how many windows or rows ({samples})")
    group.add_argument(
        "--seq-len",
        type=_count,
        metavar="TOKENS",
        help="tokens per window (default: the model's context, 2048 at most)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of the choice of windows (default: 0)")


def model_options(parser: argparse.ArgumentParser) -> None:
    """How MODEL is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="load as (default: auto, the checkpoint's own)")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    remote_code_option(group)


def driver_options(parser: argparse.ArgumentParser) -> None:
    """How calibration goes through the model."""
    group = parser.add_argument_group("driver", "How calibration goes through the model.")
    group.add_argument(
        "--driver",
        choices=DRIVERS,
        help="streamed: read, calibrate and write one block at a time, for models larger than memory "
        "(default: what the recipe says, else auto)",
    )
    group.add_argument(
        "--spill", metavar="DIR", help="with streamed: keep what flows between blocks on disk (default: in memory)"
    )


def driver_of(args: argparse.Namespace, recipe: OptimConfig) -> dict[str, Any]:
    """The fields of the recipe that ``driver_options`` change."""
    driver = args.driver or recipe.driver
    spill = args.spill or recipe.spill
    return {"driver": driver, "spill": spill if args.spill or driver == "streamed" else None}


def remote_code_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint"
    )


def source_of(args: argparse.Namespace) -> ModelSource:
    """The model that ``model_options`` describe."""
    from ..checkpoints.source import ModelSource

    return ModelSource(args.model, args.revision, args.dtype, args.trust_remote_code)


def data_config(args: argparse.Namespace, dataset: str | None, base: Any = None) -> DataConfig:
    """A ``DataConfig`` of the command's options; what was not given comes from ``base`` (default: all of the data)."""
    import dataclasses

    from ..recipes.config import DataConfig

    given = {
        "dataset": dataset,
        "text_column": args.text_column,
        "samples": args.samples,
        "seq_len": args.seq_len,
        "split": args.split,
        "seed": args.seed,
    }
    base = base if base is not None else DataConfig(samples=None)
    return dataclasses.replace(base, **{key: value for key, value in given.items() if value is not None})


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return number
