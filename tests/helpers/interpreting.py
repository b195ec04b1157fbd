"""Devices of the tests of Triton kernels: interpreted on a CPU, and a CUDA device.

Triton decides at import whether it interprets, so its interpreter needs a run of pytest with its variable set:
``TRITON_INTERPRET=1 pytest tests/kernels tests/generation -m interpreted``. Other runs deselect these tests, and that
run all others; tests with the marker ``gpu`` are deselected where there is no CUDA device (see ``conftest``).
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETER = pytest.param("cpu", marks=pytest.mark.interpreted, id="interpreted")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
EVERYWHERE = ["cpu", INTERPRETER, CUDA]
on_triton = pytest.mark.parametrize("device", [INTERPRETER, CUDA])

# Rounding of the result, norm over norm. The interpreter cuts float32 to bfloat16 instead of rounding.
BFLOAT16 = 2**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2**-8
BOUND = {torch.float32: 1e-6, torch.bfloat16: BFLOAT16, torch.float16: 2**-11}


def relative(y, reference):
    """Norm of the difference over the norm of the reference, in float64."""
    y, reference = y.detach().double(), reference.detach().double()
    return float((y - reference).norm() / reference.norm())
