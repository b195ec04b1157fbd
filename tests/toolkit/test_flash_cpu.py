"""Blocks on PyTorch's flash kernel for CPUs beside a softmax under a mask that is written down pair by pair."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.attention import (
    Band,
    Chunks,
    Columns,
    GlobalTokens,
    HeadPatterns,
    Pattern,
    attend,
    flash_cpu,
    flash_plan,
)
from hf_optim.toolkit.attention.rows import Rows

CASES = {
    "window": ([Pattern((Band(70, 70),))], lambda h, i, j: abs(i - j) <= 70),
    "long window": ([Pattern((Band(700, 0),), True)], lambda h, i, j: 0 <= i - j <= 700),
    "two orders": (
        [Pattern((Band(None, 0, 16), Band(40, 0)), True)],
        lambda h, i, j: j <= i and ((i - j) % 16 == 0 or i - j <= 40),
    ),
    "by head": (
        [Pattern((Band(33, 33),)), *(Pattern((Band(None, None, d),)) for d in (2, 3, 3))],
        lambda h, i, j: abs(i - j) <= 33 if h == 0 else (i - j) % (2, 3, 3)[h - 1] == 0,
    ),
    "keys for few": (
        [Pattern((Chunks(48),), True)] * 2 + [Pattern((Columns(48, 4, 2),), True)] * 2,
        lambda h, i, j: j <= i and (i // 48 == j // 48 if h < 2 else 42 <= j % 48 < 46),
    ),
    "both ends": (
        [Pattern((Band(40, 40), GlobalTokens(2, 1)))],
        lambda h, i, j: abs(i - j) <= 40 or min(i, j) < 2 or max(i, j) == 300,
    ),
}
LENGTH = 301  # no block divides it


def mask_of(formula, segments):
    """Return bool ``[B, 4, N, N]``; positions count within a document."""
    seen = torch.zeros(len(segments), 4, LENGTH, LENGTH, dtype=torch.bool)
    for row, own in enumerate(segments):
        for document in sorted(set(own) - {-1}):
            low, count = own.index(document), own.count(document)
            for head in range(4):
                pairs = [[formula(head, i, j) for j in range(count)] for i in range(count)]
                seen[row, head, low : low + count, low : low + count] = torch.tensor(pairs)
    return seen


def dense(query, key, value, seen):
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(~seen, -1e300)
    return (scores.softmax(-1) * seen.any(-1, keepdim=True)) @ value


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


PADDED = [(case, padding) for case in CASES for padding in (None, "left", "right", "packed")]


# The last token, which "both ends" names by its place, differs between rows that are padded.
@pytest.mark.many(every=4)
@pytest.mark.parametrize(("case", "padding"), [one for one in PADDED if one[0] != "both ends" or one[1] is None])
def test_outputs_and_gradients(case, padding):
    patterns, formula = CASES[case]
    segments = [[0] * LENGTH, [0] * LENGTH]
    if padding == "left":
        segments[0] = [-1] * 150 + [0] * (LENGTH - 150)
    elif padding == "right":
        segments[0] = [0] * 151 + [-1] * (LENGTH - 151)
    elif padding == "packed":
        segments[0] = [0] * 100 + [1] * 100 + [2] * (LENGTH - 200)
    parts = [random(2, LENGTH, heads, 16, seed=heads).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    rows = None if padding is None else Rows.of(torch.tensor(segments, dtype=torch.int32))
    grad = random(2, 4, LENGTH, 16, seed=9) * (torch.tensor(segments) >= 0)[:, None, :, None]
    found = attend.attend(*parts, HeadPatterns.of(patterns, 4), 0.3, rows, way="blocks")
    expected = dense(*parts, mask_of(formula, segments))
    for one, other in zip(
        (found, *torch.autograd.grad(found, parts, grad)),
        (expected, *torch.autograd.grad(expected, parts, grad)),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_and_queries_without_keys(dtype):
    patterns, formula = CASES["keys for few"]
    parts = [random(1, LENGTH, heads, 16, seed=heads).transpose(1, 2) for heads in (4, 2, 2)]
    low = [part.to(dtype).requires_grad_() for part in parts]
    expected = dense(*(part.detach().double() for part in low), mask_of(formula, [[0] * LENGTH]))
    found = attend.attend(*low, HeadPatterns.of(patterns, 4), 0.3, way="blocks")
    assert found.dtype == dtype
    assert not found[:, 2:, :42].any()
    assert torch.allclose(found.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    found.sum().backward()
    assert all(torch.isfinite(part.grad).all() for part in low)
    assert not low[0].grad[:, 2:, :42].any()


def test_a_part_of_the_blocks_at_a_time_changes_nothing(monkeypatch):
    parts = [random(2, LENGTH, heads, 16, seed=heads).transpose(1, 2) for heads in (4, 2, 2)]
    heads = HeadPatterns.of(CASES["two orders"][0], 4)
    whole = attend.attend(*parts, heads, 0.3, way="blocks")
    monkeypatch.setattr(flash_plan, "GATHERED", 1)
    monkeypatch.setattr(flash_plan, "ORDERED", 1)
    monkeypatch.setattr(flash_plan, "MOST_SHARED", 1)
    flash_plan.plan_of.cache_clear()
    assert torch.allclose(attend.attend(*parts, heads, 0.3, way="blocks"), whole, rtol=0, atol=1e-14)
    flash_plan.plan_of.cache_clear()


def test_without_the_kernel_the_result_is_the_same(monkeypatch):
    parts = [random(2, LENGTH, heads, 16, seed=heads).transpose(1, 2) for heads in (4, 2, 2)]
    heads = HeadPatterns.of(CASES["by head"][0], 4)
    expected = attend.attend(*parts, heads, 0.3, way="blocks")
    monkeypatch.setattr(flash_cpu, "FLASH", None)
    assert not flash_cpu.flash_on_cpu(*parts)
    assert torch.allclose(attend.attend(*parts, heads, 0.3, way="blocks"), expected, rtol=0, atol=1e-12)


def test_values_of_another_width_go_without_the_kernel():
    query, key = random(1, 2, 90, 16), random(1, 2, 90, 16, seed=1)
    value = random(1, 2, 90, 8, seed=2)
    heads = HeadPatterns.of([Pattern((Band(10, 10),))], 2)
    found = attend.attend(query, key, value, heads, 0.3, way="blocks")
    assert torch.allclose(found, attend.attend(query, key, value, heads, 0.3, way="dense"), rtol=0, atol=1e-12)


def test_the_mean_over_dropped_weights_is_the_output_without_dropout():
    parts = [random(1, 2, 90, 8, seed=seed, dtype=torch.float32) for seed in range(3)]
    heads = HeadPatterns.of([Pattern((Band(None, None, 4), Band(10, 10)))], 2)
    expected = attend.attend(*parts, heads, 0.3, way="blocks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        runs = torch.stack([attend.attend(*parts, heads, 0.3, dropout=0.3, way="blocks") for _ in range(120)])
    assert (runs[0] - expected).abs().mean() > 0.05
    assert (runs.mean(0) - expected).abs().mean() < 0.02


def test_no_scores_of_all_pairs_are_stored():
    length = 2048
    query = random(1, 1, length, 8, dtype=torch.float32).requires_grad_()
    heads = HeadPatterns.of([Pattern((Band(32, 32),))], 1)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        attend.attend(query, query, query, heads, 0.3, way="blocks").sum().backward()
    assert max(sizes) <= length * 8


def test_a_causal_window_of_half_the_row_is_computed_over_blocks(monkeypatch):
    calls = []
    stock = attend.flash_attention
    monkeypatch.setattr(attend, "flash_attention", lambda *args: calls.append(args) or stock(*args))
    parts = [random(1, 1, 512, 8, seed=seed, dtype=torch.float32) for seed in range(3)]
    for reach, blocks in ((255, 1), (511, 1)):
        heads = HeadPatterns.of([Pattern((Band(reach, reach),), reach == 255)], 1)
        attend.attend(*parts, heads, 0.3)
        assert len(calls) == blocks
