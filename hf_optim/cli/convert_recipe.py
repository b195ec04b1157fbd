"""``hf-optim convert-recipe``: Translate a recipe file of llm-compressor into a recipe of hf_optim, and print it.

What has no counterpart is named in comments above the steps and on standard error. If that changes the result, the
translation is refused, with exit status 2; --partial prints it nevertheless. Fields without an effect on the result
(memory, speed) are named and left out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from ..errors import RecipeError, printable
from .table import print_json

EXAMPLE = """\
hf-optim convert-recipe recipe.yaml --output my-recipe.yaml
hf-optim check my-recipe.yaml --model org/model"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a recipe file of llm-compressor, YAML or JSON")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the recipe to a file (default: print it)")
    parser.add_argument(
        "--partial",
        action="store_true",
        help="print what can be translated, although modifiers or fields that change the result have no counterpart",
    )
    parser.add_argument("--json", action="store_true", help="print the recipe and the notes as JSON")


def run(args: argparse.Namespace) -> int:
    from ..recipes.conversion.llm_compressor import translate_file

    found = translate_file(args.file)
    for line in found.notes.lines():
        print(printable(line, 1000), file=sys.stderr)
    if not found.steps:
        raise RecipeError(f"{args.file.name}: no modifier has a counterpart")
    if not (found.notes.complete or args.partial):
        count = len(found.notes.missing) + len(found.notes.changed)
        raise RecipeError(
            f"{args.file.name} is not translated completely: {count} part{'s' if count > 1 else ''} of it "
            f"{'have' if count > 1 else 'has'} no counterpart (above); --partial prints the rest"
        )
    text = found.to_yaml(args.file.name)
    if args.output is not None:
        try:
            args.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"cannot write {args.output}: {error.strerror}") from error
    if args.json:
        print_json({"recipe": yaml.safe_load(text), "notes": list(found.notes.lines())})
    elif args.output is None:
        print(text, end="")
    else:
        print(f"wrote {args.output}")
    return 0
