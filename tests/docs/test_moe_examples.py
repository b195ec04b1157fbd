"""What the examples on mixtures of experts count by themselves: floating-point operations, BLEU, verdicts."""

from __future__ import annotations

import importlib.util
import shutil
import sys

import pytest
import simulated_graphs
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


# -- V-MoE beside dense models ----------------------------------------------------------------------------------------
def one_training(load, seed, every=2):
    cifar, training, example = load("cifar"), load("vmoe_training"), load("vmoe")
    size = {"depth": 2, "patch": 8}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (40,), generator=generator)
    build = lambda: example.build(32, size, seed, every)  # noqa: E731
    return training, training.Training(build(), (images, labels), cifar.Schedule(seed, 5, 8, 40, "cpu"), 1e-3), build


def test_a_training_that_starts_again_ends_with_the_same_weights(load):
    training, one, build = one_training(load, 3)
    ends = []
    for _ in range(2):
        training.start([one], [build()])
        torch.manual_seed(0)  # the noise of the routers
        training.train_all([one])
        ends.append({name: value.clone() for name, value in one.model.state_dict().items()})
        load("vmoe").set_capacity(one.model, 0.1, True, "image")  # as it was measured
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    start = build().state_dict()
    assert not any(torch.equal(value, start[name]) for name, value in ends[0].items() if "router" in name)


def test_a_step_can_be_captured(load):
    _, one, _ = one_training(load, 0)
    one.step()
    one.stream = object()  # on a device the rate is not read by the host
    with simulated_graphs.Capturing():
        one.step()


def test_a_schedule_follows_the_seed_and_is_taken_over_in_place(load):
    cifar = load("cifar")
    first, second = cifar.Schedule(1, 4, 8, 40, "cpu"), cifar.Schedule(2, 4, 8, 40, "cpu")
    images = torch.arange(40 * 3 * 32 * 32, dtype=torch.int64).remainder(251).to(torch.uint8).view(40, 3, 32, 32)
    step = torch.tensor([2])
    before = first.at(step, images)
    assert not torch.equal(before[0], second.at(step, images)[0])
    held = second.images.data_ptr()
    second.become(cifar.Schedule(1, 4, 8, 40, "cpu"))
    assert second.images.data_ptr() == held
    chosen, inputs = second.at(step, images)
    assert torch.equal(chosen, before[0])
    assert torch.equal(inputs, before[1])
    flat = cifar.Schedule(1, 4, 8, 40, "cpu")
    flat.rows.fill_(cifar.SHIFT)
    flat.columns.fill_(cifar.SHIFT)
    flat.mirrored.fill_(False)
    assert torch.equal(flat.at(step, images)[1], cifar.pixels(images[flat.images[2]]))
    flat.mirrored.fill_(True)
    assert torch.equal(flat.at(step, images)[1], cifar.pixels(images[flat.images[2]]).flip(3))


def test_packed_images_are_the_images(load, tmp_path, monkeypatch):
    cifar = load("cifar")
    monkeypatch.setattr(cifar, "SPLITS", {"train": 6, "test": 3})
    generator = torch.Generator().manual_seed(0)
    parts = {
        split: (torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(count))
        for split, count in cifar.SPLITS.items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "load", lambda folder, split: parts[split])
        cifar.pack(tmp_path, tmp_path)
    for split, (images, labels) in parts.items():
        found = cifar.load(tmp_path, split)
        assert torch.equal(found[0], images)
        assert torch.equal(found[1], labels)


def test_intervals_hold_as_often_as_they_say(load):
    verdicts = load("vmoe_verdicts")
    assert verdicts.student(0.975, 2) == pytest.approx(4.302653, abs=1e-4)
    assert verdicts.student(0.995, 9) == pytest.approx(3.249836, abs=1e-4)
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(300):  # seeds and images both move the answers; the true difference is 0.03
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        each = 0.03 + 0.02 * draw(6, 1) + 0.4 * draw(1, 200) + 0.3 * draw(6, 200)
        found = verdicts.interval(each.mean(1).tolist(), each.mean(0).numpy(), 1)
        inside += found.low <= 0.03 <= found.high
    assert 0.95 <= inside / 300 <= 1


def results(gains, dense=(0.5, 0.6), mixture=0.6):
    """Return results of 8 seeds: gains by priority at C = 0.5 and 0.25, and accuracies that differ little by seed."""
    rows, twins = [], []
    for seed in range(8):
        shift = 0.0002 * (seed - 3.5)
        orders = {
            "by position": {c: mixture - g + shift for c, g in zip(("0.25", "0.5"), gains, strict=True)},
            "by priority": dict.fromkeys(("0.25", "0.5"), mixture - shift),
        }
        flops = {"0.25": 60, "0.5": 100}
        rows.append({"width": 8, "seed": seed, "flops": flops, "accuracy": {"batch": orders, "image": orders}})
        twins += [
            {"width": width, "seed": seed, "flops": size, "accuracy": accuracy + shift}
            for width, size, accuracy in zip((8, 16), (100, 400), dense, strict=True)
        ]
    return {"dense": twins, "vmoe": rows}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ((0.05, 0.02), "confirmed"),
        ((0.05, 0.0), "mixed"),
        ((0.0, -0.05), "contradicted"),
    ],
)
def test_the_verdict_on_priority_follows_from_the_differences(load, found, verdict):
    verdicts = load("vmoe_verdicts")
    each = verdicts.gains(results(found))["vmoe", 8]
    assert [one.mean for one in each.values()] == pytest.approx(list(found), abs=1e-6)
    assert verdicts.judge_priority(list(each.values())) == verdict
    wide = verdicts.Interval(0.0, -0.1, 0.1)
    assert verdicts.judge_priority([wide]) == "not testable here"


@pytest.mark.parametrize(("mixture", "verdict"), [(0.57, "confirmed"), (0.545, "confirmed"), (0.53, "contradicted")])
def test_the_verdict_on_compute_compares_with_dense_models_of_twice_the_operations(load, mixture, verdict):
    verdicts = load("vmoe_verdicts")
    found = verdicts.halves(results((0.0, 0.0), mixture=mixture))
    # Half way between 100 and 400 operations, in their logarithm, dense models have an accuracy of 0.55.
    assert found[8].mean == pytest.approx(mixture - 0.55, abs=1e-6)
    assert verdicts.judge_compute(list(found.values())) == verdict
    assert verdicts.judge_compute([verdicts.Interval(-0.02, -0.05, 0.01)]) == "not testable here"
    assert verdicts.beside_dense(results((0.0, 0.0)), 8, 8.0, 1) is None
    assert verdicts.beside_twin(results((0.0, 0.0), mixture=mixture), 8).mean == pytest.approx(mixture - 0.5, abs=1e-6)


# -- room that follows the load ---------------------------------------------------------------------------------------
def timed_row(load, static, buckets):
    times = {"static": static, "buckets": buckets, "buckets, with captures": buckets, "product, captured": 0.5}
    return {
        "shape": "a shape",
        "load": load,
        "times": times,
        "static": {"peak": {"padding": 0.75}, "factor": {"dropped": 0.2}},
        "buckets": {"power": {"padding": 0.4, "captures": 2}},
    }


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ([(2.0, 1.0), (1.8, 1.0)], "confirmed"),
        ([(2.0, 1.0), (1.5, 1.0)], "mixed"),
        ([(0.9, 1.0), (0.5, 1.0)], "contradicted"),
    ],
)
def test_the_verdict_on_buckets_follows_from_uneven_loads(load, pairs, verdict):
    rows = [timed_row("even", 0.1, 1.0), *(timed_row("skewed", *pair) for pair in pairs)]
    results = {"rows": rows, "forwards": 96, "factor": 1.25, "device": "a GPU"}
    assert load("buckets_page").claim(results)["verdict"] == verdict
    for row in rows:
        row["times"] = None
    assert load("buckets_page").claim(results)["verdict"] == "not testable here"


@pytest.mark.parametrize(("left_out", "held_out", "verdict"), [
    ((0.8, 0.9), 2.001, "confirmed"), ((0.4, 0.9), 2.0, "mixed"), ((0.8, 0.9), 2.1, "mixed"),
    ((0.1, 0.2), 2.0, "contradicted"),
])  # fmt: skip
def test_the_verdict_on_assignments_follows_from_shares_and_losses(load, left_out, held_out, verdict):
    epoch = {"tokens": 1.0, "sequences": 0.9}
    runs = [
        {"seed": seed, "stable": stable, "train": 1.0, "held_out": held_out if stable else 2.0,
         "epochs": [{**epoch, "left_out": share if stable else 0.0}] * 6}
        for seed, share in enumerate(left_out)
        for stable in (0, 2)
    ]  # fmt: skip
    given = {"model": "m", "experts": 8, "top_k": 2, "sequences": 4, "length": 8, "epochs": 6, "rate": 1, "stable": 2}
    assert load("buckets_page").settled({**given, "runs": runs})[1]["verdict"] == verdict


@pytest.mark.parametrize(("name", "folder", "page"), [
    ("buckets_page", "buckets", "buckets/README.md"), ("vmoe_page", "", "vmoe.md"),
])  # fmt: skip
def test_pages_are_what_the_records_give(load, name, folder, page, tmp_path, monkeypatch):
    home = ROOT / "model_cards"
    shutil.copytree(home / "claims", tmp_path / "claims")
    for path in (home / "moe" / folder).glob("*.json"):
        (tmp_path / "moe" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "moe" / folder)
    module = load(name)
    for drawing in ("draw_curves", "draw_dropped"):
        monkeypatch.setattr(module, drawing, lambda *_: None, raising=False)
    module.write(tmp_path / "moe" / folder)
    assert (tmp_path / "moe" / page).read_text() == (home / "moe" / page).read_text()
    for made in (tmp_path / "claims").iterdir():
        assert made.read_text() == (home / "claims" / made.name).read_text(), made.name
