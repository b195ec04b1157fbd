"""``hf-optim list``: List the techniques (also those of other installed packages), the shipped recipes and the schemes.

Given the name of a technique, show what it does, what it requires of a model, what it changes, and its fields. Given
the name of a shipped recipe or a scheme, show its steps."""

from __future__ import annotations

import argparse
import dataclasses
import re
import textwrap
from itertools import groupby
from typing import Any

from ..errors import RecipeError
from ..recipes.catalogue import catalogue
from ..recipes.config import OptimConfig, shipped_recipes
from ..recipes.contract import PHASE_OF_HOOK, TRAINER_HOOKS, Phase, Reload
from ..recipes.field_checks import did_you_mean
from ..recipes.schemes import SCHEMES, describe_scheme, find_scheme, is_scheme
from ..recipes.technique import HOOKS, Technique
from .fields import fields_of, introduction
from .table import format_table, print_json, print_table

EXAMPLE = """\
hf-optim list gptq
hf-optim list --json | jq -r '.techniques[].name'"""
WIDTH = 120
TRAITS = ("needs", "forbids", "adds", "drops", "keeps", "owes", "owns")
# What a trait in each part of a contract says, as (row, text); the text ends with the traits' meanings.
CONTRACT_ROWS = {
    "needs": ("needs", "a model that"),
    "forbids": ("refuses", "a model that"),
    "adds": ("result", "a model that"),
    "drops": ("ends", "the result is no longer a model that"),
    "keeps": ("keeps", "it stays a model that"),
    "owes": ("followed by", "a later step must make it a model that"),
}
RELOAD_LEVELS = {level.name: level.value for level in Reload}
WIDEST = max(map(len, RELOAD_LEVELS))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a technique, a shipped recipe or a scheme to describe")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.name is not None:
        return _describe_one(args.name, args.json)
    techniques = [describe(cls) for cls in catalogue().all()]
    recipes = [describe_recipe(name) for name in sorted(shipped_recipes())]
    schemes = [describe_scheme(name) for name in SCHEMES]
    if args.json:
        print_json({"techniques": techniques, "recipes": recipes, "schemes": schemes, "reload_levels": RELOAD_LEVELS})
        return 0
    print("TECHNIQUES, by family: the steps of a recipe\n")
    for family, members in groupby(sorted(techniques, key=lambda t: t["family"]), key=lambda t: t["family"]):
        rows = [(t["name"], t["reload"], t["summary"]) for t in members]
        # All tables have columns of one width.
        header = (family.ljust(max(len(t["name"]) for t in techniques)), "reload".ljust(WIDEST), "what it does")
        print(format_table(header, rows), end="\n\n")
    print("reload: how stock transformers loads the result")
    print(_pairs([(f"  {name}", meaning) for name, meaning in RELOAD_LEVELS.items()]))
    print("\nRECIPES: steps in brackets run together, a bar separates stages\n")
    print_table(
        ("recipe", "steps", "what for"), [(r["name"], " | ".join(r["stages"]), r["description"]) for r in recipes]
    )
    print("\nSCHEMES: names of compressed-tensors, each a recipe of one step\n")
    print_table(("scheme", "step", "what is stored"), [(s["name"], s["technique"], s["stored"]) for s in schemes])
    print("\n`hf-optim list NAME` describes a technique, a recipe or a scheme.")
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
        print_json({"techniques": techniques, "recipes": recipes, "reload_levels": RELOAD_LEVELS})
        return 0
    print("\n\n".join([*map(_technique_page, techniques), *map(_recipe_page, recipes)]))
    return 0


def _describe_scheme(name: str, as_json: bool) -> int:
    """Print what a scheme stores, and the step that it stands for as a recipe."""
    found = describe_scheme(find_scheme(name)[0])
    if as_json:
        print_json({"techniques": [], "recipes": [], "schemes": [found]})
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
        *_contract_rows(one, depends if one["contract_depends"] else ""),
        ("trains", one["training"]),
        ("on ranks", ", ".join(f"{key} {value}" for key, value in one["parallel"].items())),
        ("reloads as", f"{one['reload']}: {one['reload_means']}{depends if one['reload_depends'] else ''}"),
    ]
    fields = [
        (f["name"], _kind(f), "required" if f["required"] else _value(f["default"]), _in_yaml(f["description"]))
        for f in one["fields"]
    ]
    table = format_table(("field", "type", "default", "description"), fields) if fields else "No fields."
    return f"{one['name']}\n\n{_plain(one['description'])}\n\n{_pairs(rows)}\n\n{table}"


def _contract_rows(one: dict[str, Any], depends: str) -> list[tuple[str, str]]:
    """Return the contract of a technique in words, with the names of the traits."""
    rows = []
    for key, (label, start) in CONTRACT_ROWS.items():
        if one[key]:
            meanings = " and ".join(f"{one['traits'][name]} ({name})" for name in one[key])
            rows.append((label, f"{start} {meanings}{depends}"))
    if one["owns"]:
        rows.append(("alone in", f"{' and '.join(one['owns'])}: one step of a recipe may change it{depends}"))
    return rows


def _plain(text: str) -> str:
    """Return the text of a docstring without its markup."""
    text = re.sub(r"``(.+?)``", r"\1", text, flags=re.DOTALL)
    return re.sub(r"(?<![\w*])\*(\w[^*\n]*)\*(?![\w*])", r"\1", text)


def _in_yaml(text: str) -> str:
    """Return the description of a field with its values as a recipe file has them."""
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda found: words[found[1]], _plain(text)).replace('"', "")


def _recipe_page(one: dict[str, Any]) -> str:
    rows = [("stages", " | ".join(one["stages"])), ("reloads as", f"{one['reload']}: {RELOAD_LEVELS[one['reload']]}")]
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
        "traits": {trait.name: trait.meaning for key in TRAITS[:-1] for trait in getattr(cls.spec.contract, key)},
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
        "parallel": spec.parallel.to_dict(),
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
