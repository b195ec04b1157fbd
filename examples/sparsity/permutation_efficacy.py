"""Measure the efficacy of channel permutations for 2:4 on the random matrix of the paper's code: 128 rows, 64 columns.

    efficacy = (kept after - kept before) / (kept row-wise - kept before) · 100

where "row-wise" keeps the largest half of each row, without groups. The published values (35.5 for stripe groups of 8
columns, 36.6 for 12) belong to one matrix: numpy's uniform [0, 1) with seed 1. The script reports that matrix, the mean
over ten seeds, and the same for two other distributions, on one thread:

    python examples/sparsity/permutation_efficacy.py --out efficacy.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_optim.toolkit.permutation import search_permutation

REFERENCE = {"stripe groups of 8": 35.5, "stripe groups of 12": 36.6, "seconds on a CPU, groups of 8": 60.653}
MATRICES: dict[str, Callable[[int], np.ndarray]] = {
    "uniform [0, 1)": lambda seed: np.random.RandomState(seed).rand(128, 64),
    "uniform [-1, 1)": lambda seed: 2 * np.random.RandomState(seed).rand(128, 64) - 1,
    "gaussian": lambda seed: np.random.RandomState(seed).randn(128, 64),
}
SEARCHES: dict[str, dict[str, int]] = {
    "8 columns, one start": {"stripes": 2, "tries": 0, "starts": 1},
    "8 columns": {"stripes": 2, "tries": 0},
    "8 columns, 100 regressions": {"stripes": 2, "tries": 100},
    "8 columns, 1000 regressions": {"stripes": 2, "tries": 1000},
    "12 columns, one start": {"stripes": 3, "tries": 0, "starts": 1},
    "12 columns": {"stripes": 3, "tries": 0},
    "12 columns, 1000 regressions": {"stripes": 3, "tries": 1000},
}


def measure(make: Callable[[int], np.ndarray], options: dict[str, int], seeds: range) -> dict[str, Any]:
    """Return the efficacy in percent and the seconds of the search, for each seed of the matrix."""
    efficacies, seconds = [], []
    for seed in seeds:
        weight = torch.from_numpy(make(seed))
        started = time.perf_counter()
        result = search_permutation(weight, **options)
        seconds.append(round(time.perf_counter() - started, 4))
        efficacies.append(round(100 * result.efficacy, 2))
    return {"efficacy": efficacies, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--seeds", type=int, default=10, help="number of matrices of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(1, arguments.seeds + 1)
    search_permutation(torch.from_numpy(MATRICES["gaussian"](0)), stripes=3)  # builds the cached lists of splits
    table: dict[str, Any] = {"reference": REFERENCE, "shape": [128, 64], "seeds": list(seeds), "results": {}}
    print(
        f"{'matrix':<16}{'search':<30}{'seed 1':>8}{'mean':>8}{'lowest':>8}{'highest':>8}{'seconds':>9}{'slowest':>9}"
    )
    for matrix, make in MATRICES.items():
        for name, options in SEARCHES.items():
            result = measure(make, options, seeds)
            table["results"].setdefault(matrix, {})[name] = {**options, **result}
            efficacy, seconds = result["efficacy"], result["seconds"]
            print(
                f"{matrix:<16}{name:<30}{efficacy[0]:>9.1f}{statistics.mean(efficacy):>9.2f}{min(efficacy):>9.1f}"
                f"{max(efficacy):>9.1f}{statistics.mean(seconds):>9.3f}{max(seconds):>9.3f}",
                flush=True,
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
