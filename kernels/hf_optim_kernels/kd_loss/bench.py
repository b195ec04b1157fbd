"""Contenders of ``hf-optim bench`` for ``hf_optim::kd_rows``: the loss and its gradient over logits ``[M, N]``.

A "layer of ``N`` outputs" is a vocabulary of ``N`` here, and ``K`` is not used: logits have no inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable, variations, with_config
from . import naive, op

TEMPERATURE, BETA = 2.0, 0.5
# Multiplications, additions and exponentials per pair of logits, in the loss and in the gradient.
FLOPS = 20


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return each direction, and the formula in plain PyTorch; a call returns the gradient of the mean loss."""
    student, teacher = (torch.randn(M, N, device=benchmark.device()).mul_(3).to(dtype) for _ in range(2))
    held = benchmark.copies_of((student, teacher))
    upstream = torch.full((M,), 1.0 / M, device=student.device)
    # The lower bound: both logits are read once, and the gradient is written.
    bound = 3 * benchmark.bytes_of((student,))
    found = []
    for direction in naive.DIRECTIONS:
        calls = [partial(_fused, one, other, upstream, direction) for one, other in held]
        exact = naive.gradient(student.double(), teacher.double(), None, upstream, TEMPERATURE, direction, BETA)
        found.append(Contender(f"kd {direction}", calls, bound, FLOPS * M * N, exact, ""))
    exact = naive.gradient(student.double(), teacher.double(), None, upstream, TEMPERATURE, "forward", BETA)
    calls = [partial(plain, one, other) for one, other in held]
    return [*found, Contender("plain formula", calls, bound, FLOPS * M * N, exact, "", graph=False, dense=True)]


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return the loss with its gradient over ``N`` classes: the columns that programs take at a time."""
    from . import launch

    def calls(x: Tensor, config: dict[str, int]) -> list[Callable[[], Tensor]]:
        upstream = torch.full((len(x),), 1.0 / len(x), device=x.device)
        given = benchmark.copies_of((x, x.flip(0).contiguous()))
        run = [partial(_fused, student, teacher, upstream, "forward") for student, teacher in given]
        return [with_config(launch.OP, config, call) for call in run]

    def reference(x: Tensor) -> Tensor:
        upstream = torch.full((len(x),), 1.0 / len(x), device=x.device)
        given = x.double(), x.flip(0).double(), None, upstream
        return naive.gradient(*given, TEMPERATURE, "forward", BETA)

    return [
        Tunable(
            op=launch.OP,
            shape=(N, 1),
            dtype=dtype,
            inputs=lambda rows: torch.randn(rows, N, device=benchmark.device()).mul_(3).to(dtype),
            calls=calls,
            candidates=lambda rows: variations(
                launch.DEFAULT, step=(1024, 2048, 4096, 8192), piece=(512, 1024, 2048, 4096, 8192)
            ),
            reference=reference,
            any_rows=True,
        )
    ]


def _fused(student: Tensor, teacher: Tensor, upstream: Tensor, direction: str) -> Tensor:
    settings = (TEMPERATURE, direction, BETA)
    _, statistics = op.kd_rows(student, teacher, None, *settings, False)
    return op.kd_gradient(student, teacher, None, statistics, upstream, *settings)


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the gradient of the two-line formula in float32, by autograd."""
    student = student.detach().requires_grad_()
    log_q = F.log_softmax(student.float() / TEMPERATURE, -1)
    log_p = F.log_softmax(teacher.float() / TEMPERATURE, -1)
    loss = TEMPERATURE**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return torch.autograd.grad(loss, student)[0]
