"""Folders of records for tests of the index: what a page of results is rendered from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_optim.runs.record import Record

RECIPES: dict[str, list[dict[str, Any]]] = {
    "alpha-w4": [{"technique": "gptq", "bits": 4, "group_size": 32}],
    "alpha-w8": [{"technique": "rtn", "bits": 8}],
    "alpha-pruned": [{"technique": "magnitude", "sparsity": 0.5}],
    "alpha-2of4-kd": [{"technique": "nm"}, {"technique": "logit_kd"}],
    "beta-w8": [{"technique": "rtn", "bits": 8}],
    "gamma-unmeasured": [{"technique": "not_installed_here"}],
}
# perplexity, bytes, top-1 agreement, KL
FIGURES = {
    "alpha-w4": (2.2661, 779_000, 0.9411, 0.01713),
    "alpha-w8": (2.2267, 1_150_000, 0.9873, 0.00071),
    "alpha-pruned": (4.1453, 3_881_848, 0.6410, 0.62247),
    "alpha-2of4-kd": (2.3552, 3_881_848, 0.9111, 0.05277),
    "beta-w8": (12.8313, 5_110_000, 0.983, 0.00079),
}
ORIGINALS = {"alpha": (2.2251, 3_881_848, 969_216), "beta": (12.833, 6_960_000, 3_476_736)}


def result_record(name: str) -> Record:
    """Return the record of one of ``RECIPES``."""
    base = name.split("-")[0]
    quality, size, parameters = ORIGINALS.get(base, (0.0, 0, 1000))
    made = Record(
        recipe={"steps": RECIPES[name]},
        base_model={"id": f"somebody/{base}", "class": "LlamaForCausalLM", "parameters": parameters},
        stages=[{"steps": [], "driver": "blockwise", "seconds": 1.25, "device": "cpu"}],
        coverage={
            "step 1": {"weights_touched": 9, "weights_total": 10, "share": 0.9, "skipped": {"head": ["lm_head"]}}
        },
        steps={"0": {"technique": "x", "mean_error": 0.0125}},
        reload="STOCK_FORMAT" if "w" in name.split("-")[1] else "STOCK_DENSE",
        notes=["Group 32 does not divide `down_proj`."],
        finished=True,
    )
    if name in FIGURES:
        after = dict(zip(("perplexity", "bytes_on_disk", "top1_agreement", "kl"), FIGURES[name], strict=True))
        before = {"perplexity": quality, "bytes_on_disk": size}
        made.measured = {"before": before, "after": after, "evaluation": {"dataset": "eval.jsonl"}}
    return made


def write_results(folder: Path) -> Path:
    """Write the records of all ``RECIPES`` into a folder; return it."""
    for name in RECIPES:
        (folder / name).mkdir(parents=True)
        result_record(name).write(folder / name)
    return folder
