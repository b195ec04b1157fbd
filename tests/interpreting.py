"""Tests of Triton kernels: interpreted on a CPU in a process of their own, and, marked ``gpu``, on a CUDA device.

Triton decides at import whether it interprets, and other tests of the same process may have imported it. So a test file
collects itself again, with ``TRITON_INTERPRET=1`` (``pass_interpreted``).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
on_triton = pytest.mark.parametrize("device", ["cpu"] if INTERPRETED else [CUDA])
in_this_process = pytest.mark.skipif(INTERPRETED, reason="runs in the ordinary process")

# Rounding of the result, norm over norm. The interpreter cuts float32 to bfloat16 instead of rounding.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8, torch.float16: 2**-11}


def relative(y, reference):
    """Norm of the difference over the norm of the reference, in float64."""
    y, reference = y.detach().double(), reference.detach().double()
    return float((y - reference).norm() / reference.norm())


def pass_interpreted(file):
    """Assert that the tests of ``file`` pass where Triton interprets its kernels."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
