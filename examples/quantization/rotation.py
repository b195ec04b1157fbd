"""Perplexity with 4-bit weights and inputs of 16, 8 and 4 bits, with and without rotations.

    python examples/quantization/rotation.py --model ../shared/models/babyllama-1m \\
        --data ../shared/data/tinystories --output model_cards/quantization/rotation.json

Calibration takes ``--windows`` windows of 256 tokens of calibration.jsonl at random, and perplexity is that of
``--evaluated`` windows of eval.jsonl, in float32. Symmetric codes of weights, one scale for 32 inputs; each token has a
grid of its own. Results of other models in the file are kept; settings were chosen on babyllama-1m.
"""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import torch
from learned_rounding import draw, opened, parser_of

import hf_optim
from hf_optim.evaluation.evaluate import perplexity

GROUP = 32
INPUTS = {"W4A16": (None, None), "W4A8": ("int8", 8), "W4A4": ("int4", 4)}
LEARNED = {"method": "learned", "steps": 40, "rate": 0.3, "rows": 4}
ROTATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "hadamard": {},
    "learned": LEARNED,
    "hadamard, online": {"online": True},
    "learned, online": {**LEARNED, "online": True},
}


def steps_of(rotation: str, scheme: str, quantizer: str) -> list[dict[str, Any]]:
    """Return the steps of a cell of the table."""
    activations, bits = INPUTS[scheme]
    grid: dict[str, Any] = {"bits": 4, "group_size": GROUP}
    fields = ROTATIONS[rotation]
    first = [] if fields is None else [{"technique": "rotation", **grid, "activation_bits": bits, **fields}]
    return [*first, {"technique": quantizer, **grid, "observer": "mse", "activations": activations}]


def main() -> None:
    parser = parser_of(__doc__.splitlines()[0], 128)
    parser.add_argument("--evaluated", type=int, default=300, help="windows of evaluation (300)")
    parser.add_argument("--quantizers", nargs="*", default=["gptq", "rtn"])
    parser.add_argument("--rotations", nargs="*", default=list(ROTATIONS), choices=ROTATIONS)
    parser.add_argument("--schemes", nargs="*", default=list(INPUTS), choices=INPUTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dense, calibration, held_out, results = opened(given.model, given.data, given.output)
    held_out, data = held_out[: given.evaluated], draw(calibration, given.windows, 0)
    own = results.setdefault(given.model.name, {})
    own |= {"windows": given.windows, "evaluated": given.evaluated}
    own["dense"] = round(perplexity(dense, held_out)["perplexity"], 4)
    for quantizer in given.quantizers:
        for scheme in given.schemes:
            for rotation in given.rotations:
                start = time.perf_counter()
                steps = steps_of(rotation, scheme, quantizer)
                model = hf_optim.optimize(copy.deepcopy(dense), steps, calibration=data)
                seconds = time.perf_counter() - start
                found = perplexity(model, held_out)["perplexity"]
                row: dict[str, Any] = {"perplexity": round(found, 4), "seconds": round(seconds, 1)}
                told = hf_optim.run_of(model).record.steps.get("0", {})
                row |= {key: told[key] for key in ("loss_before", "loss_after") if key in told}
                own.setdefault(quantizer, {}).setdefault(scheme, {})[rotation] = row
                print(given.model.name, quantizer, scheme, rotation, row, flush=True)
                given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
