"""The bits and bytes that quantizers report, recomputed from a checkpoint (``Technique.recompute``)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim.toolkit.statistics import enable_double_backward, random_direction, sample_microbatches


def gobo(case: Any) -> dict[str, Any]:
    """Return the figures of ``gobo`` from the tensors of the checkpoint and the errors of the decoded weights."""
    layers = {}
    for name in case.names:
        dense, coded = case.weight(case.before, name), case.weight(case.after, name)
        centroids = case.tensors[f"{name}.centroids"]
        size, bits = case.bytes_of(name), len(centroids).bit_length() - 1
        if case.before.get_submodule(name).bias is not None:
            assert f"{name}.bias" in case.tensors
        outliers = case.tensors[f"{name}.outliers"].numel()
        layers[name] = {
            "bits": bits,
            "weights": dense.numel(),
            "outliers": outliers,
            "iterations": _iterations(dense, coded, centroids),
            "l1_error": float((coded - dense).abs().sum() / dense.abs().sum()),
            "l2_error": float((coded - dense).norm() / dense.norm()),
            "outlier_share": outliers / dense.numel(),
            "bits_per_weight": 8 * size / dense.numel(),
            "bytes_before": dense.numel() * case.before.get_parameter(f"{name}.weight").element_size(),
            "bytes": size,
        }
    sums = {key: sum(own[key] for own in layers.values()) for key in ("bytes_before", "bytes", "weights", "outliers")}
    return {
        "layers": layers,
        "bytes_before": sums["bytes_before"],
        "bytes": sums["bytes"],
        "bits_per_weight": 8 * sums["bytes"] / sums["weights"],
        "outlier_share": sums["outliers"] / sums["weights"],
    }


def _iterations(dense: Tensor, coded: Tensor, centroids: Tensor) -> int:
    """Return how many steps of the paper's algorithm lead to the centroids of a layer, beginning with equal bins."""
    inner = torch.isin(coded.float(), centroids.float())
    values = dense[inner].sort().values
    ends = [number * len(values) // len(centroids) for number in range(len(centroids) + 1)]
    found = torch.stack([values[a:b].mean() for a, b in itertools.pairwise(ends)])
    sums: list[float] = []
    while True:
        distance = (values[:, None] - found).abs()
        own, code = distance.min(1)
        sums.append(float(own.sum()))
        if len(sums) > 1 and sums[-1] >= sums[-2]:
            return len(sums) - 2
        members = [values[code == number] for number in range(len(found))]
        found = torch.stack([part.mean() if len(part) else old for part, old in zip(members, found, strict=True)])


def qbert(case: Any, step: Any) -> dict[str, Any]:
    """Return eigenvalues by power iteration on plain double backward, bits and bytes from the checkpoint."""
    bits, layers, parts = case.bits(), {}, sample_microbatches(case.batches, step.shards, step.rows)
    weights = {name: case.before.get_parameter(f"{name}.weight") for name in case.names}
    with enable_double_backward(case.before, weights.values()):
        for name, weight in weights.items():
            values = _eigenvalues(case.before, weight, parts, step)
            mean = sum(values) / len(values)
            std = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
            layers[name] = {"mean": mean, "std": std, "omega": abs(mean) + std, "bits": bits[name]}
    shapes = {name: case.weight(case.before, name).shape for name in case.names}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    allowed = {name: int(rows * (_words(columns, step.budget) + 4)) for name, (rows, columns) in shapes.items()}
    return {
        "layers": layers,
        "bytes": sum(map(case.bytes_of, case.names)),
        "bytes_allowed": sum(allowed.values()),
        "mean_bits": sum(sizes[name] * bits[name] for name in case.names) / sum(sizes.values()),
    }


def _eigenvalues(model: nn.Module, weight: Tensor, parts: list[Any], step: Any) -> list[float]:
    """Return the top eigenvalue of the loss's Hessian in a weight on every part; each starts at the last's vector."""
    vector, values = random_direction(weight), []
    for part in parts:
        logits = model(**part).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), part["input_ids"][:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        vector, value = vector / vector.norm(), 0.0
        for number in range(step.iterations):
            (image,) = torch.autograd.grad((gradient * vector).sum(), weight, retain_graph=True)
            last, value = value, float((vector * image).sum())
            if number and abs(value - last) <= step.tolerance * abs(value):
                break
            vector = image / image.norm()
        values.append(value)
    return values


def _words(columns: int, bits: float) -> float:
    """Return the bytes of a row of codes, packed into words of 32 bits; between whole bits it grows linearly."""

    def whole(width: int) -> int:
        return 4 * -(-columns * width // 32)

    return whole(int(bits)) + (bits - int(bits)) * (whole(int(bits) + 1) - whole(int(bits)))
