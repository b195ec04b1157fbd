"""``hf-optim list``: Show the techniques (those of other installed packages too) and the shipped recipes."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..catalogue import catalogue
from ..config import OptimConfig, shipped_recipes
from ..techniques import PHASE_OF_HOOK, Technique
from .table import print_table

EXAMPLE = "hf-optim list --json | jq -r '.techniques[].name'"
HOOKS = (*PHASE_OF_HOOK, "register_kernels", "finalize_model", "export")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    techniques = [describe(cls) for cls in catalogue().all()]
    recipes = [describe_recipe(name) for name in sorted(shipped_recipes())]
    if args.json:
        print(json.dumps({"techniques": techniques, "recipes": recipes}, indent=2))
        return 0
    print_table(
        ("technique", "family", "reload", "what it does"),
        [(t["name"], t["family"], t["reload"], t["summary"]) for t in techniques],
    )
    print()
    print_table(
        ("recipe", "steps", "what for"), [(r["name"], " | ".join(r["stages"]), r["description"]) for r in recipes]
    )
    return 0


def describe(cls: type[Technique]) -> dict[str, Any]:
    """A technique for people and programs."""
    spec = cls.spec
    return {
        "name": spec.name,
        "family": spec.family,
        "summary": spec.summary,
        "reload": spec.reload.name,
        "trains": spec.trains,
        "hooks": [hook for hook in HOOKS if hasattr(cls, hook)],
        "paper": {"title": spec.paper.title, "year": spec.paper.year, "url": spec.paper.url} if spec.paper else None,
        "needs": sorted(map(str, spec.contract.needs)),
        "adds": sorted(map(str, spec.contract.adds)),
        "owes": sorted(map(str, spec.contract.owes)),
    }


def describe_recipe(name: str) -> dict[str, Any]:
    """A shipped recipe for people and programs."""
    recipe = OptimConfig.load(name)
    return {
        "name": name,
        "description": recipe.description,
        "stages": [str(stage) for stage in recipe.stages],
        "reload": recipe.reload.name,
        "recipe": recipe.to_dict(),
    }
