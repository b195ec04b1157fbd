"""Sparsity against quality for the pruning family, on two real models, three seeds each; by one command.

    python examples/pruning/sweep.py --models MODELS --data DATA --minilm MINILM --output model_cards/pruning

``MODELS`` holds babyllama-1m; ``DATA`` tinystories and sst2; ``MINILM`` is all-MiniLM-L6-v2. Every method gets the same
model, data and number of optimizer steps; what differs is the recipe (``methods.py``). Runs that are in
``results.json`` already are not repeated. ``--workers`` processes share the runs, on all GPUs there are; a run takes
half a minute on a GPU of 2022, several minutes on a CPU, so choose with ``--only``, ``--subjects`` and ``--seeds``
there. The page and the plot are written at the end, or alone with ``--render``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import page
import torch
from methods import DENSE, METHODS, SPARSITIES, Method
from subjects import Subject, babyllama, calibration, minilm
from transformers import Trainer, set_seed

import hf_optim
from hf_optim.toolkit import topology
from hf_optim.training.fit import training_arguments

log = logging.getLogger("sweep")


def jobs(args: argparse.Namespace, subjects: list[str]) -> list[tuple[str, Method, float, int]]:
    """(subject, method, sparsity, seed), seed by seed, so that a sweep that is cut short has whole seeds."""
    found = []
    for seed in range(args.seeds):
        for subject in subjects:
            found.append((subject, DENSE, 0.0, seed))
            for method in METHODS:
                found += [(subject, method, s, seed) for s in args.sparsities if method.trains or seed == 0]
    return [job for job in found if any(fnmatch.fnmatch(job[1].name, pattern) for pattern in args.only)]


def compute(subject: Subject, method: Method, sparsity: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run: optimize, train, measure."""
    started = time.perf_counter()
    set_seed(seed)
    model = subject.load().to("cuda" if torch.cuda.is_available() else "cpu")
    rows, collator = subject.rows
    recipe = method.recipe(sparsity, subject.shape)
    if recipe:
        model = hf_optim.optimize(model, recipe, calibration(rows, collator, seed), tokenizer=subject.tokenizer)
    steps = 0
    if method.trains:
        model, steps = train(subject, model, bool(recipe), seed, args), args.steps
    found = {"figure": subject.measure(model), "steps": steps, "seconds": round(time.perf_counter() - started, 1)}
    weights = sum(int(module.weight.count_nonzero()) for module in linears(model))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {**found, "weights": weights, "sparsity": round(1.0 - weights / subject.shape.weights, 6), "device": device}


def linears(model: Any) -> list[torch.nn.Linear]:
    """The linear layers of the blocks."""
    blocks = [block.module for block in topology.blocks(model)]
    return [module for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)]


def train(subject: Subject, model: Any, optimized: bool, seed: int, args: argparse.Namespace) -> Any:
    rows, collator = subject.rows
    arguments = {
        **subject.training,
        "max_steps": args.steps,
        "warmup_steps": args.steps // 40,
        "lr_scheduler_type": "linear",
        "seed": seed,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    with tempfile.TemporaryDirectory() as home:
        trainer = (hf_optim.OptimTrainer if optimized else Trainer)(
            model=model,
            args=training_arguments(home, arguments),
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=collator,
        )
        trainer.train()
    return trainer.run.model if optimized else model  # type: ignore[union-attr]


def known(args: argparse.Namespace) -> list[Subject]:
    found = [babyllama(args.models, args.data)] if args.models else []
    found += [minilm(args.minilm, args.data)] if args.minilm else []
    return [s for s in found if any(fnmatch.fnmatch(s.name, pattern) for pattern in args.subjects)]


def key(subject: str, method: Method, sparsity: float, seed: int) -> str:
    return f"{subject} | {method.name} | {sparsity:g} | {seed}"


def work(args: argparse.Namespace) -> None:
    """Take jobs that nobody has taken, until there are none or time is up; a file for each result."""
    subjects = {subject.name: subject for subject in known(args)}
    done = page.read(args.output)["runs"]
    for number, job in enumerate(jobs(args, list(subjects))):
        if time.time() > args.until or key(*job) in done or not claim(args.claims / f"{number}.claim"):
            continue
        try:
            result = compute(subjects[job[0]], *job[1:], args)
        except Exception as error:  # one run that fails is a gap in the table, not its end
            log.exception("%s", key(*job))
            result = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(f"{key(*job):60} {json.dumps(result)}", flush=True)
        (args.claims / f"{number}.json").write_text(json.dumps({key(*job): result}), encoding="utf-8")


def claim(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def gather(args: argparse.Namespace) -> None:
    results = page.read(args.output)
    for path in args.claims.glob("*.json"):
        results["runs"] |= json.loads(path.read_text(encoding="utf-8"))
    results["notes"] = [
        *results.get("notes", []),
        *(note for note in args.note if note not in results.get("notes", [])),
    ]
    page.write(args.output, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of babyllama-1m")
    parser.add_argument("--minilm", type=Path, help="the encoder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="*", default=list(SPARSITIES))
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of method names")
    parser.add_argument("--subjects", nargs="*", default=["*"], help="patterns of model names")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no run is begun")
    parser.add_argument("--note", nargs="*", default=[], help="sentences for the page, of what was particular to a run")
    parser.add_argument("--render", action="store_true", help="only write README.md and the plot anew")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.claims is not None:
        work(args)
        return
    if not args.render:
        with tempfile.TemporaryDirectory() as home:
            args.claims = Path(home)
            limit = ["--claims", home, "--until", str(time.time() + args.time_limit)]
            gpus = max(1, torch.cuda.device_count())
            workers = [
                subprocess.Popen(
                    [sys.executable, *sys.argv, *limit], env={**os.environ, "CUDA_VISIBLE_DEVICES": str(n % gpus)}
                )
                for n in range(args.workers)
            ]
            for worker in workers:
                worker.wait()
            gather(args)
    page.render(args.output)


if __name__ == "__main__":
    main()
