"""``hf-optim list``: List the techniques (including those of other installed packages) and the shipped recipes.

Given the name of a technique, show what it does, what it requires of a model, what it changes, and its fields. Given
the name of a shipped recipe, show its steps."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from typing import Any

from ..errors import RecipeError
from ..recipes.catalogue import catalogue
from ..recipes.config import OptimConfig, shipped_recipes
from ..recipes.contract import PHASE_OF_HOOK, TRAINER_HOOKS, Phase
from ..recipes.field_checks import did_you_mean
from ..recipes.schemes import SCHEMES, describe_scheme, find_scheme, is_scheme
from ..recipes.technique import HOOKS, Technique
from .fields import fields_of, introduction
from .table import format_table, print_table

EXAMPLE = """\
hf-optim list gptq
hf-optim list --json | jq -r '.techniques[].name'"""
WIDTH = 120
TRAITS = ("needs", "forbids", "adds", "drops", "keeps", "owes", "owns")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a technique or a shipped recipe to describe")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.name is not None:
        return _describe_one(args.name, args.json)
    techniques = [describe(cls) for cls in catalogue().all()]
    recipes = [describe_recipe(name) for name in sorted(shipped_recipes())]
    schemes = [describe_scheme(name) for name in SCHEMES]
    if args.json:
        print(json.dumps({"techniques": techniques, "recipes": recipes, "schemes": schemes}, indent=2))
        return 0
    print_table(
        ("technique", "family", "reload", "what it does"),
        [(t["name"], t["family"], t["reload"], t["summary"]) for t in techniques],
    )
    print()
    print_table(
        ("recipe", "steps", "what for"), [(r["name"], " | ".join(r["stages"]), r["description"]) for r in recipes]
    )
    print()
    print_table(("scheme", "step", "what is stored"), [(s["name"], s["technique"], s["stored"]) for s in schemes])
    return 0


def _describe_one(name: str, as_json: bool) -> int:
    """Print everything about a name, which may belong to both a technique and a recipe."""
    known, shipped = catalogue().names(), shipped_recipes()
    if name not in known and name not in shipped and is_scheme(name):
        return _describe_scheme(name, as_json)
    if name not in known and name not in shipped:
        hint = did_you_mean(name, [*known, *shipped, *SCHEMES])
        raise RecipeError(f"no technique, shipped recipe or scheme {name!r}{hint} (`hf-optim list` shows them)")
    techniques = [describe_fully(catalogue().get(name))] if name in known else []
    recipes = [describe_recipe(name)] if name in shipped else []
    if as_json:
        print(json.dumps({"techniques": techniques, "recipes": recipes}, indent=2))
        return 0
    print("\n\n".join([*map(_technique_page, techniques), *map(_recipe_page, recipes)]))
    return 0


def _describe_scheme(name: str, as_json: bool) -> int:
    """Print what a scheme stores, and the step that it stands for as a recipe."""
    found = describe_scheme(find_scheme(name)[0])
    if as_json:
        print(json.dumps({"techniques": [], "recipes": [], "schemes": [found]}, indent=2))
    else:
        print(f"{found['name']} (scheme): {found['stored']}")
        print(f"\nas a recipe or as a step of one\n\n- technique: {found['technique']}\n  scheme: {found['name']}")
    return 0


def _technique_page(one: dict[str, Any]) -> str:
    paper = one["paper"]
    depends = " (depends on the fields)"
    rows = [
        ("family", one["family"]),
        ("paper", f"{paper['title']} ({paper['year']}), {paper['url']}" if paper else "-"),
        *((key, ", ".join(one[key]) + (depends if one["contract_depends"] else "")) for key in TRAITS if one[key]),
        ("trains", one["training"]),
        ("reloads as", f"{one['reload']}: {one['reload_means']}{depends if one['reload_depends'] else ''}"),
    ]
    fields = [
        (f["name"], _kind(f), "required" if f["required"] else _value(f["default"]), f["description"])
        for f in one["fields"]
    ]
    table = format_table(("field", "type", "default", "description"), fields) if fields else "No fields."
    page = f"{one['name']}\n\n{one['description']}\n\n{_pairs(rows)}\n\n{table}"
    return page.replace("``", "`")  # reStructuredText in docstrings, Markdown on the terminal


def _recipe_page(one: dict[str, Any]) -> str:
    rows = [("stages", " | ".join(one["stages"])), ("reloads as", one["reload"])]
    steps = dataclasses.replace(OptimConfig.parse(one["recipe"]), description="").to_yaml().strip()
    return f"{one['name']} (recipe)\n\n{textwrap.fill(one['description'], WIDTH)}\n\n{_pairs(rows)}\n\n{steps}"


def _pairs(rows: list[tuple[str, str]]) -> str:
    return "\n".join(format_table(("", ""), rows).splitlines()[2:])


def _kind(field: dict[str, Any]) -> str:
    """Return the type of a field, or its choices, with its range."""
    kind = " | ".join(map(_value, field["choices"])) if field["choices"] else field["type"].replace("None", "null")
    return f"{kind}{', ' if field['range'] else ''}{field['range']}"


def _value(value: Any) -> str:
    """Return a value as it is written in a recipe."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def describe_fully(cls: type[Technique]) -> dict[str, Any]:
    """Return ``describe``, with the text of the docstring, the kind of trainer, and the fields."""
    hooks = [hook for hook, phase in PHASE_OF_HOOK.items() if phase == Phase.TRAIN and hasattr(cls, hook)]
    trainer = "OptimTrainer" if set(hooks) & set(TRAINER_HOOKS) else "Trainer"
    how = "in hf_optim.OptimTrainer" if trainer == "OptimTrainer" else "in a Trainer with hf_optim.callbacks(model)"
    part = "only if another step trains, " if hooks else "no"
    return {
        **describe(cls),
        "description": introduction(cls),
        "reload_means": cls.spec.reload.value,
        "reload_depends": cls.reload is not Technique.reload,
        **{key: sorted(map(str, getattr(cls.spec.contract, key))) for key in TRAITS},
        "contract_depends": cls.contract is not Technique.contract,
        "trainer": trainer if hooks or cls.spec.trains else None,
        "training": f"yes, {how}" if cls.spec.trains else f"{part}{how if hooks else ''}",
        "fields": fields_of(cls),
    }


def describe(cls: type[Technique]) -> dict[str, Any]:
    """Return a technique in JSON types."""
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
    """Return a shipped recipe in JSON types."""
    recipe = OptimConfig.load(name)
    return {
        "name": name,
        "description": recipe.description,
        "stages": [str(stage) for stage in recipe.stages],
        "reload": recipe.reload.name,
        "recipe": recipe.to_dict(),
    }
