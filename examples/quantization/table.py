"""The quantization table: every technique on four real models, by one command that can be run again.

    python examples/quantization/table.py --models MODELS --data DATA --minilm MINILM --classifier SST2 \\
        --output model_cards/quantization

``MODELS`` holds babyllama-1m and stories260k, ``DATA`` tinystories, stsb and sst2; ``SST2`` is what
train_sst2_classifier.py makes. Every cell is computed: the model is loaded, optimized (and trained, where the row
trains), measured, saved, and reloaded by stock transformers in a process that cannot import hf_optim; a REMOTE_CODE
checkpoint must first be refused there. Cells that are in ``results.json`` already are not computed again, unless
``--again`` says so. Minutes on a GPU, an hour or two on a few CPU cores.
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

import rendering
import torch
from rows import ROWS, Row
from subjects import Subject, subjects

import hf_optim
from hf_optim import DataConfig, OptimConfig, OptimError, Reload, run_of
from hf_optim.evaluation.sizes import bytes_on_disk
from hf_optim.testing.stock import StockTransformers
from hf_optim_plugins.quantization import llm_int8

log = logging.getLogger("table")


def cell(row: Row, subject: Subject, device: torch.device, stock: StockTransformers) -> dict[str, Any]:
    """One cell: the figure of merit, the bytes, the seconds, and how the checkpoint came back."""
    started = time.perf_counter()
    model = subject.load(device)
    if not row.steps:
        return {"figure": subject.measure(model), "bytes": bytes_on_disk(subject.path), "reload": "STOCK_DENSE"}
    recipe = OptimConfig(OptimConfig.parse(list(row.steps)).steps, DataConfig(samples=subject.calibration.samples))
    try:
        model = hf_optim.optimize(model, recipe, subject.batches(), tokenizer=subject.tokenizer)
        if run_of(model).stage is not None:
            model = subject.train(model, row.learning_rate)
    except OptimError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - started
    run = run_of(model.eval())  # a trainer leaves it with dropout
    with tempfile.TemporaryDirectory() as home:
        model.save_pretrained(home)
        found = {"bytes": bytes_on_disk(Path(home)), "reload": run.record.reload, "seconds": round(seconds, 1)}
        found["stock"] = reloaded(model.cpu(), Path(home), subject, run.record.reload, stock)
    model.to(device)
    if any(step["technique"] == "llm_int8" for step in row.steps):
        # Outliers are computed apart by the kernel; what stock transformers reads rounds no input at all.
        hf_optim.accelerate(model, [llm_int8.kernel(everywhere=True)])
    return {"figure": subject.measure(model), **found}


def reloaded(model: Any, home: Path, subject: Subject, level: str, stock: StockTransformers) -> str:
    """What stock transformers makes of the checkpoint: ``equal``, or how far it is off; refusal first, if remote."""
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
    _, theirs = stock.logits(home, subject.auto_class, {"input_ids": ids}, trust_remote_code=remote)
    with torch.no_grad():
        output = model(input_ids=ids)
    ours = output.logits if "logits" in output else output.last_hidden_state
    gap = float((ours.float() - theirs.float()).abs().max())
    return refused + ("equal" if gap == 0 else f"{gap:.1e} off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of row names, such as 'gobo*'")
    parser.add_argument("--subjects", nargs="*", default=["*"], help="patterns of model names")
    parser.add_argument("--again", action="store_true", help="compute cells that are there already")
    parser.add_argument("--render", action="store_true", help="only write README.md and the plot anew")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output.mkdir(parents=True, exist_ok=True)
    results = rendering.read(args.output)
    with StockTransformers() as stock:
        for subject in [] if args.render else subjects(args.models, args.minilm, args.classifier, args.data):
            if not any(fnmatch.fnmatch(subject.name, pattern) for pattern in args.subjects):
                continue
            for row in ROWS:
                key = f"{row.name} | {row.bits}"
                known = results["cells"].setdefault(key, {})
                chosen = any(fnmatch.fnmatch(row.name, pattern) for pattern in args.only) and subject.takes(row.steps)
                if not chosen or (subject.name in known and not args.again):
                    continue
                try:
                    known[subject.name] = cell(row, subject, device, stock)
                except Exception as error:  # one cell that fails is a cell of the table, not its end
                    log.exception("%s on %s", key, subject.name)
                    known[subject.name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                print(f"{subject.name:18} {key:32} {json.dumps(known[subject.name])}", flush=True)
                rendering.write(args.output, results, device)
    rendering.render(args.output, ROWS)


if __name__ == "__main__":
    main()
