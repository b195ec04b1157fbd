"""The page of rotation.py's results: perplexity by the bits of weights and inputs, with and without rotations.

python examples/quantization/rotation_page.py model_cards/quantization/rotation.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROTATIONS = ("none", "hadamard", "learned", "hadamard, online", "learned, online")
INPUTS = ("W4A16", "W4A8", "W4A4")


def table(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Return the lines of one quantizer's table; a dash is not measured."""
    lines = [f"| rotation | {' | '.join(INPUTS)} |", "|---|" + "---:|" * len(INPUTS)]
    for name in ROTATIONS:
        cells = [found.get(inputs, {}).get(name) for inputs in INPUTS]
        if any(cells):
            shown = [f"{cell['perplexity']:.4f}" if cell else "-" for cell in cells]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines


def page(results: dict[str, Any]) -> str:
    """Return the page as Markdown."""
    lines = [
        "# Rotations",
        "",
        "Perplexity on windows of 256 tokens of TinyStories' held-out stories, with 4-bit weights (symmetric, one",
        "scale for 32 inputs) and inputs in 16, 8 and 4 bits (each token on a grid of its own). Written by",
        "`examples/quantization/rotation_page.py` from the results of `rotation.py`. *hadamard* and *learned* are",
        "folded into the weights; *online* adds the rotation of the inputs of down projections at run time. Settings",
        "of the learned rotations were tried on babyllama-1m.",
    ]
    for model, found in results.items():
        lines += ["", f"## {model}", ""]
        lines.append(
            f"Dense {found['dense']:.4f}; {found['evaluated']} windows, {found['windows']} of calibration, one draw."
        )
        for quantizer in ("rtn", "gptq"):
            if quantizer in found:
                lines += ["", f"After `{quantizer}`:", "", *table(found[quantizer])]
    lines += [
        "",
        "Rotations folded into the weights gain little on models this small; the one at run time takes a third to a",
        "half of what 4-bit inputs cost. With inputs in 16 bits a rotation can cost.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    path = Path(sys.argv[1])
    path.with_suffix(".md").write_text(page(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
