"""``hf-optim check``: Check that the steps of a recipe compose, and show what its stages need and what it produces.

No weights are read. With --model, size, memory and time are estimated from the configuration of the model."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import RecipeError
from ..recipes.config import OptimConfig
from ..recipes.traits import FLOAT_WEIGHTS
from .options import add_remote_code_option
from .table import print_line, print_table

EXAMPLE = "hf-optim check my-recipe.yaml --model meta-llama/Llama-3.2-1B"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML or JSON file, or the name of a shipped recipe or technique"
    )
    parser.add_argument("--model", metavar="MODEL", help="a Hub id or directory; also estimate size, memory and time")
    parser.add_argument("--json", action="store_true", help="print JSON; exit status 1 if the recipe is refused")
    add_remote_code_option(parser)


def run(args: argparse.Namespace) -> int:
    try:
        report = check(args.recipe, args.model, args.trust_remote_code)
    except RecipeError as error:
        if not args.json:
            raise
        print(json.dumps({"composes": False, "reason": str(error)}, indent=2))
        return 1
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0


def check(source: Any, model: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return what a recipe needs and produces, in JSON types.

    Args:
        source: anything that ``OptimConfig.parse`` takes.
        model: a Hub id or directory; adds estimates of size, memory and time.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises ``RecipeError`` if the steps do not compose, and other ``OptimError`` if the recipe does not fit the model.
    """
    recipe = OptimConfig.parse(source)
    found = None
    if model is not None:
        from ..checkpoints.source import ModelSource
        from .jobs.preflight import check_recipe, preflight

        checkpoint = ModelSource(str(model), trust_remote_code=trust_remote_code)
        traits = check_recipe(checkpoint, recipe)
        found = preflight(checkpoint, recipe, offline=True)
    else:
        traits = recipe.check({FLOAT_WEIGHTS})
    report: dict[str, Any] = {
        "composes": True,
        "stages": [
            {
                "steps": [step.name for step in stage.steps],
                "calibration_data": stage.needs_data,
                "training": stage.trains,
            }
            for stage in recipe.stages
        ],
        "traits": sorted(map(str, traits)),
        "reload": recipe.reload.name,
        "reload_means": recipe.reload.value,
    }
    if found is not None:
        from ..evaluation.reported import format_bytes

        report["model"] = found.estimates
        report["model"]["readable"]["host memory"] = f"about {format_bytes(found.estimates['host_bytes'])}"
        report["notes"] = found.notes
    return report


def _print(report: dict[str, Any]) -> None:
    print(" | ".join("[" + ", ".join(stage["steps"]) + "]" for stage in report["stages"]) + " composes\n")
    needed = {True: "needed", False: "no"}
    print_table(
        ("stage", "steps", "calibration data", "training"),
        [
            (number, ", ".join(stage["steps"]), needed[stage["calibration_data"]], needed[stage["training"]])
            for number, stage in enumerate(report["stages"], 1)
        ],
    )
    print(f"\nresult: {', '.join(report['traits'])}; reloads as {report['reload']}: {report['reload_means']}")
    if "model" in report:
        print(f"\n{report['model']['class']}:")
        print_table(("estimate", "value"), list(report["model"]["readable"].items()))
        for note in report["notes"]:
            print_line(note)
