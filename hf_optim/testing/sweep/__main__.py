"""``python -m hf_optim.testing.sweep``: compress every architecture of the installed transformers."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the sweep and write the table. Returns 1 if a class failed."""
    from .architectures import architectures
    from .pool import sweep
    from .recipes import RECIPES
    from .table import shares, write_table

    parser = argparse.ArgumentParser(prog="python -m hf_optim.testing.sweep", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="classes to check again; without it, those that have no result"
    )
    parser.add_argument("--again", action="store_true", help="also check again what failed, and what stock cannot")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="recipes to check")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("sweep-results.json"),
        metavar="FILE",
        help="results so far, to resume from",
    )
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="where to write the table")
    parser.add_argument("--seconds", type=float, default=180.0, metavar="S", help="limit of one class")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    if args.again:
        results = {name: result for name, result in results.items() if not _is_open(result)}
    rows = architectures()
    jobs = []
    for name in dict.fromkeys(row.name for row in rows):
        if args.only and not re.search(args.only, name):
            continue
        done = {} if args.only else results.get(name, {})
        missing = [r for r in args.recipes if not done or (not done["stock"] and r not in done["recipes"])]
        if missing:
            jobs.append({"name": name, "recipes": missing})
    for answer in sweep(jobs, args.jobs, args.seconds):
        name = answer.pop("name")
        before = results.get(name, {"recipes": {}})["recipes"] if not answer["stock"] else {}
        answer["recipes"] = {**before, **answer["recipes"]}
        results[name] = answer
        bad = {r: o for r, o in answer["recipes"].items() if o[0] == "FAIL"}
        said = f"stock cannot: {answer['stock']}" if answer["stock"] else bad or "ok"
        print(name, said, f"{answer['seconds']} s", flush=True)
        scratch = args.results.with_suffix(".part")
        scratch.write_text(json.dumps(results, indent=0, sort_keys=True))
        scratch.replace(args.results)
    print(shares(rows, results))
    if args.out is not None:
        write_table(args.out, rows, results)
    return 1 if any(o[0] == "FAIL" for r in results.values() for o in r["recipes"].values()) else 0


def _is_open(result: dict[str, Any]) -> bool:
    return bool(result["stock"]) or any(outcome == "FAIL" for outcome, _ in result["recipes"].values())


if __name__ == "__main__":
    sys.exit(main())
