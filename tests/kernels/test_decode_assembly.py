"""The assembly that decodes codes to numbers, instruction by instruction: which the interpreter does not run."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from hf_optim_kernels.wna16 import decode, wide

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ONE = {"bf16": 0x3F803F80, "fp16": 0x3C003C00}


def pairs(register: np.ndarray, half: str) -> torch.Tensor:
    """Return registers [n] of 32 bits as pairs of numbers [n, 2]."""
    return torch.from_numpy(register.astype(np.uint32).view(np.int16).reshape(-1, 2).copy()).view(HALVES[half])


def registers(numbers: torch.Tensor) -> np.ndarray:
    """Return pairs of numbers [n, 2] as registers [n]."""
    return numbers.contiguous().view(torch.int16).numpy().view(np.uint32).reshape(-1).copy()


def execute(text: str, given: dict[str, np.ndarray], half: str) -> dict[str, np.ndarray]:
    """Return the registers after ``text``, a block of PTX of the few instructions that decoding takes."""
    held = dict(given)

    def value(name: str) -> np.ndarray:
        return np.full_like(next(iter(given.values())), int(name, 0)) if name[0].isdigit() else held[name]

    for line in filter(None, (part.strip(" {}\n") for part in text.split(";"))):
        name, rest = line.split(None, 1)
        if name == ".reg":
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        if name == "mov.b32":
            held[target] = value(sources[0])
        elif name == "shr.u32":
            held[target] = value(sources[0]) >> np.uint32(int(sources[1]))
        elif name == "lop3.b32":
            a, b, c = map(value, sources[:3])
            table, found = int(sources[3], 0), np.zeros_like(a)
            for x, y, z in itertools.product((0, 1), repeat=3):
                if table >> (4 * x + 2 * y + z) & 1:
                    found |= (a if x else ~a) & (b if y else ~b) & (c if z else ~c)
            held[target] = found
        elif re.fullmatch(r"(fma|mul)\.rn\.(bf16x2|f16x2)", name):
            factors = [pairs(value(source), half).double() for source in sources]
            exact = factors[0] * factors[1] + (factors[2] if name.startswith("fma") else 0)
            held[target] = registers(exact.to(HALVES[half]))
        else:
            raise AssertionError(f"{name} is not known here")
    return held


def words(width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return registers of two words with every code in every place, and the codes [n, 2, 16 / width]."""
    count = 16 // width
    codes = np.random.default_rng(0).integers(0, 1 << width, (512, 2, count))
    codes[: 1 << width, 0, 0] = np.arange(1 << width)
    codes[: 1 << width, 1, count - 1] = np.arange(1 << width)
    shifts = np.arange(count) * width
    packed = (codes << shifts).sum(-1)
    return (packed[:, 0] | packed[:, 1] << 16).astype(np.uint32), codes


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("zero", [None, 0, 5, 15, 200, 255])
def test_codes_of_the_kernels_for_warp_groups(width, half, zero):
    pytest.importorskip("triton.experimental.gluon")
    from hf_optim_kernels.wna16.wide_kernel import ASSEMBLY

    if zero is not None and zero >= 1 << width:
        pytest.skip("no such code")
    register, codes = words(width)
    offset = (1 << (width - 1)) if zero is None else zero
    minus = torch.full((512, 2), -float(wide.magic_of(width, HALVES[half]) + offset)).to(HALVES[half])
    scale = torch.rand(512, 2).to(HALVES[half])
    for part, is_scaled in itertools.product(range(16 // width), (False, True)):
        text = ASSEMBLY[width, part, half, is_scaled, zero is not None]
        given = {"$1": register, "$2": registers(minus), "$3": registers(scale)}
        exact = torch.from_numpy(codes[:, :, part] - offset).double()
        if is_scaled:
            exact = exact * scale.double()
        assert torch.equal(pairs(execute(text, given, half)["$0"], half), exact.to(HALVES[half]))


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("width", [4, 8])
def test_codes_of_the_fused_kernel(width, half):
    text = {
        (4, "bf16"): decode.NIBBLES_BF16, (4, "fp16"): decode.NIBBLES_FP16,
        (8, "bf16"): decode.BYTES_BF16, (8, "fp16"): decode.BYTES_FP16,
    }[width, half].value  # fmt: skip
    register, codes = words(width)
    found = execute(text, {f"${16 // width}": register}, half)
    for part in range(16 // width):
        exact = torch.from_numpy(codes[:, :, part] - (1 << (width - 1)))
        assert torch.equal(pairs(found[f"${part}"], half), exact.to(HALVES[half]))
