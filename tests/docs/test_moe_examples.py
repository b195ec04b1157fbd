"""What the examples on mixtures of experts count by themselves: floating-point operations, BLEU, verdicts."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def load(monkeypatch):
    """Import an example of examples/moe by name."""

    def found(name):
        monkeypatch.syspath_prepend(str(ROOT / "examples" / "moe"))
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "moe" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return found


@pytest.mark.parametrize(("every", "factor"), [(0, 0.0), (2, 0.5), (1, 1.0)])
def test_the_operations_of_a_vmoe_are_those_that_torch_counts(load, every, factor):
    example = load("vmoe")
    size = {"depth": 2, "patch": 8}
    model = example.build(32, size, 0, every).eval()
    model.set_attn_implementation("eager")
    example.set_capacity(model, factor or 1.0, True, "batch")
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=images)
    expected = 8 * example.flops(32, size, factor, every)
    # Slots are a whole number, and so are not exactly a share of the tokens.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01 if every else 1e-9)


def test_bleu(load):
    example = load("task_moe")
    line = "ein kleiner Hund läuft über die grüne Wiese"
    assert example.bleu([line], [line]) == pytest.approx(100)
    assert example.bleu(["zwei Katzen schlafen dort heute"], [line]) == 0
    # Another fourth word leaves 7 of 8 words right, 5 of 7 pairs, 3 of 6 triples and 1 of 5 quadruples.
    close = line.replace("läuft", "rennt")
    assert example.bleu([close], [line]) == pytest.approx(100 * (7 / 8 * 5 / 7 * 3 / 6 * 1 / 5) ** 0.25)
    short = "ein kleiner Hund läuft"
    assert example.bleu([short], [line]) == pytest.approx(100 * torch.exp(torch.tensor(1 - 8 / 4)).item(), rel=1e-5)


def models(gain, cost):
    orders = {"by position": {"0.5": 0.6 - cost, "4": 0.6}, "by priority": {"0.5": 0.6 - cost + gain, "4": 0.6}}
    return [{"width": 8, "flops": {"0.5": 1, "4": 2}, "accuracy": {"batch": orders, "image": orders}}]


@pytest.mark.parametrize(
    ("second", "every", "verdict"),
    [
        (models(0.05, 0.1), None, "confirmed"),
        (models(-0.05, 0.1), None, "contradicted"),
        (models(0.005, 0.01), None, "not testable here"),
        (models(0.005, 0.01), models(0.05, 0.1), "confirmed"),
        (models(0.0, 0.1), models(0.05, 0.1), "mixed"),
    ],
)
def test_the_verdict_on_priority_follows_from_the_differences(load, second, every, verdict):
    results = {"vmoe": second} | ({"every_layer": every} if every else {})
    assert load("vmoe_page").judge(results, ["0.5"]) == verdict
