"""Render ``model_cards/claims/README.md``: what papers claim, what was measured here, and what follows.

    python examples/claims.py [--check]

Each JSON file beside the page is a list of claims with these fields:

- ``technique``, ``claim``, ``source``: of the paper.
- ``script``: what measures it, paths in the repository with ``; `` between them; null if nothing does.
- ``figures``: name -> path of a number: a file under ``model_cards``, then keys. A key with ``*`` stands for the mean
  over all keys that match.
- ``ours``: what was measured, with ``{name}`` or ``{name:.3f}`` for figures; ``setting``: model, data and size.
- ``holds``: comparisons ``[left, "<" or ">", right]``, with a fourth entry for a factor of the right side; a side is a
  figure or a number. The verdict follows from them: confirmed if all hold, contradicted if none does, else mixed.
- ``verdict``: instead of ``holds``, for what a comparison cannot say; ``why``: reasons and limits.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
HOME = CARDS / "claims"
PAGE = HOME / "README.md"
FAMILIES = ("quantization", "distillation", "pruning", "sparsity", "moe", "attention", "adaptive", "runtime")
VERDICTS = ("confirmed", "mixed", "contradicted", "not testable here", "open")
FIELDS = {"technique", "claim", "source", "script", "figures", "ours", "setting", "holds", "verdict", "why"}
HEAD = """# What papers claim, and what is measured here

Every claim that the survey of inference optimization quotes for a technique, with the number of this repository.
Written by `examples/claims.py` from the records in this folder; figures are read from the results of the scripts named,
and verdicts follow from comparisons of them wherever a comparison can say it. Models and data are small: a claim about
billions of weights is *not testable here* unless it is about times, which are measured on shapes of large models.
*Mixed*: it holds in some of the cases measured. *Open*: the technique is not built yet.

"""


def load(home: Path = HOME) -> dict[str, list[dict[str, Any]]]:
    """Return the claims by family, those of a technique together."""
    found: dict[str, list[dict[str, Any]]] = {family: [] for family in FAMILIES}
    for path in sorted(home.glob("*.json")):
        for claim in json.loads(path.read_text(encoding="utf-8")):
            if unknown := set(claim) - FIELDS - {"family"}:
                raise ValueError(f"{path.name}: unknown fields {sorted(unknown)}")
            found[claim.get("family", "moe")].append(claim)
    return {family: sorted(claims, key=lambda claim: claim["technique"]) for family, claims in found.items()}


def figure(path: list[str]) -> float:
    """Return the number at a path, or the mean of the numbers that it matches."""
    file, *keys = path
    text = (CARDS / file).read_text(encoding="utf-8")
    content = [json.loads(line) for line in text.splitlines()] if file.endswith(".jsonl") else json.loads(text)
    numbers = [float(value) for value in _matches(content, keys)]
    if not numbers:
        raise ValueError(f"no number at {' / '.join(path)}")
    return sum(numbers) / len(numbers)


def _matches(value: Any, keys: list[str]) -> list[Any]:
    if not keys:
        return [value]
    key, *rest = keys
    if isinstance(value, list):
        chosen = value if key == "*" else [value[int(key)]]
    else:
        chosen = [
            each for name, each in value.items() if name == key or ("*" in key and fnmatch.fnmatchcase(name, key))
        ]
    return [found for each in chosen for found in _matches(each, rest)]


def judge(claim: dict[str, Any]) -> tuple[str, str]:
    """Return what was measured, with its numbers, and the verdict."""
    numbers = {name: figure(path) for name, path in claim.get("figures", {}).items()}
    ours = claim["ours"].format(**numbers) if numbers else claim["ours"]
    if "holds" not in claim:
        if claim["verdict"] not in VERDICTS:
            raise ValueError(f"{claim['technique']}: the verdict is one of {VERDICTS}, not {claim['verdict']!r}")
        return ours, claim["verdict"]
    results = [_compare(numbers, *comparison) for comparison in claim["holds"]]
    return ours, "confirmed" if all(results) else "mixed" if any(results) else "contradicted"


def _compare(numbers: dict[str, float], left: Any, sign: str, right: Any, factor: float = 1.0) -> bool:
    a, b = (numbers[side] if isinstance(side, str) else float(side) for side in (left, right))
    return a < factor * b if sign == "<" else a > factor * b


def page(home: Path = HOME) -> str:
    """Return the page in markdown."""
    claims = load(home)
    judged = {family: [(claim, *judge(claim)) for claim in each] for family, each in claims.items()}
    counts = [sum(verdict == name for each in judged.values() for *_, verdict in each) for name in VERDICTS]
    lines = [HEAD + ", ".join(f"{count} {name}" for count, name in zip(counts, VERDICTS, strict=True)) + "."]
    for family, rows in judged.items():
        if rows:
            lines += ["", f"## {family}", "", "| technique | claim | measured here | verdict |", "|---|---|---|---|"]
        for claim, ours, verdict in rows:
            setting = f"*{_sentence(claim['setting'])}*" if claim.get("setting") else ""
            links = ", ".join(f"[{Path(script).name}](../../{script})" for script in scripts(claim))
            parts = (_sentence(ours), setting, f"{links}." if links else "", _sentence(claim.get("why", "")))
            cells = (
                f"`{claim['technique']}`",
                f"{_sentence(claim['claim'])[:-1]} ({claim['source']})",
                " ".join(part for part in parts if part),
                f"**{verdict}**",
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def scripts(claim: dict[str, Any]) -> list[str]:
    """Return the paths of what measures a claim."""
    return claim["script"].split("; ") if claim["script"] else []


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") or not text else ".")


def main() -> int:
    """Write the page, or with ``--check`` say whether it is what the records give."""
    parser = argparse.ArgumentParser(description="Render the page of claims from its records.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not up to date")
    args = parser.parse_args()
    made = page()
    if args.check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made
        print("up to date" if same else "not up to date: run python examples/claims.py", file=sys.stderr)
        return 0 if same else 1
    PAGE.write_text(made, encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
