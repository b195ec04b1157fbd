"""Quantize a model with one of our methods: ``python our_runner.py JOB``.

The counterpart of ``peer_runner.py``, with the same files. ``beside_peers.py`` calls it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from measured_run import measured
from peer_runner import BATCH, batches_of_one_length

import hf_optim
from hf_optim import DataConfig, OptimConfig, OptimError
from hf_optim.runs.record import versions


def steps_of(job: dict[str, Any]) -> list[Any]:
    """Return the steps of a method; those of ``best`` are a recipe's, one scale per channel where there are no groups.

    Raises ``SystemExit`` if the recipe has other bits, other groups or other zero points than the cell.
    """
    grid = {"bits": job["bits"], "group_size": job["group"], "symmetric": job["symmetric"]}
    if job["method"] != "best":
        steps = {
            "gptq": [{"technique": "gptq", **grid, "observer": "mse"}],
            "awq, rtn": [{"technique": "awq", **grid}, {"technique": "rtn", **grid}],
            "signround": [{"technique": "signround", **grid}],
        }[job["method"]]
        return list(OptimConfig.parse(steps).steps)
    found = []
    for step in OptimConfig.parse(job["recipe"]).steps:
        if job["group"] is None and hasattr(step, "group_size"):
            step = dataclasses.replace(step, group_size=None)
        for name, value in grid.items():
            if getattr(step, name, value) != value:
                raise SystemExit(f"{job['recipe']}: a step has {name} {getattr(step, name)}, the cell has {value}")
        found.append(step)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="a folder with job.json")
    folder = parser.parse_args().job
    if not (folder / "job.json").is_file():
        parser.error(f"{folder} has no job.json")
    import transformers
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    steps = steps_of(job)
    result: dict[str, Any] = {
        "versions": {name: text for name, text in versions().items() if name in ("hf-optim", "torch", "transformers")}
    }
    data = load_file(folder / "calibration.safetensors")
    # A recipe says how many sequences a batch has; steps that learn take whole batches.
    most = OptimConfig.parse(job["recipe"]).calibration.batch_size if job["method"] == "best" else BATCH
    batches = list(batches_of_one_length(data["input_ids"], data["attention_mask"], most))
    model = getattr(transformers, job["auto_class"]).from_pretrained(job["model"], dtype=torch.float32).eval()
    model.to(job["device"])
    names = list(model.state_dict())
    recipe = OptimConfig(tuple(steps), DataConfig(samples=len(data["input_ids"])))
    try:
        with measured(result, job["device"]):
            model = hf_optim.optimize(model, recipe, batches)
        found = model.state_dict()
        save_file({name: found[name].cpu().clone().contiguous() for name in names}, folder / "weights.safetensors")
    except OptimError as error:
        result["failed"] = f"{type(error).__name__}: {error}"[:300]
    if job["method"] == "best":
        result["recipe"], result["steps"] = job["recipe"], recipe.to_dict()["steps"]
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
