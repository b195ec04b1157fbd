"""Perplexity of quantizers that round to 4, 3 and 2 bits, over draws of calibration data.

    python examples/quantization/learned_rounding.py --model ../shared/models/babyllama-1m \\
        --data ../shared/data/tinystories --output model_cards/quantization/learned_rounding.json

Each draw takes ``--windows`` windows of 256 tokens of calibration.jsonl at random. Perplexity is that of all windows of
eval.jsonl. Symmetric codes (2 bits: with zero points), 32 inputs share a scale, all linear layers of the blocks,
float32. Seconds are the processor's, of the method alone, on one thread. Results of other models and methods in the
file are kept, with ``--resume`` the first draws of these, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_optim
from hf_optim.evaluation.evaluate import perplexity

LENGTH, GROUP = 256, 32
METHODS = ("rtn", "gptq", "awq", "signround", "signround mse", "best")


def recipe_of(method: str, bits: int) -> str | list[dict[str, Any]]:
    """Return the recipe of a method: its steps, or the name of the shipped one for ``"best"``. 2 bits: zero points."""
    if method == "best":
        return f"w{bits}a16-best"
    grid = {"bits": bits, "group_size": GROUP, "symmetric": bits > 2}
    return {
        "rtn": [{"technique": "rtn", **grid, "observer": "mse"}],
        "gptq": [{"technique": "gptq", **grid, "observer": "mse"}],
        "awq": [{"technique": "awq", **grid}, {"technique": "rtn", **grid}],
        "signround": [{"technique": "signround", **grid}],
        "signround mse": [{"technique": "signround", **grid, "observer": "mse"}],
    }[method]


def all_windows(tokenizer: Any, path: Path) -> Tensor:
    """Return the stories of a file one after the other, each after bos, cut into windows: int64 ``[n, 256]``."""
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids.append(tokenizer.bos_token_id)
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def draw(windows: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def parser_of(description: str, windows: int) -> argparse.ArgumentParser:
    """Return a parser of the model, its data, the file of results and the windows of calibration."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path, help="a folder with calibration.jsonl and eval.jsonl")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=windows, help=f"of calibration ({windows})")
    return parser


def opened(model: Path, data: Path, output: Path) -> tuple[Any, Tensor, Tensor, dict[str, Any]]:
    """Return the model in float32, windows of calibration and of evaluation, and the results of the file."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    calibration, held_out = (all_windows(tokenizer, data / f"{name}.jsonl") for name in ("calibration", "eval"))
    return dense, calibration, held_out, json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}


def main() -> None:
    parser = parser_of(__doc__.splitlines()[0], 256)
    parser.add_argument("--draws", type=int, default=3, help="of calibration data (3)")
    parser.add_argument("--resume", action="store_true", help="keep the draws of the file that had as many windows")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dense, calibration, held_out, results = opened(given.model, given.data, given.output)
    own = results.setdefault(given.model.name, {})
    own["dense"] = round(perplexity(dense, held_out)["perplexity"], 4)
    for bits in given.bits:
        for method in given.methods:
            rows = own.setdefault(f"{bits} bits", {})
            row = rows.get(method, {}) if given.resume else {}
            found = row.get("draws", []) if row.get("windows") == given.windows else []
            seconds = [row["seconds"]] if found else []
            for seed in range(len(found), 1 if method == "rtn" else given.draws):
                model, start = copy.deepcopy(dense), time.process_time()
                data = draw(calibration, given.windows, seed)
                model = hf_optim.optimize(model, recipe_of(method, bits), calibration=data)
                seconds.append(round(time.process_time() - start, 1))
                found.append(round(perplexity(model, held_out)["perplexity"], 4))
                row = {"draws": found, "mean": round(sum(found) / len(found), 4), "seconds": min(seconds)}
                rows[method] = {**row, "windows": given.windows}
                print(given.model.name, bits, method, row, flush=True)
                given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
