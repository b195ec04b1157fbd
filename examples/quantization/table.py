"""Compute the quantization table: every technique on four real models. A second run resumes where the first stopped.

    python examples/quantization/table.py --models MODELS --data DATA --minilm MINILM --classifier SST2 \\
        --output model_cards/quantization

``MODELS`` holds babyllama-1m and stories260k, ``DATA`` tinystories, stsb and sst2; ``SST2`` is the output of
train_sst2_classifier.py. For every cell, the model is loaded, optimized (and trained, if the recipe trains), evaluated,
saved, and reloaded by stock transformers in a process that cannot import hf_optim; a REMOTE_CODE checkpoint must first
be refused there. Cells that ``results.json`` already has are computed only with ``--again``. The table takes minutes on
a GPU, and an hour or two on a few CPU cores.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import page
import torch
from rows import ROWS, Row
from subjects import Subject, subjects

import hf_optim
from hf_optim import DataConfig, OptimConfig, OptimError, Reload, run_of
from hf_optim.evaluation.sizes import bytes_on_disk
from hf_optim.testing.stock import StockTransformers
from hf_optim_plugins.quantization import llm_int8

log = logging.getLogger("table")


def compute_cell(row: Row, subject: Subject, device: torch.device, stock: StockTransformers) -> dict[str, Any]:
    """Compute one cell: the metric, the bytes on disk, the seconds, and the result of the stock reload."""
    started = time.perf_counter()
    model = subject.load(device)
    if not row.steps:
        return {"figure": subject.measure(model), "bytes": bytes_on_disk(subject.path), "reload": "STOCK_DENSE"}
    recipe = OptimConfig(OptimConfig.parse(list(row.steps)).steps, DataConfig(samples=subject.calibration.samples))
    try:
        model = hf_optim.optimize(model, recipe, subject.calibration_data(), tokenizer=subject.tokenizer)
        if run_of(model).stage is not None:
            model = subject.train(model, row.learning_rate)
    except OptimError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - started
    run = run_of(model.eval())  # the Trainer leaves dropout on
    with tempfile.TemporaryDirectory() as home:
        model.save_pretrained(home)
        result = {"bytes": bytes_on_disk(Path(home)), "reload": run.record.reload, "seconds": round(seconds, 1)}
        result["stock"] = compare_with_stock(model.cpu(), Path(home), subject, run.record.reload, stock)
    model.to(device)
    if any(step["technique"] == "llm_int8" for step in row.steps):
        # Only the kernel quantizes inputs and separates outliers; the checkpoint has 8-bit weights without that.
        hf_optim.accelerate(model, [llm_int8.kernel(everywhere=True)])
    return {"figure": subject.measure(model), **result}


def compare_with_stock(model: Any, home: Path, subject: Subject, level: str, stock: StockTransformers) -> str:
    """Compare the outputs with those of stock transformers on the checkpoint: ``equal``, or the largest difference.

    If the checkpoint has remote code, stock transformers must first refuse it without ``trust_remote_code``.
    """
    remote = level == Reload.REMOTE_CODE.name
    ids = subject.tokenizer("Once upon a time there was a little girl", return_tensors="pt")["input_ids"]
    refused = ""
    if remote:
        try:
            stock.logits(home, subject.auto_class, {"input_ids": ids})
            return "loaded without trust_remote_code"
        except OSError as error:
            if "trust_remote_code" not in str(error) and "custom code" not in str(error):
                raise
            refused = "refused, then "
    _, expected = stock.logits(home, subject.auto_class, {"input_ids": ids}, trust_remote_code=remote)
    with torch.no_grad():
        output = model(input_ids=ids)
    actual = output.logits if "logits" in output else output.last_hidden_state
    difference = float((actual.float() - expected.float()).abs().max())
    return refused + ("equal" if difference == 0 else f"{difference:.1e} off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of row names, such as 'gobo*'")
    parser.add_argument("--subjects", nargs="*", default=["*"], help="patterns of model names")
    parser.add_argument("--again", action="store_true", help="also compute cells that results.json has")
    parser.add_argument("--render", action="store_true", help="only write README.md and the plot, from results.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    results = page.read(args.output)
    with StockTransformers() as stock:
        for subject in [] if args.render else subjects(args.models, args.minilm, args.classifier, args.data):
            if not any(fnmatch.fnmatch(subject.name, pattern) for pattern in args.subjects):
                continue
            for row in ROWS:
                key = f"{row.name} | {row.bits}"
                known = results["cells"].setdefault(key, {})
                selected = any(fnmatch.fnmatch(row.name, p) for p in args.only) and subject.supports(row.steps)
                if not selected or (subject.name in known and not args.again):
                    continue
                try:
                    known[subject.name] = compute_cell(row, subject, device, stock)
                except Exception as error:  # a failed cell is recorded; the table continues
                    log.exception("%s on %s", key, subject.name)
                    known[subject.name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                print(f"{subject.name:18} {key:32} {json.dumps(known[subject.name])}", flush=True)
                page.write(args.output, results, device)
    page.render(args.output, ROWS)


if __name__ == "__main__":
    main()
