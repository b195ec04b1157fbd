"""Options shared by several commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..checkpoints.source import ModelSource
    from ..recipes.config import DataConfig, OptimConfig

DRIVERS = ("auto", "whole_model", "blockwise", "streamed")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_data_options(parser: argparse.ArgumentParser, samples: str) -> None:
    """Add the options for reading DATA. ``samples`` describes the default of ``--samples``."""
    group = parser.add_argument_group(
        "data", "DATA is a Hub dataset id, or a local text, json, jsonl, csv, tsv or parquet file."
    )
    group.add_argument(
        "--text-column",
        metavar="NAME",
        help="the column with the text (default: `text`, `sentence` or `content`, or the only one with strings)",
    )
    group.add_argument("--split", metavar="NAME", help="split of a Hub dataset (default: train)")
    group.add_argument("--samples", type=positive_int, metavar="N", help=f"number of sequences or examples ({samples})")
    group.add_argument(
        "--seq-len",
        type=positive_int,
        metavar="TOKENS",
        help="tokens per sequence (default: the context length of the model, at most 2048)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed for choosing sequences (default: 0)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for loading MODEL."""
    group = parser.add_argument_group("model")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub model")
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights (default: auto, as in the checkpoint)"
    )
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda if available)")
    add_remote_code_option(group)


def add_driver_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the calibration driver."""
    group = parser.add_argument_group("driver", "How calibration runs through the model.")
    group.add_argument(
        "--driver",
        choices=DRIVERS,
        help="streamed reads, calibrates and writes one block at a time, for models larger than memory "
        "(default: the driver in the recipe, else auto)",
    )
    group.add_argument(
        "--spill", metavar="DIR", help="with streamed, offload activations to DIR (default: keep them in memory)"
    )


def driver_fields(args: argparse.Namespace, recipe: OptimConfig) -> dict[str, Any]:
    """Return the fields of the recipe that the driver options change."""
    driver = args.driver or recipe.driver
    spill = args.spill or recipe.spill
    return {"driver": driver, "spill": spill if args.spill or driver == "streamed" else None}


def recipe_from_args(args: argparse.Namespace, recipe: OptimConfig) -> OptimConfig:
    """Return the recipe with the calibration data and the driver of the options."""
    import dataclasses

    calibration = data_config_from_args(args, args.calibration, base=recipe.calibration)
    return dataclasses.replace(recipe, calibration=calibration, **driver_fields(args, recipe))


def training_from_args(args: argparse.Namespace, calibration: DataConfig) -> DataConfig | None:
    """Return the training data of the options: ``--train``, else as the calibration data; None without ``--train``."""
    import dataclasses

    return dataclasses.replace(calibration, dataset=args.train, samples=args.samples) if args.train else None


def add_remote_code_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--trust-remote-code``."""
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that comes with the checkpoint"
    )


def source_from_args(args: argparse.Namespace) -> ModelSource:
    """Return the model that the options describe."""
    from ..checkpoints.source import ModelSource

    return ModelSource(args.model, args.revision, args.dtype, args.trust_remote_code)


def data_config_from_args(args: argparse.Namespace, dataset: str | None, base: Any = None) -> DataConfig:
    """Return the ``DataConfig`` of the options; options not given come from ``base`` (default: all of the data)."""
    import dataclasses

    from ..recipes.config import DataConfig

    given = {
        "dataset": dataset,
        "text_column": args.text_column,
        "chat": getattr(args, "chat", None),
        "samples": args.samples,
        "seq_len": args.seq_len,
        "split": args.split,
        "seed": args.seed,
    }
    base = base if base is not None else DataConfig(samples=None)
    return dataclasses.replace(base, **{key: value for key, value in given.items() if value is not None})


def positive_int(text: str) -> int:
    """Parse a whole number >= 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return number
