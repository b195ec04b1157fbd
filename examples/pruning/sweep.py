"""Measure sparsity against quality for the pruning family, on two real models with three seeds each.

    python examples/pruning/sweep.py --models MODELS --data DATA --minilm MINILM --output model_cards/pruning

``MODELS`` holds babyllama-1m, ``DATA`` tinystories and sst2; ``MINILM`` is all-MiniLM-L6-v2. Every method gets the same
model, data and number of optimizer steps; only the recipe differs (``methods.py``). Runs that ``results.json`` already
has are not repeated. ``--workers`` processes share the runs and all GPUs. A run takes half a minute on a GPU of 2022
and several minutes on a CPU; there, select runs with ``--only``, ``--subjects`` and ``--seeds``. The page and the plot
are written at the end; ``--render`` writes only them.
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
from subjects import Subject, babyllama, calibration_batches, minilm
from transformers import Trainer, set_seed

import hf_optim
from hf_optim.toolkit import topology
from hf_optim.training.fit import training_arguments

log = logging.getLogger("sweep")


def list_jobs(args: argparse.Namespace, subjects: list[str]) -> list[tuple[str, Method, float, int]]:
    """Return (subject, method, sparsity, seed) of each run, one seed after the other.

    So an interrupted sweep has all methods for its first seeds.
    """
    jobs = []
    for seed in range(args.seeds):
        for subject in subjects:
            jobs.append((subject, DENSE, 0.0, seed))
            for method in METHODS:
                jobs += [(subject, method, s, seed) for s in args.sparsities if method.trains or seed == 0]
    return [job for job in jobs if any(fnmatch.fnmatch(job[1].name, pattern) for pattern in args.only)]


def compute(subject: Subject, method: Method, sparsity: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one job: optimize, train, measure."""
    started = time.perf_counter()
    set_seed(seed)
    model = subject.load().to("cuda" if torch.cuda.is_available() else "cpu")
    recipe = method.recipe(sparsity, subject.shape)
    if recipe:
        batches = calibration_batches(*subject.training_data, seed)
        model = hf_optim.optimize(model, recipe, batches, tokenizer=subject.tokenizer)
    steps = 0
    if method.trains:
        model, steps = train(subject, model, bool(recipe), seed, args), args.steps
    result = {"figure": subject.measure(model), "steps": steps, "seconds": round(time.perf_counter() - started, 1)}
    weights = sum(int(module.weight.count_nonzero()) for module in block_linears(model))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {**result, "weights": weights, "sparsity": round(1.0 - weights / subject.shape.weights, 6), "device": device}


def block_linears(model: Any) -> list[torch.nn.Linear]:
    """Return the linear layers of the blocks."""
    blocks = [block.module for block in topology.blocks(model)]
    return [module for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)]


def train(subject: Subject, model: Any, optimized: bool, seed: int, args: argparse.Namespace) -> Any:
    """Train the model, with ``OptimTrainer`` if it was optimized; return the trained model.

    The learning rate warms up over 1/40 of the steps and then falls linearly.
    """
    examples, collator = subject.training_data
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
            train_dataset=examples,  # type: ignore[arg-type]
            data_collator=collator,
        )
        trainer.train()
    return trainer.run.model if optimized else model  # type: ignore[union-attr]


def select_subjects(args: argparse.Namespace) -> list[Subject]:
    """Return the subjects whose folders were given and whose names match ``--subjects``."""
    given = [babyllama(args.models, args.data)] if args.models else []
    given += [minilm(args.minilm, args.data)] if args.minilm else []
    return [s for s in given if any(fnmatch.fnmatch(s.name, pattern) for pattern in args.subjects)]


def run_key(subject: str, method: Method, sparsity: float, seed: int) -> str:
    """Return the key of a run in ``results.json``."""
    return f"{subject} | {method.name} | {sparsity:g} | {seed}"


def run_worker(args: argparse.Namespace) -> None:
    """Run jobs that no other worker has claimed, until none is left or the time is up; write one file per result."""
    subjects = {subject.name: subject for subject in select_subjects(args)}
    done = page.read(args.output)["runs"]
    for number, job in enumerate(list_jobs(args, list(subjects))):
        key = run_key(*job)
        if time.time() > args.until or key in done or not claim(args.claims / f"{number}.claim"):
            continue
        try:
            result = compute(subjects[job[0]], *job[1:], args)
        except Exception as error:  # a failed run leaves a gap in the table; the sweep continues
            log.exception("%s", key)
            result = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(f"{key:60} {json.dumps(result)}", flush=True)
        (args.claims / f"{number}.json").write_text(json.dumps({key: result}), encoding="utf-8")


def claim(path: Path) -> bool:
    """Create the file of a claim; return False if another worker has created it."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def collect_results(args: argparse.Namespace) -> None:
    """Add the results of all workers and the new notes to ``results.json``."""
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
    parser.add_argument("--models", type=Path, help="folder that holds babyllama-1m")
    parser.add_argument("--minilm", type=Path, help="folder of the encoder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="*", default=list(SPARSITIES))
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of method names")
    parser.add_argument("--subjects", nargs="*", default=["*"], help="patterns of model names")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no run is started")
    parser.add_argument("--note", nargs="*", default=[], help="sentences for the page, about peculiarities of a run")
    parser.add_argument("--render", action="store_true", help="only write README.md and the plot, from results.json")
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.claims is not None:
        run_worker(args)
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
            collect_results(args)
    page.render(args.output)


if __name__ == "__main__":
    main()
