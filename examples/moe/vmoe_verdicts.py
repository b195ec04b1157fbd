"""What the results of ``vmoe.py`` say of the paper's claims: paired differences, their confidence intervals, verdicts.

Differences are paired: models of one seed saw equal images in equal steps, and all classify the same test images. Seeds
and test images are both samples, so that the variance of a mean difference is taken as that over seeds, divided by
their number, and that over images, divided by theirs; that counts the noise of single answers twice, and errs on the
wide side. Intervals use Student's t with the degrees of freedom of the seeds, and hold together for all comparisons of
a claim (Bonferroni).
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import mean, variance
from typing import Any, NamedTuple

import numpy as np

CLEARLY = 0.01
"""Accuracy: smaller gains are none; and as much below the dense model still counts as its quality."""
SMALL = 0.5
"""The claim on priorities is about capacities up to this one; that on compute is examined at this one."""
LOW = "0.25"
"""That on a mixture which keeps up with its dense twin is examined at this one."""
CONFIDENCE = 0.95
SCRIPT = "examples/moe/vmoe.py"
SOURCE = "Riquelme et al., arXiv 2106.05974"


class Interval(NamedTuple):
    """A mean difference of accuracies and its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def student(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t, by bisection of the integral of its density; probability above 0.5."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    # With x = sqrt(freedom) tan(a) the integrand is a power of a cosine on a bounded range.
    factor = scale * math.sqrt(freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        steps = np.linspace(0, middle, 2001)
        area = 0.5 + factor * float(np.trapezoid(np.cos(steps) ** (freedom - 1), steps))
        low, high = (middle, high) if area < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def interval(seeds: list[float], images: np.ndarray | None, comparisons: int) -> Interval:
    """Return the mean of paired differences and its interval.

    Args:
        seeds: the difference of each seed, a mean over test images.
        images: that of each test image, a mean over seeds; None if only the seeds are known.
        comparisons: of the claim, which all hold at once with ``CONFIDENCE``.
    """
    center = mean(seeds)
    if len(seeds) < 2:
        return Interval(center, -1.0, 1.0)
    spread = variance(seeds) / len(seeds)
    if images is not None:
        spread += float(images.var(ddof=1)) / len(images)
    half = student(1 - (1 - CONFIDENCE) / comparisons / 2, len(seeds) - 1) * math.sqrt(spread)
    return Interval(center, center - half, center + half)


def shares(results: Mapping[str, Any], name: str, seeds: int) -> np.ndarray | None:
    """Return for each test image the share of seeds that classify it right, or None where it was not recorded."""
    held = results.get("right", {}).get(name)
    return None if held is None else np.frombuffer(base64.b64decode(held), np.uint8) / seeds


def models(results: Mapping[str, Any]) -> dict[tuple[str, int], list[Any]]:
    """Return the trainings of each V-MoE, by kind and width."""
    found: dict[tuple[str, int], list[Any]] = {}
    for kind in ("vmoe", "every_layer"):
        for row in results.get(kind, []):
            found.setdefault((kind, row["width"]), []).append(row)
    return found


def factors(results: Mapping[str, Any]) -> list[str]:
    """Return the capacity factors."""
    return list(results["vmoe"][0]["flops"])


def gain(results: Mapping[str, Any], kind: str, width: int, factor: str, comparisons: int) -> Interval:
    """Return how much more accurate a model is by priority than by position, in a batch, at a capacity factor."""
    rows = models(results)[kind, width]
    orders = [row["accuracy"]["batch"] for row in rows]
    each = [order["by priority"][factor] - order["by position"][factor] for order in orders]
    names = [f"{kind}/{width}/batch/{order}/{factor}" for order in ("by priority", "by position")]
    first, second = (shares(results, name, len(rows)) for name in names)
    return interval(each, None if first is None or second is None else first - second, comparisons)


def gains(results: Mapping[str, Any]) -> dict[tuple[str, int], dict[str, Interval]]:
    """Return the gains by model and small capacity factor, which hold together."""
    small = [factor for factor in factors(results) if float(factor) <= SMALL]
    number = len(models(results)) * len(small)
    return {model: {factor: gain(results, *model, factor, number) for factor in small} for model in models(results)}


def cost_of_dropping(rows: list[Any]) -> float:
    """Return the mean accuracy that the smallest capacity costs, by position in a batch."""
    least, most = (list(rows[0]["flops"])[end] for end in (0, -1))
    return mean(
        r["accuracy"]["batch"]["by position"][most] - r["accuracy"]["batch"]["by position"][least] for r in rows
    )


def judge_priority(found: list[Interval]) -> str:
    """Return the verdict on priorities: whether every interval is above zero, or the gains are at least bounded."""
    won = [one.low > 0 for one in found]
    if all(won):
        return "confirmed"
    if any(won):
        return "mixed"
    return "contradicted" if all(one.high < CLEARLY for one in found) else "not testable here"


def dense_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """Return the dense trainings, by width."""
    widths = sorted({row["width"] for row in results["dense"]})
    return [sorted((r for r in results["dense"] if r["width"] == w), key=lambda r: r["seed"]) for w in widths]


def dense_curve(results: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return (FLOPs, mean accuracy) of the dense models, by width."""
    return [(rows[0]["flops"], mean(row["accuracy"] for row in rows)) for rows in dense_rows(results)]


def beside_dense(results: Mapping[str, Any], width: int, times: float, comparisons: int) -> Interval | None:
    """Return the accuracy of V-MoE at C = 0.5, by priority, minus that of dense models of ``times`` its FLOPs.

    Their accuracy is interpolated between two widths, linearly in the logarithm of FLOPs, for each seed and each test
    image. None if no two widths have these FLOPs between them.
    """
    rows = sorted(models(results)["vmoe", width], key=lambda row: row["seed"])
    wanted, dense = rows[0]["flops"][f"{SMALL:g}"] * times, dense_rows(results)
    for low, high in pairwise(dense):
        a, b = low[0]["flops"], high[0]["flops"]
        # A slot is a whole number of tokens, so that a twin of equal FLOPs may lie a little outside.
        if not 0.98 * a <= wanted <= 1.02 * b:
            continue
        part = math.log(wanted / a) / math.log(b / a)
        own = [row["accuracy"]["batch"]["by priority"][f"{SMALL:g}"] for row in rows]
        each = [
            mine - (1 - part) * one["accuracy"] - part * two["accuracy"]
            for mine, one, two in zip(own, low, high, strict=True)
        ]
        names = [f"vmoe/{width}/batch/by priority/{SMALL:g}", f"dense/{low[0]['width']}", f"dense/{high[0]['width']}"]
        held = [found for name in names if (found := shares(results, name, len(rows))) is not None]
        images = held[0] - (1 - part) * held[1] - part * held[2] if len(held) == 3 else None
        return interval(each, images, comparisons)
    return None


def beside_twin(results: Mapping[str, Any], width: int) -> Interval:
    """Return the accuracy of V-MoE at C = 0.25, by priority, minus that of the dense model of its width."""
    rows = sorted(models(results)["vmoe", width], key=lambda row: row["seed"])
    (twins,) = [dense for dense in dense_rows(results) if dense[0]["width"] == width]
    own = [row["accuracy"]["batch"]["by priority"][LOW] for row in rows]
    each = [mine - twin["accuracy"] for mine, twin in zip(own, twins, strict=True)]
    names = f"vmoe/{width}/batch/by priority/{LOW}", f"dense/{width}"
    first, second = (shares(results, name, len(rows)) for name in names)
    images = None if first is None or second is None else first - second
    return interval(each, images, len(widths(results)))


def widths(results: Mapping[str, Any]) -> list[int]:
    """Return the widths of the V-MoEs with mixtures in every second layer."""
    return sorted({row["width"] for row in results["vmoe"]})


def halves(results: Mapping[str, Any]) -> dict[int, Interval]:
    """Return V-MoE at C = 0.5 minus dense models of twice its FLOPs, by width, where there are such models."""
    found = {width: beside_dense(results, width, 2.0, len(widths(results))) for width in widths(results)}
    return {width: one for width, one in found.items() if one is not None}


def judge_compute(found: list[Interval]) -> str:
    """Return the verdict on compute: V-MoE is at most ``CLEARLY`` below dense models of twice its FLOPs, or below."""
    reached = [one.low > -CLEARLY for one in found]
    if found and all(reached):
        return "confirmed"
    if found and all(one.high < 0 and one.low <= -CLEARLY for one in found):
        return "contradicted"
    return "mixed" if any(reached) else "not testable here"


def sampled(results: Mapping[str, Any]) -> str:
    """Return what intervals are over."""
    return "seeds and test images" if results.get("right") else "seeds alone"


def setting(results: Mapping[str, Any]) -> str:
    """Return in a phrase what was trained."""
    return (
        f"CIFAR-10, {results['train_images']:,} training and {results['test_images']:,} test images; ViTs of "
        f"{results['depth']} layers, patches of {results['patch']}, {results['steps']:,} steps of {results['batch']} "
        f"images from scratch, {len({row['seed'] for row in results['vmoe']})} seeds"
    )


def named(kind: str, width: int) -> str:
    """Return a model in words."""
    return f"mixtures in every {'second ' if kind == 'vmoe' else ''}layer, width {width}"


def claims(results: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Return the claims of the paper with the verdicts that follow from the figures."""
    found, twice = gains(results), halves(results)
    texts = [
        f"{named(*model)}: " + ", ".join(f"{one} at C = {factor}" for factor, one in each.items())
        + f", where C = {factors(results)[0]} by position costs {cost_of_dropping(models(results)[model]):.3f}"
        for model, each in found.items()
    ]  # fmt: skip
    twins = {width: beside_dense(results, width, 1.0, len(widths(results))) for width in widths(results)}
    spoken = [f"width {width}: {one} beside dense models of twice its FLOPs" for width, one in twice.items()]
    spoken += [f"width {width}: {one} beside dense models of its own FLOPs" for width, one in twins.items() if one]
    intervals = f"{CONFIDENCE:.0%} intervals over {sampled(results)}, paired by seed, for all comparisons at once"
    priority = {
        "technique": "batch_priority_routing",
        "claim": "At a capacity factor of 0.5 and less, slots by priority are clearly above slots by position, on "
        "images.",
        "source": SOURCE,
        "script": SCRIPT,
        "ours": f"accuracy by priority minus by position: {'; '.join(texts)}",
        "setting": setting(results),
        "verdict": judge_priority([one for each in found.values() for one in each.values()]),
        "why": f"{intervals}; confirmed if every one is above zero, contradicted if all are below {CLEARLY:g} and none "
        "above zero. Patches compete within a batch, as published; models are trained with C = 1.05, by position",
    }
    compute = {
        "technique": "vmoe",
        "claim": "V-MoE matches the quality of dense models with about half of the compute at inference.",
        "source": SOURCE,
        "script": SCRIPT,
        "ours": f"accuracy with mixtures in every second layer at C = {SMALL:g}: {'; '.join(spoken)}",
        "setting": setting(results),
        "verdict": judge_compute(list(twice.values())),
        "why": f"{intervals}; confirmed if every one is above -{CLEARLY:g} beside dense models of twice the FLOPs, "
        "contradicted if every one is below zero; accuracy of dense models is interpolated between widths, at equal "
        f"training steps. The paper trains on 300 million images, where the capacity of many experts pays; here there "
        f"are {results['train_images']:,}",
    }
    kept = {width: beside_twin(results, width) for width in widths(results)}
    share = mean(rows[0]["flops"][LOW] for (kind, _), rows in models(results).items() if kind == "vmoe")
    dense = mean(rows[0]["flops"] for rows in dense_rows(results) if rows[0]["width"] in kept)
    low = {
        "technique": "batch_priority_routing",
        "claim": "By priority, a mixture keeps up with a dense model even at quite low capacities.",
        "source": "Riquelme et al. 2106.05974; survey",
        "script": SCRIPT,
        "ours": f"accuracy at C = {LOW} minus that of the dense model of the same width: "
        + "; ".join(f"width {width}: {one}" for width, one in kept.items())
        + f"; at {share / dense:.2f} of its FLOPs",
        "setting": setting(results),
        "verdict": judge_compute(list(kept.values())),
        "why": f"{intervals}; confirmed if every one is above -{CLEARLY:g}, contradicted if every one is below zero",
    }
    return {"vmoe": [compute], "batch_priority_routing": [priority, low]}
