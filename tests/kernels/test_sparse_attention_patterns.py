"""The kernels of sparse attention on the layouts of patterns, against the plain execution of the same layouts."""

from __future__ import annotations

import pytest
import torch
from interpreting import on_triton

from hf_optim.toolkit.attention import Band, Chunks, Columns, GlobalTokens, HeadPatterns, Pattern, attend, visible
from hf_optim.toolkit.attention.rows import Rows
from hf_optim_kernels.sparse_attention import op

LENGTH = 75
PATTERNS = {
    "window": [Pattern((Band(20, 20),))],
    "strided, two orders": [Pattern((Band(None, 0, 7), Band(6, 0)), True)],
    "fixed, a part of the keys": [Pattern((Chunks(16), Columns(16, 2)), True)],
    "global ends, by head": [Pattern((Band(4, 4), GlobalTokens(3, 2))), Pattern((Chunks(25),))] * 2,
}


def drawn(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, LENGTH, 16), (2, 2, LENGTH, 16), (2, 2, LENGTH, 16)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def computed(parts, name, rows, kernel, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(attend, "BLOCK", 32)
        patch.setattr(attend, "flash_on_cpu", lambda *tensors: False)
        patch.setattr(attend, "installed_kernel", lambda *given: op.sparse_attention if kernel else None)
        out = attend.attend(*parts, HeadPatterns.of(PATTERNS[name], 4), 0.3, rows, way="blocks")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * weights.to(out)).sum(), parts)]


@pytest.mark.interpreted
@pytest.mark.many
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_kernel_computes_what_the_lists_say(name, padded, monkeypatch):
    assert on_triton(torch.ones(1))
    segments = torch.zeros(2, LENGTH, dtype=torch.int32)
    segments[1, 60:] = -1
    rows = Rows.of(segments) if padded else None
    found = computed(drawn(), name, rows, True, monkeypatch)
    exact = computed(drawn(torch.float64), name, rows, False, monkeypatch)
    for one, right in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=0, atol=2e-5)


def test_the_plain_execution_is_the_pattern(monkeypatch):
    """So the kernel is compared with the pattern, too."""
    query, key, value = drawn(torch.float64)
    out, *_ = computed([query, key, value], "window", None, False, monkeypatch)
    key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    seen = visible(PATTERNS["window"][0], LENGTH)
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(out, torch.softmax(scores, -1) @ value, rtol=0, atol=1e-12)
