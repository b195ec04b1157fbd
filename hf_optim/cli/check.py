"""``hf-optim check``: Check that a recipe is valid, that it works on a model, and what it costs.

With --model, it refuses whatever `hf-optim compress` would refuse with the same options, and estimates size, memory,
steps and checkpoints; no weights are read. Data is checked if it is named and on this machine: what only data can tell
(a missing column, too few texts) is not known without it. --time loads the model, runs a few training steps or
calibrates a few blocks, and extrapolates. Keys of --json: docs/costs.md."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ..errors import MissingRecipe, OptimError, RecipeError, cli_message
from ..evaluation.cache_sizes import cache_report, parse_batch_length, scheme_of_steps
from ..recipes.config import OptimConfig
from ..recipes.contract import OnRanks, Parallel
from ..recipes.traits import FLOAT_WEIGHTS, QUANTIZED
from .options import (
    add_data_options,
    add_driver_options,
    add_model_options,
    recipe_from_args,
    source_from_args,
    training_from_args,
)
from .table import print_line, print_table

if TYPE_CHECKING:
    from .jobs.plan import Plan

EXAMPLE = "hf-optim check my-recipe.yaml --model meta-llama/Llama-3.2-1B"
REFUSED = 1


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML or JSON file, or the name of a shipped recipe, a technique or a scheme"
    )
    parser.add_argument("--model", metavar="MODEL", help="a Hub id or directory; also check the recipe on this model")
    parser.add_argument("--calibration", metavar="DATA", help="calibration data (default: the dataset in the recipe)")
    parser.add_argument("--train", metavar="DATA", help="training data (default: the calibration data)")
    parser.add_argument("--dense", action="store_true", help="check for `compress --dense`")
    parser.add_argument("--time", action="store_true", help="with --model, measure how long the recipe takes")
    parser.add_argument(
        "--kv", metavar="BATCHxLENGTH", help="with --model, the bytes of the key/value cache of so many sequences"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_driver_options(parser)
    add_data_options(parser, "default: 128 for calibration, all with --train")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    if args.time and args.model is None:
        raise RecipeError("--time measures on a model: give --model too")
    if args.kv is not None and args.model is None:
        raise RecipeError("--kv counts the cache of a model: give --model too")
    size = None if args.kv is None else parse_batch_length(args.kv)
    try:
        recipe = recipe_from_args(args, OptimConfig.parse(args.recipe))
        plan = None if args.model is None else _plan(args, recipe)
    except MissingRecipe:
        raise
    except RecipeError as error:
        return _refuse(error, args.json)
    if plan is not None:
        _ = plan.source.config  # a model that cannot be found is an error, not a refusal of the recipe
    try:
        report = examine(recipe, plan)
    except OptimError as error:
        return _refuse(error, args.json)
    if plan is not None and size is not None:
        scheme, weights = scheme_of_steps(recipe.steps), report["model"]["bytes_before"]
        report["kv"] = cache_report(plan.source.config, *size, scheme, weights)
    if plan is not None and args.time:
        from .jobs.stage_times import measure_time

        report["time"] = measure_time(plan, report["model"])
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0


def _plan(args: argparse.Namespace, recipe: OptimConfig) -> Plan:
    from .jobs.plan import Plan

    return Plan(source_from_args(args), recipe, training_from_args(args, recipe.calibration), args.dense, args.device)


def _refuse(error: OptimError, as_json: bool) -> int:
    """Print why a recipe is refused: as JSON, or as one line on standard error. Returns the exit status."""
    reason = cli_message(error)
    if as_json:
        composes = not isinstance(error, RecipeError)
        print(json.dumps({"accepted": False, "composes": composes, "reason": reason}, indent=2))
    else:
        print(f"hf-optim: {reason}", file=sys.stderr)
    return REFUSED


def check(source: Any, model: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return what a recipe needs, produces and costs, in JSON types (docs/costs.md).

    Args:
        source: anything that ``OptimConfig.parse`` takes.
        model: a Hub id or directory; adds estimates of size, memory and work.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises ``RecipeError`` if the steps do not compose, and other ``OptimError`` if the recipe does not fit the model.
    """
    recipe = OptimConfig.parse(source)
    if model is None:
        return examine(recipe, None)
    from ..checkpoints.source import ModelSource
    from .jobs.plan import Plan

    return examine(recipe, Plan(ModelSource(str(model), trust_remote_code=trust_remote_code), recipe))


def examine(recipe: OptimConfig, plan: Plan | None) -> dict[str, Any]:
    """Return the report of ``check`` for a recipe, and for what is to be done with it. Raises ``OptimError``."""
    found, level = None, recipe.reload
    if plan is not None:
        from ..runs.claims import reload_of
        from .jobs.preflight import preflight

        found = preflight(plan, offline=True, data=True)
        traits = found.traits
        if plan.dense:
            traits = (traits - {QUANTIZED}) | {FLOAT_WEIGHTS}
        level = reload_of(level, found.model, traits)
    else:
        traits = recipe.check({FLOAT_WEIGHTS})
    report: dict[str, Any] = {
        "accepted": True,
        "composes": True,
        "stages": [
            {
                "steps": [step.name for step in stage.steps],
                "calibration_data": stage.needs_data,
                "training": stage.trains,
            }
            for stage in recipe.stages
        ],
        "data": {
            "calibration": recipe.calibration.dataset,
            "training": (plan.training_data if plan is not None else recipe.calibration).dataset,
        },
        "traits": sorted(map(str, traits)),
        "parallel": parallel_of(recipe),
        "reload": level.name,
        "reload_means": level.value,
    }
    if found is not None:
        report["model"] = found.estimates
        report["notes"] = found.notes
    return report


def parallel_of(recipe: OptimConfig) -> dict[str, str]:
    """Return what several ranks can share of a recipe: of each way the worst of its steps (``hf-optim list NAME``)."""
    order = [each.value for each in OnRanks]
    found = {key: [step.spec.parallel.to_dict()[key] for step in recipe.steps] for key in Parallel().to_dict()}
    return {key: max([v for v in values if v != "-"], key=order.index, default="-") for key, values in found.items()}


def _print(report: dict[str, Any]) -> None:
    print(" | ".join("[" + ", ".join(stage["steps"]) + "]" for stage in report["stages"]) + " composes\n")
    print_table(
        ("stage", "steps", "calibration data", "training data"),
        [
            (
                number,
                ", ".join(stage["steps"]),
                _data(stage["calibration_data"], report["data"]["calibration"], "--calibration"),
                _data(stage["training"], report["data"]["training"], "--train"),
            )
            for number, stage in enumerate(report["stages"], 1)
        ],
    )
    print(f"\nresult: {', '.join(report['traits'])}; reloads as {report['reload']}: {report['reload_means']}")
    print(f"on ranks: {', '.join(f'{key} {value}' for key, value in report['parallel'].items())}")
    if "model" in report:
        print(f"\n{report['model']['class']}:")
        print_table(("estimate", "value"), list(report["model"]["readable"].items()))
        for note in report["notes"]:
            print_line(note)
    if "kv" in report:
        print()
        print_table(("key/value cache", "bytes"), list(report["kv"]["readable"].items()))
    if "time" in report:
        print()
        print_table(("time", "value"), list(report["time"]["readable"].items()))


def _data(needed: bool, name: str | None, option: str) -> str:
    """Return the cell of a stage for one kind of data."""
    return "not needed" if not needed else name or f"needed ({option} DATA)"
