"""Our quantizers beside llm-compressor's GPTQ and AWQ and AutoRound: quality, time and memory on four models.

    python examples/quantization/beside_peers.py --models MODELS --data DATA --minilm MINILM --classifier SST2 \\
        --results model_cards/quantization/beside_peers.json --peers PYTHON --jobs 2

``MODELS`` holds babyllama-1m and stories260k, ``DATA`` tinystories, stsb and sst2; ``SST2`` is the output of
train_sst2_classifier.py. ``PYTHON`` is the interpreter of an environment with llmcompressor 0.14 and auto-round 0.15;
without it only our methods run. Every run is a process of its own with one thread; it gets the same calibration data as
the others of its draw, and returns dequantized weights, which are measured here, in one way for all. The results are
kept after each run: the same command goes on where it stopped. Then the page and the plot are written beside them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import beside_peers_page
import torch
from peer_cells import BITS, DRAWS, GROUP, GROUPS, METHODS, OURS, PEERS, SUBJECTS, Cell, Results, all_cells, matching
from peer_subjects import check_codes, draw_calibration, fingerprint, put_weights, write_job
from subjects import Subject, subjects

HOME = Path(__file__).parent
STEPS = 200  # of AutoRound for each block


@cache
def subject_of(folders: tuple[Path, Path | None, Path | None, Path], name: str) -> Subject:
    """Return a model with its data. Raises ``SystemExit`` if its folder was not given."""
    for subject in subjects(*folders):
        if subject.name == name:
            return subject
    raise SystemExit(f"{name}: give --minilm and --classifier, or leave the model out with --subjects")


def environment(cell: Cell, device: str) -> dict[str, str]:
    """Return the variables of a runner: one thread, nothing fetched; of the peers', none of our packages."""
    found = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    if not cell.ours:
        found.pop("PYTHONPATH", None)
    return found


def run_cell(cell: Cell, subject: Subject, python: str, device: str, recipe: str) -> dict[str, Any]:
    """Run one method in a process of its own, and measure its weights here; return the result of the cell."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        job = {
            "method": cell.method,
            "model": str(subject.path.resolve()),
            "auto_class": subject.auto_class,
            "bits": cell.bits,
            "group": cell.group,
            "symmetric": cell.symmetric,
            "draw": cell.draw,
            "steps": STEPS,
            "recipe": recipe.format(bits=cell.bits),
            "device": device,
        }
        write_job(folder, job, draw_calibration(subject, cell.draw))
        runner = HOME / ("our_runner.py" if cell.ours else "peer_runner.py")
        done = subprocess.run(
            [python, str(runner), home], capture_output=True, text=True, check=False, env=environment(cell, device)
        )
        if done.returncode or not (folder / "result.json").is_file():
            return {"failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "no output"}
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if "failed" not in result:
            try:
                result["quality"] = measure(subject, cell, folder / "weights.safetensors")
            except (ValueError, RuntimeError) as error:  # other values than asked for, or tensors of other shapes
                result["failed"] = str(error)[:300]
        return {**result, "device": device, "machine": f"{os.cpu_count()} cores, {platform.machine()}"}


def measure(subject: Subject, cell: Cell, weights: Path) -> float:
    """Measure a model with the weights of a file. Raises ``ValueError`` if they are not codes of the cell's bits."""
    from safetensors.torch import load_file

    model = subject.load(torch.device("cpu")).eval()
    put_weights(model, load_file(weights))
    check_codes(model, cell.bits, cell.group)
    return subject.measure(model)


def start_worker() -> None:
    torch.set_num_threads(1)


def run_all(cells: Sequence[Cell], given: argparse.Namespace, folders: tuple[Any, ...], results: Results) -> None:
    """Run the cells in ``--jobs`` processes, and keep each result as it comes; start none after ``--minutes``."""
    end = time.monotonic() + 60 * given.minutes
    waiting, running = list(cells), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=context, initializer=start_worker) as pool:
        while waiting or running:
            while waiting and len(running) < given.jobs and time.monotonic() < end:
                cell = waiting.pop(0)
                python = sys.executable if cell.ours else given.peers
                subject = subject_of(folders, cell.subject)
                running[pool.submit(run_cell, cell, subject, python, given.device, given.recipe)] = cell
            if not running:
                break
            future: Future[dict[str, Any]] = next(as_completed(running))
            cell = running.pop(future)
            results.add(cell, future.result())
            print(f"{cell.key}: {_shown(results.cells[cell.key])}", flush=True)
    if waiting:
        print(f"{len(waiting)} cells are left: run the same command again")


def _shown(result: Mapping[str, Any]) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    return f"{result['quality']:.4f}, {result['processor_seconds']:.0f} s, {result['peak_bytes'] / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--results", type=Path, required=True, help="the file that is read and continued")
    parser.add_argument("--peers", help="python of the environment with the other tools; without it they do not run")
    parser.add_argument("--only", choices=("ours", "peers"), help="only our methods, or only the other tools")
    parser.add_argument("--methods", nargs="*", default=["*"], help=f"patterns of {', '.join(METHODS)}")
    parser.add_argument("--subjects", nargs="*", default=["*"], help=f"patterns of {'; '.join(SUBJECTS)}")
    parser.add_argument("--bits", type=int, nargs="*", default=list(BITS), choices=BITS)
    parser.add_argument("--groups", nargs="*", default=[str(GROUP), "channel"], choices=[str(GROUP), "channel"])
    parser.add_argument("--draws", type=int, default=DRAWS, help=f"of calibration data ({DRAWS})")
    parser.add_argument("--recipe", default="w{bits}a16-best", help="of the method `best`: a name or a path")
    parser.add_argument("--again", nargs="*", default=[], help="patterns of cells that are computed again")
    parser.add_argument("--retry", action="store_true", help="also run cells that failed")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after that time")
    parser.add_argument("--device", default="cpu", help="where the methods run (cpu)")
    parser.add_argument("--render", action="store_true", help="only write the page and the plot")
    given = parser.parse_args()
    results = Results(given.results)
    if not given.render:
        if given.models is None or given.data is None:
            parser.error("give --models and --data, or --render")
        torch.set_num_threads(1)
        methods = matching(METHODS, given.methods)
        methods = [m for m in methods if given.only is None or (m in OURS) == (given.only == "ours")]
        methods = [m for m in methods if m in OURS or given.peers]
        if not methods:
            parser.error(f"no method is left to run; {', '.join(PEERS)} need --peers")
        groups = [group for group in GROUPS if (str(group) if group else "channel") in given.groups]
        cells = all_cells(matching(SUBJECTS, given.subjects), given.bits, groups, methods, given.draws)
        for key in matching(results.cells, given.again) if given.again else []:
            if key in {cell.key for cell in cells}:
                del results.cells[key]
        folders = (given.models, given.minilm, given.classifier, given.data)
        for name in dict.fromkeys(cell.subject for cell in cells):
            subject = subject_of(folders, name)
            model = subject.load(torch.device("cpu")).eval()
            weights, known = fingerprint(model), results.dense.get(name)
            results.set_dense(name, known["quality"] if known else subject.measure(model), weights)
        results.write()
        run_all(list(results.missing(cells, again=given.retry)), given, folders, results)
    beside_peers_page.render(given.results)


if __name__ == "__main__":
    main()
