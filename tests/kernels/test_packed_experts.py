"""Packed experts: the operators against float64 products of the codes, and the codes that they give back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from interpreting import BOUND, EVERYWHERE, on_triton, relative
from torch.nn import functional as F

pytest.importorskip("triton")

from hf_optim_kernels.common.codes import Codes
from hf_optim_kernels.packed_experts import base, cpu, launch, layer, naive, op

# experts, d, I, bits, group (0: a row), symmetric
SHAPES = {
    "int4": (5, 64, 32, 4, 32, True),
    "int3-zeros": (3, 96, 64, 3, 32, False),
    "int8-rows": (4, 80, 48, 8, 0, True),
    "int4-small-groups": (4, 64, 48, 4, 16, False),
}
# tokens, choices of each
CHOICES = {"one": (1, 2), "few": (7, 2), "many": (70, 2), "none": (0, 2)}


class Mixture:
    """Random codes of experts, their dense matrices in float64, and their description."""

    def __init__(self, experts, d, inner, bits, group, symmetric, dtype=torch.float32, device="cpu", activation="silu"):
        random = torch.Generator().manual_seed(bits * 10 + d)
        self.dtype, self.device = dtype, torch.device(device)
        self.stored, self.dense, described = {}, {}, {}
        for side, (rows, columns) in {"up": (2 * inner, d), "down": (d, inner)}.items():
            size = group or columns
            grid = rows, columns // size
            self.stored[side], dense = [], []
            for _ in range(experts):
                codes = torch.randint(0, 2**bits, (rows, columns), generator=random, dtype=torch.uint8)
                scale = ((torch.rand(grid, generator=random) + 0.2) * 1.6 / 2**bits).to(dtype)
                zero = None
                if not symmetric:
                    zero = torch.randint(0, 2**bits, grid, generator=random, dtype=torch.uint8)
                offset = 2 ** (bits - 1) if zero is None else zero.double()[..., None]
                dense.append(((codes.double().view(*grid, -1) - offset) * scale.double()[..., None]).flatten(1))
                self.stored[side].append(Codes(*(t if t is None else t.to(device) for t in (codes, scale, zero))))
            self.dense[side] = torch.stack(dense)
            described[side] = SimpleNamespace(
                kind="int", bits=bits, group_size=size, symmetric=symmetric, ordered=False, inputs=None, dtype=dtype,
                shape=(rows, columns), device=self.device,
            )  # fmt: skip
        self.description = SimpleNamespace(
            **described, count=experts, activation=activation, codes=lambda side, expert: [self.stored[side][expert]]
        )
        self.random, self.experts, self.d = random, experts, d

    def inputs(self, tokens, top_k):
        """hidden, chosen experts with one that nobody computes, and weights."""
        hidden = torch.randn(tokens, self.d, generator=self.random).to(self.dtype)
        chosen = torch.stack([torch.randperm(self.experts, generator=self.random)[:top_k] for _ in range(tokens)])\
            if tokens else torch.zeros(0, top_k, dtype=torch.int64)  # fmt: skip
        if tokens > 2:
            chosen[1, 0], chosen[2] = self.experts, self.experts + 9
        weights = torch.rand(tokens, top_k, generator=self.random)
        return hidden.to(self.device), chosen.to(self.device), weights.to(self.device)

    def expected(self, hidden, chosen, weights):
        out = torch.zeros(hidden.shape, dtype=torch.float64)
        for token, (numbers, gates) in enumerate(zip(chosen.tolist(), weights.double().tolist(), strict=True)):
            for number, gate in zip(numbers, gates, strict=True):
                if number < self.experts:
                    first, second = (self.dense["up"][number] @ hidden[token].double().cpu()).chunk(2)
                    out[token] += gate * (self.dense["down"][number] @ (F.silu(first) * second))
        return out


def silu_gate(pairs):
    first, second = pairs.chunk(2, dim=-1)
    return F.silu(first) * second


def bound(dtype):
    # Three roundings of 16 bits follow each other; in float32 those of the sums.
    return 4 * BOUND[dtype] if dtype != torch.float32 else 3e-6


@pytest.mark.many
@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mixture_is_what_its_codes_stand_for(shape, choice, device):
    mixture = Mixture(*SHAPES[shape], device=device)
    packed = layer.PackedExperts(mixture.description)
    inputs = mixture.inputs(*CHOICES[choice])
    expected = mixture.expected(*inputs)
    together = packed(*inputs, silu_gate)
    apart = base.ExpertsBase.forward(packed, *inputs, silu_gate)  # any other activation, or a norm
    assert together.shape == apart.shape == inputs[0].shape
    if len(expected):
        assert relative(together.cpu(), expected) <= bound(torch.float32)
        assert relative(apart.cpu(), expected) <= bound(torch.float32)
    assert not packed.semaphores.any()


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("choice", ["one", "few"])
def test_kernels_multiply_16_bits(choice, dtype, device):
    mixture = Mixture(*SHAPES["int4"], dtype=dtype, device=device)
    packed = layer.PackedExperts(mixture.description)
    inputs = mixture.inputs(*CHOICES[choice])
    assert relative(packed(*inputs, silu_gate).cpu(), mixture.expected(*inputs)) <= bound(dtype)


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("single", [True, False], ids=["alone", "sorted"])
@pytest.mark.parametrize("split", [1, 4])
def test_every_tile_gives_the_same_mixture(single, split, device):
    mixture = Mixture(3, 256, 80, 4, 16, False, device=device)
    packed = layer.PackedExperts(mixture.description)
    hidden, chosen, weights = mixture.inputs(3, 2)
    tiles = {"BLOCK_M": 16, "BLOCK_N": 64, "SPLIT": split, "num_warps": 4, "num_stages": 2}
    found = launch.packed_experts(
        hidden, chosen, weights, packed.weight("up"), packed.weight("down"), packed.semaphores, (tiles, tiles), single
    )
    assert relative(found.cpu(), mixture.expected(hidden, chosen, weights)) <= bound(torch.float32)
    assert not packed.semaphores.any()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [40, 100, 700])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_many_rows_give_the_same(shape, tokens):
    mixture = Mixture(*SHAPES[shape], dtype=torch.bfloat16, device="cuda")
    packed = layer.PackedExperts(mixture.description)
    inputs = mixture.inputs(tokens, 2)
    assert relative(packed(*inputs, silu_gate).cpu(), mixture.expected(*inputs)) <= bound(torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_come_back_bit_by_bit(shape):
    mixture = Mixture(*SHAPES[shape])
    packed = layer.PackedExperts(mixture.description)
    for side, stored in mixture.stored.items():
        for expert, right in enumerate(stored):
            (own,) = packed.codes(side, expert)
            for name in ("codes", "scale", "zero"):
                a, b = getattr(own, name), getattr(right, name)
                assert (a is None and b is None) or torch.equal(a, b), (side, expert, name)


@pytest.mark.parametrize("shape", ["int4", "int8-rows"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_operators_of_a_cpu_give_the_same(shape, choice):
    experts, d, inner, bits, group, symmetric = SHAPES[shape]
    mixture = Mixture(experts, d, inner, bits, group, symmetric, dtype=torch.bfloat16)
    if cpu.unsupported_reason(mixture.description) is not None:
        pytest.skip("PyTorch's packed operators are not used on this CPU")
    packed = layer.prepack(mixture.description)
    assert isinstance(packed, cpu.CpuExperts)
    inputs = mixture.inputs(*CHOICES[choice])
    expected = mixture.expected(*inputs)
    found = packed(*inputs, silu_gate)
    assert found.dtype == torch.bfloat16
    if len(expected):
        assert relative(found, expected) <= 2**-6
    for side, stored in mixture.stored.items():
        assert all(torch.equal(packed.codes(side, e)[0].codes, right.codes) for e, right in enumerate(stored))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_decoded_experts(dtype):
    mixture = Mixture(*SHAPES["int4"], dtype=dtype)
    packed = layer.prepack(mixture.description)
    hidden, chosen, weights = mixture.inputs(7, 2)
    hidden.requires_grad_()
    weights.requires_grad_()
    packed(hidden, chosen, weights, silu_gate).float().square().sum().backward()
    plain, gates = (t.detach().double().requires_grad_() for t in (hidden, weights))
    out = torch.zeros(7, mixture.d, dtype=torch.float64)
    for number in range(mixture.experts):
        tokens, places = (chosen == number).nonzero(as_tuple=True)
        inner = silu_gate(plain[tokens] @ mixture.dense["up"][number].T)
        out = out.index_add(0, tokens, inner @ mixture.dense["down"][number].T * gates[tokens, places, None])
    out.square().sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 2**-5
    assert relative(hidden.grad, plain.grad) <= limit
    assert relative(weights.grad, gates.grad) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_has_no_break(dtype):
    mixture = Mixture(*SHAPES["int4"], dtype=dtype)
    packed = layer.prepack(mixture.description)
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (1, 7):
            inputs = mixture.inputs(tokens, 2)
            torch.testing.assert_close(compiled(*inputs, silu_gate), packed(*inputs, silu_gate), rtol=0, atol=0)


def test_reordered_columns_of_two_parts_are_multiplied_in_their_order():
    mixture = Mixture(*SHAPES["int4"])
    orders = torch.stack([torch.randperm(64, generator=mixture.random) for _ in range(2)])
    whole = mixture.stored["up"]
    parts = [
        [Codes(c.codes[rows], c.scale[rows], None, orders[i]) for i, rows in enumerate((slice(0, 32), slice(32, 64)))]
        for c in whole
    ]
    given = mixture.description.codes
    mixture.description.codes = lambda side, expert: parts[expert] if side == "up" else given(side, expert)
    packed = layer.PackedExperts(mixture.description)
    for number in range(mixture.experts):
        for i, rows in enumerate((slice(0, 32), slice(32, 64))):
            mixture.dense["up"][number, rows] = mixture.dense["up"][number, rows][:, orders[i].argsort()]
    inputs = mixture.inputs(7, 2)
    assert not packed.fused
    assert relative(packed(*inputs, silu_gate), mixture.expected(*inputs)) <= bound(torch.float32)
    own = packed.codes("up", 1)
    assert [torch.equal(part.order, order) for part, order in zip(own, orders, strict=True)] == [True, True]


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_inputs_are_rounded_per_token(kind):
    mixture = Mixture(*SHAPES["int8-rows"])
    inputs = SimpleNamespace(type=kind, dynamic=True, symmetric=True)
    for side in ("up", "down"):
        matrix = getattr(mixture.description, side)
        matrix.inputs, matrix.kind = inputs, "float" if kind == "float8" else "int"
        if kind == "float8":
            mixture.stored[side] = [
                Codes((c.codes.float() - 128).to(torch.float8_e4m3fn), c.scale) for c in mixture.stored[side]
            ]
            mixture.dense[side] = torch.stack([c.codes.double() * c.scale.double() for c in mixture.stored[side]])
    packed = layer.PackedExperts(mixture.description)

    def rounded(x):
        scale = x.abs().amax(-1, keepdim=True) / (127.5 if kind == "int8" else 448)
        steps = x / scale
        return (steps.round().clamp(-128, 127) if kind == "int8" else steps.to(torch.float8_e4m3fn).to(x.dtype)) * scale

    hidden, chosen, weights = mixture.inputs(6, 2)
    expected = torch.zeros(6, mixture.d, dtype=torch.float64)
    for number in range(mixture.experts):
        tokens, places = (chosen == number).nonzero(as_tuple=True)
        inner = silu_gate(rounded(hidden[tokens]).double() @ mixture.dense["up"][number].T).float()
        out = rounded(inner).double() @ mixture.dense["down"][number].T
        expected.index_add_(0, tokens, out * weights[tokens, places, None])
    assert relative(packed(hidden, chosen, weights, silu_gate), expected) <= 1e-3
    codes = "8-bit" if kind == "int8" else "float8"
    assert packed.label == f"packed experts (decoded one at a time), {codes}, {kind} inputs"


def test_only_rows_of_chosen_experts_are_decoded(monkeypatch):
    mixture = Mixture(*SHAPES["int4"])
    packed = layer.PackedExperts(mixture.description)
    seen = []
    plain = naive.decode_rows
    monkeypatch.setattr(naive, "CHUNK", 16 * 64)
    monkeypatch.setattr(naive, "decode_rows", lambda *args: seen.append(args[1:4]) or plain(*args))
    hidden, _, weights = mixture.inputs(1, 2)
    chosen = torch.tensor([[3, 1]])
    found = naive.packed_experts(hidden, chosen, weights, packed.weight("up"), packed.weight("down"))
    assert relative(found, mixture.expected(hidden, chosen, weights)) <= bound(torch.float32)
    up, down = ([(e, i, i + step) for e in (1, 3) for i in range(0, 64, step)] for step in (16, 32))
    assert seen == up + down


@pytest.mark.parametrize("device", EVERYWHERE)
def test_the_operators_are_well_formed(device):
    mixture = Mixture(*SHAPES["int4"], device=device)
    packed = layer.PackedExperts(mixture.description)
    hidden, chosen, weights = mixture.inputs(3, 2)
    up, down, checks = packed.weight("up"), packed.weight("down"), ("test_schema", "test_faketensor")
    torch.library.opcheck(op.packed_expert_linear, (hidden, chosen, *up, packed.semaphores), test_utils=checks)
    sides = (*up[:3], up.width, up.group_size, *down[:3], down.width, down.group_size)
    torch.library.opcheck(op.packed_experts, (hidden, chosen, weights, *sides, packed.semaphores), test_utils=checks)


def test_tiles_fit_the_memory_of_a_device():
    for pairs in (1, 8, 64, 512, 4096, 40000):
        for zeros in (False, True):
            whole = launch.default(pairs, 8, 4096, 4096, 4, False, zeros)
            ampere = launch.default(pairs, 8, 4096, 4096, 4, False, zeros, memory=166912)
            small = launch.default(pairs, 8, 4096, 4096, 4, False, zeros, memory=101376)
            assert ampere["BLOCK_M"] <= min(64, whole["BLOCK_M"])
            assert small["num_stages"] == 2 or small["BLOCK_M"] <= 16
    assert launch.default(40000, 8, 4096, 4096, 4, False)["BLOCK_M"] == 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("shape", ["int4", "int3-zeros", "int8-rows"])
def test_experts_of_a_cpu_are_packed_again_where_they_have_moved_to(shape, blocks, dtype, monkeypatch):
    mixture = Mixture(*SHAPES[shape], dtype=dtype)
    packed = layer.prepack(mixture.description)
    if isinstance(packed, layer.PackedExperts):
        pytest.skip("PyTorch's packed operators are not used on this CPU")
    packed.codes("up", 0)  # what is known of a layout of the CPU is found out there
    if not blocks:
        monkeypatch.setattr(cpu.linear_cpu, "_block_rows", lambda rows: 0)
    description = mixture.description
    for matrix in (description.up, description.down):
        matrix.device = torch.device("meta")
        matrix.symmetric = True  # whether a grid is symmetric after all is in its numbers
    description.codes = packed.to("meta").codes
    again = layer.prepack(description)
    assert type(again) is layer.PackedExperts
    assert {name: buffer.device.type for name, buffer in again.named_buffers()} == dict.fromkeys(
        ("up_packed", "up_scale", "down_packed", "down_scale", "semaphores"), "meta"
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_experts_of_a_float32_model_on_a_cpu_stay_decoded_and_keep_their_codes(shape):
    mixture = Mixture(*SHAPES[shape])
    packed = layer.prepack(mixture.description)
    assert packed.label.startswith("dense float32 experts")
    inputs = mixture.inputs(7, 2)
    assert relative(packed(*inputs, silu_gate), mixture.expected(*inputs)) <= bound(torch.float32)
    for side, stored in mixture.stored.items():
        for expert, right in enumerate(stored):
            (own,) = packed.codes(side, expert)
            assert torch.equal(own.codes, right.codes)
            assert torch.equal(own.scale, right.scale)
            assert (own.zero is None) == (right.zero is None)
            assert own.zero is None or torch.equal(own.zero, right.zero)


def test_codes_that_decoded_weights_do_not_give_back_stay_packed():
    mixture = Mixture(*SHAPES["int4"])
    mixture.stored["down"][1].scale[3] = 0
    packed = layer.prepack(mixture.description)
    assert isinstance(packed, layer.PackedExperts)
    assert torch.equal(packed.codes("down", 1)[0].codes, mixture.stored["down"][1].codes)
