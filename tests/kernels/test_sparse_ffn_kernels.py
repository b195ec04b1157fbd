"""hf_optim::sparse_ffn: specification, CPU form and kernels against a loop over blocks in float64."""

from __future__ import annotations

import pytest
import torch
from interpreting import BOUND, EVERYWHERE, on_triton, relative
from torch.nn import functional as F

from hf_optim_kernels.sparse_ffn import cpu, launch, layer, naive, op
from hf_optim_kernels.sparse_ffn.launch import Tiles
from hf_optim_plugins.sparsity import _sparse_ffn_modules
from hf_optim_plugins.sparsity._sparse_ffn_modules import SparseFFN

ENTRY = {
    "width": 64, "neurons": 96, "out": 48, "block": 4, "rank": 16, "act": "relu", "gated": False, "bias": False,
    "out_bias": True, "controller_bias": True, "temperature": 0.1, "hard_share": 0.3, "controller_output": False,
    "gather_rows": 8, "bits": 16, "group": None,
}  # fmt: skip
CASES = {
    "plain": {},
    "gated": {"gated": True, "act": "silu", "bias": True},
    "by the softmax": {"controller_output": True, "block": 6, "rank": 7, "act": "gelu"},
    "odd sizes": {"width": 40, "out": 50, "block": 3, "rank": 5, "controller_bias": False, "out_bias": False},
    "int8": {"bits": 8, "bias": True},
    "int8 in groups": {"bits": 8, "group": 32, "out": 64, "block": 32},
    "int4": {"bits": 4, "group": 32, "out": 64, "gated": True, "act": "gelu_new"},
    "int4 in rows": {"bits": 4, "out": 64},
}
SMALL = Tiles(r=2, r_k=32, b=2, b_r=8, b_k=32, d=16, d_b=4, split=3)


def made(device="cpu", dtype=torch.float64, seed=0, **fields):
    """A module with random values, also of its vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        entry = {**ENTRY, **fields}
        ffn = SparseFFN({**entry, "bits": 16}).double().eval().requires_grad_(False)
        for parameter in ffn.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if entry["bits"] < 16:
            ffn.encode_(entry["bits"], entry["group"])
    return ffn.to(device, dtype)


def tokens(ffn, count=5, seed=1):
    x = torch.randn(count, ffn.entry["width"], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parameter = ffn.controller_in
    return x.to(parameter.device, parameter.dtype)


def weight(ffn, name):
    """A decoded matrix of a module, from its stored tensors alone."""
    if ffn.entry["bits"] == 16:
        return getattr(ffn, name).double()
    codes, scales = getattr(ffn, f"{name}_codes"), getattr(ffn, f"{name}_scale").double()
    values = []
    for row, factors in zip(codes.tolist(), scales.tolist(), strict=True):
        size = len(row) // len(factors)
        for group, factor in enumerate(factors):
            part = row[group * size : (group + 1) * size]
            if ffn.entry["bits"] == 4:
                part = [byte % 16 - 8 for byte in part] + [byte // 16 - 8 for byte in part]
            values += [factor * code for code in part]
    return torch.tensor(values, dtype=torch.float64).view(len(codes), -1)


def expected_of(ffn, x):
    """The layer token by token and block by block."""
    own, out = ffn.entry, []
    act = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "gelu_new": lambda v: F.gelu(v, approximate="tanh")}
    up, gate, down = (weight(ffn, n).cpu() if n in ffn.matrices else None for n in ("up", "gate", "down"))
    first, second = ffn.controller_in.double().cpu(), ffn.controller_out.double().cpu()
    vector = lambda name: None if (v := getattr(ffn, name)) is None else v.double().cpu()  # noqa: E731
    for row in x.double().cpu():
        logits = second @ (first @ row) + (0 if vector("controller_bias") is None else vector("controller_bias"))
        total = torch.zeros(own["out"], dtype=torch.float64) + (0 if vector("bias") is None else vector("bias"))
        for block in range(own["neurons"] // own["block"]):
            one = logits[block * own["block"] : (block + 1) * own["block"]]
            unit = block * own["block"] + int(one.argmax())
            value = up[unit] @ row + (0 if vector("up_bias") is None else vector("up_bias")[unit])
            if own["gated"]:
                value = act[own["act"]](gate[unit] @ row + (vector("gate_bias")[unit] if own["bias"] else 0)) * value
            else:
                value = act[own["act"]](value)
            total = total + (one.softmax(0).max() if own["controller_output"] else 1) * value * down[unit]
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("case", CASES)
def test_the_specification_the_cpu_form_and_the_module(case):
    ffn = made(**CASES[case])
    x, given = tokens(ffn), layer.layer_of(ffn)
    expected = expected_of(ffn, x)
    ffn_masked = ffn.masked(x, mask_of(ffn, x))
    for found in (naive.sparse_ffn(x, given), cpu.sparse_ffn(x, given), ffn(x), ffn_masked):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if ffn.entry["act"] != "gelu_new":  # transformers writes it in other operations
        assert torch.equal(cpu.sparse_ffn(x, given), ffn(x))


@pytest.mark.parametrize("case", ["gated", "int4"])
def test_rows_that_are_copied_some_at_a_time(case, monkeypatch):
    ffn = made(**CASES[case])
    x, given = tokens(ffn), layer.layer_of(ffn)
    whole = ffn(x)
    monkeypatch.setattr(cpu, "COPIED_BYTES", 7 * 5 * 64 * 8)
    monkeypatch.setattr(_sparse_ffn_modules, "COPIED_BYTES", 7 * 5 * 64 * 8)
    assert ffn._rows_at_a_time(x, 64) == 7
    torch.testing.assert_close(ffn(x), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cpu.sparse_ffn(x, given), whole, rtol=1e-12, atol=1e-12)


def mask_of(ffn, x):
    choice, factor = ffn.choose(ffn.logits(x))
    mask = F.one_hot(choice, ffn.entry["block"]).to(x.dtype)
    return mask if factor is None else mask * factor.unsqueeze(-1)


@on_triton
@pytest.mark.parametrize(
    ("case", "tiles"),
    [*((case, None) for case in CASES), *((case, SMALL) for case in ("gated", "odd sizes", "int4"))],
    ids=lambda value: "small" if value is SMALL else "default" if value is None else value,
)
def test_the_kernels(case, tiles, device):
    ffn = made(device, torch.float32, **CASES[case])
    x, given = tokens(ffn, 2), layer.layer_of(ffn)
    found = launch.sparse_ffn(x, given, tiles)
    assert relative(found.cpu(), expected_of(ffn, x)) < BOUND[torch.float32]
    # A token's result does not depend on the others.
    assert torch.equal(launch.sparse_ffn(x[1:].contiguous(), given, tiles), found[1:])


@on_triton
@pytest.mark.parametrize("tiles", [SMALL._replace(programs=5), Tiles(programs=3)])
@pytest.mark.parametrize("case", ["plain", "gated", "by the softmax", "odd sizes"])
def test_rows_of_both_matrices_in_one_launch(case, tiles, device):
    ffn = made(device, torch.float32, **CASES[case])
    x, given = tokens(ffn, 2), layer.layer_of(ffn)
    expected = expected_of(ffn, x)
    for early in (False, True) if device == "cuda" else (False,):
        found = launch.sparse_ffn(x, given, tiles._replace(early=early))
        assert relative(found.cpu(), expected) < BOUND[torch.float32]
        alone = launch.sparse_ffn(x[1:].contiguous(), given, tiles._replace(early=early))
        assert torch.equal(alone, found[1:])


@on_triton
def test_codes_are_not_joined(device):
    ffn = made(device, torch.float32, **CASES["int8"])
    x, given = tokens(ffn, 2), layer.layer_of(ffn)
    assert not launch.can_join(given, Tiles(programs=3))
    assert torch.equal(launch.sparse_ffn(x, given, Tiles(programs=3)), launch.sparse_ffn(x, given, Tiles()))


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_in_16_bits(dtype, device):
    ffn = made(device, dtype, bits=8, gated=True, act="silu")
    x, given = tokens(ffn, 2), layer.layer_of(ffn)
    memory = launch.allocate(x, given, Tiles())
    launch.project(x, given, Tiles(), memory)
    launch.choose(x, given, Tiles(), memory)
    launch.combine(given, Tiles(), memory)
    # With equal choices: near ties are decided by rounding.
    logits = (x.double() @ given.first.double().T) @ given.second.double().T + given.logit_bias.double()
    table = logits.view(2, -1, 4)
    assert float((table.amax(-1) - logits.gather(1, memory.units.long())).max()) < 0.1 * float(logits.std())
    chosen = memory.units.long()
    up, gate, down = (weight(ffn, name).to(device)[chosen] for name in ("up", "gate", "down"))
    inner = F.silu(torch.einsum("tbd,td->tb", gate, x.double())) * torch.einsum("tbd,td->tb", up, x.double())
    expected = torch.einsum("tb,tbd->td", inner, down) + given.bias.double()
    assert relative(memory.out, expected) < BOUND[dtype]


@on_triton
def test_what_was_not_chosen_is_not_read(device):
    ffn = made(device, torch.float32, block=8)
    x, given = tokens(ffn, 1), layer.layer_of(ffn)
    expected = launch.sparse_ffn(x, given)
    units = naive.choose(x, given)[0].reshape(-1)
    others = torch.ones(96, dtype=torch.bool, device=device)
    others[units] = False
    ffn.up[others], ffn.down[others] = torch.nan, torch.nan
    assert torch.equal(launch.sparse_ffn(x, given), expected)


def test_a_module_reads_the_chosen_rows_alone():
    ffn = made(block=8, gated=True, act="silu", bias=True)
    x = tokens(ffn, 3)
    expected = ffn(x)
    units = naive.choose(x, layer.layer_of(ffn))[0].reshape(-1)
    others = torch.ones(96, dtype=torch.bool)
    others[units] = False
    for name in ("up", "gate", "down", "up_bias", "gate_bias"):
        getattr(ffn, name)[others] = torch.nan
    assert torch.equal(ffn(x), expected)


@on_triton
def test_logits_that_are_nan_read_nothing_outside(device):
    ffn = made(device, torch.float32, block=6)
    ffn.controller_out.fill_(torch.nan)
    assert launch.sparse_ffn(tokens(ffn, 1), layer.layer_of(ffn)).shape == (1, 48)


@pytest.mark.parametrize("device", EVERYWHERE)
def test_the_operator_and_its_fake(device):
    ffn = made(device, torch.float32, bits=4, group=32, out=64, gated=True, act="silu")
    x, given = tokens(ffn, 2), layer.layer_of(ffn)
    arguments = (x, given.first, given.second, given.logit_bias, *given.up, *given.gate, *given.down[:2], given.bias)
    found = torch.ops.hf_optim.sparse_ffn(*arguments, given.block, given.act, given.weighted)
    assert torch.equal(found, op.sparse_ffn(x, given))
    torch.library.opcheck(
        torch.ops.hf_optim.sparse_ffn, (*arguments, given.block, given.act, given.weighted),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_what_the_kernels_do_not_compute_is_said():
    ffn = made(dtype=torch.float32)
    given, x = layer.layer_of(ffn), tokens(ffn)
    assert op.unsupported(x, given) is None
    assert "float64" in op.unsupported(x.double(), given)
    assert "mish" in op.unsupported(x, given._replace(act="mish"))
    assert "blocks of 512" in op.unsupported(x, given._replace(block=512))
    assert "controller" in op.unsupported(x, given._replace(first=given.first.bfloat16()))
    assert "weights" in op.unsupported(x, given._replace(up=given.up._replace(data=given.up.data.bfloat16())))
    odd = layer.layer_of(made(dtype=torch.float32, bits=4, group=12, width=72))
    assert "groups of 12" in op.unsupported(x, odd)
    assert layer.layer_of(made(act="mish")) is None
    assert layer.layer_of(SparseFFN({**ENTRY, "block": 1, "rank": 0})) is None


def test_no_token():
    ffn = made(dtype=torch.float32)
    assert launch.sparse_ffn(tokens(ffn, 0), layer.layer_of(ffn)).shape == (0, 48)
    assert ffn(tokens(ffn, 0)).shape == (0, 48)
