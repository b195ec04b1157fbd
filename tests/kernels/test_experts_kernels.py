"""The experts' operators: the specification against each expert by itself, and the kernels against float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from interpreting import BOUND, EVERYWHERE, on_triton, relative

pytest.importorskip("triton")

from hf_optim_kernels.experts import descriptors, launch, naive, op
from hf_optim_kernels.experts.naive import Gate, Weights
from hf_optim_kernels.experts.tiles import fitting_stages

ACTS = {naive.SILU: F.silu, naive.GELU: F.gelu, naive.RELU: F.relu, naive.RELU_SQUARED: lambda x: F.relu(x).square(),
        naive.GELU_TANH: lambda x: F.gelu(x, approximate="tanh")}  # fmt: skip
GATES = {
    "silu": Gate(),
    "interleaved-clamped": Gate(naive.INTERLEAVED, naive.SILU, 1.702, 1.0, 0.8),
    "concatenated-clamped": Gate(naive.CONCATENATED, naive.SILU, 1.0, 0.0, 0.8),
    "gelu": Gate(naive.CONCATENATED, naive.GELU),
    "gelu-tanh": Gate(naive.CONCATENATED, naive.GELU_TANH),
    "no-gate": Gate(naive.UNGATED, naive.RELU_SQUARED),
}
T16 = launch.Tiles(16, 16, 4, 2, group=3)
PATHS = {
    "decode": launch.Plan(0, launch.Tiles(8, 16, 4, 2), launch.Tiles(16, 16, 4, 2, split=8)),
    "decode-whole": launch.Plan(0, launch.Tiles(16, 64, 4, 1), launch.Tiles(32, 32, 4, 1)),
    "blocks-of-16": launch.Plan(16, T16, T16),
    "described": launch.Plan(16, T16._replace(described=True), T16._replace(described=True, persistent=True)),
    "blocks-of-32-and-halves": launch.Plan(32, T16._replace(halves=True), T16._replace(n=32, k=32, halves=True)),
}
# Every gate on the kernels of decoding and on grouped products; on the other paths those that differ most.
CASES = [(path, gate) for path in ("decode", "blocks-of-16") for gate in GATES]
CASES += [(path, gate) for path in ("decode-whole", "blocks-of-32-and-halves") for gate in ("silu", "no-gate")]


def layer(gate, *, experts=5, d=48, inner=48, bias=False, transposed=False, dtype=torch.float32, device="cpu"):
    random = torch.Generator().manual_seed(d)
    rows = inner if gate.layout == naive.UNGATED else 2 * inner
    draw = lambda *size: (torch.randn(size, generator=random) / size[-1] ** 0.5).to(device, dtype)  # noqa: E731
    up, down = draw(experts, rows, d), draw(experts, d, inner)
    biases = (draw(experts, rows), draw(experts, d)) if bias else (None, None)
    if transposed:
        up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    return Weights(up, down, *biases, transposed)


def inputs(tokens, top_k, experts, d=48, dtype=torch.float32, device="cpu", dropped=False):
    random = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, d, generator=random).to(device, dtype)
    chosen = torch.rand(tokens, experts, generator=random).topk(top_k, dim=1).indices
    if dropped:
        chosen[torch.rand(chosen.shape, generator=random) < 0.4] = experts + 2
    return hidden, chosen.to(device), torch.rand(tokens, top_k, generator=random).to(device)


def exact(hidden, chosen, weights, given, gate):
    """The layer in float64, one pair at a time."""
    wide = [None if t is None else t.double().cpu() for t in given[:4]]
    given = Weights(*wide, given.transposed)
    up, down = given.matrices
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for t, row in enumerate(chosen.tolist()):
        for j, e in enumerate(row):
            if not 0 <= e < len(up):
                continue
            y = up[e] @ hidden[t].double().cpu() + (0 if given.up_bias is None else given.up_bias[e])
            if gate.layout == naive.UNGATED:
                y = ACTS[gate.act](y)
            else:
                g, u = (y[::2], y[1::2]) if gate.layout == naive.INTERLEAVED else y.chunk(2)
                g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
                y = (ACTS[gate.act](g * gate.alpha) / gate.alpha if gate.alpha != 1 else ACTS[gate.act](g)) * (
                    u + gate.offset
                )
            y = down[e] @ y + (0 if given.down_bias is None else given.down_bias[e])
            out[t] += weights[t, j].double().cpu() * y
    return out


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_specification_is_each_expert_by_itself(gate, bias, transposed):
    given = layer(GATES[gate], bias=bias, transposed=transposed, dtype=torch.float64)
    hidden, chosen, weights = inputs(6, 2, 5, dtype=torch.float64, dropped=True)
    own = naive.mixture(hidden, chosen, weights, given, GATES[gate])
    assert relative(own, exact(hidden, chosen, weights, given, GATES[gate])) < 1e-7


@pytest.mark.many
@on_triton
@pytest.mark.parametrize(("path", "gate"), CASES)
def test_kernels_compute_the_layer(path, gate, device):
    bias, transposed = "clamped" in gate, gate == "interleaved-clamped" or gate == "gelu"
    given = layer(GATES[gate], bias=bias, transposed=transposed, device=device)
    hidden, chosen, weights = inputs(3 if "decode" in path else 7, 3, 5, device=device, dropped=True)
    own = launch.mixture(hidden, chosen, weights, given, GATES[gate], PATHS[path])
    assert relative(own.cpu(), exact(hidden, chosen, weights, given, GATES[gate])) < BOUND[torch.float32]


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_kernels_compute_the_layer_in_16_bits(path, dtype, device):
    given = layer(Gate(), dtype=dtype, device=device, d=64, inner=32)
    hidden, chosen, weights = inputs(2 if "decode" in path else 7, 3, 5, d=64, dtype=dtype, device=device)
    own = launch.mixture(hidden, chosen, weights.to(dtype), given, Gate(), PATHS[path])
    assert own.dtype == dtype
    assert relative(own.cpu(), exact(hidden, chosen, weights.to(dtype), given, Gate())) < 2 * BOUND[dtype]


# A tile may read rows that no expert computes, which hold anything.
@on_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("gate", ["interleaved-clamped", "concatenated-clamped", "no-gate"])
@pytest.mark.parametrize("transposed", [False, True])
def test_descriptors_read_every_layout(gate, transposed, device):
    gate = GATES[gate]
    given = layer(gate, dtype=torch.float16, device=device, d=48, inner=80, bias=True, transposed=transposed)
    hidden, chosen, weights = inputs(7, 2, 5, dtype=torch.float16, device=device, dropped=True)
    assert descriptors.can_describe(given.matrices[0], hidden)
    own = launch.mixture(hidden, chosen, weights, given, gate, PATHS["described"])
    assert relative(own.cpu(), exact(hidden, chosen, weights, given, gate)) < 2 * BOUND[torch.float16]


# (transposed, gate, rows by pair, k, bias): the first product of a layer, and the second.
TRIALS = [
    (False, Gate(), False, 2, False), (True, GATES["interleaved-clamped"], False, 3, True),
    (False, None, True, 0, True),
]  # fmt: skip


@on_triton
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("trial", TRIALS)
def test_a_configuration_is_compared_with_the_specification(trial, device):
    transposed, gate, by_pair, top_k, bias = trial
    tiles = T16._replace(described=True, persistent=top_k == 0)
    given = torch.float16, torch.device(device), transposed, gate, 16, tiles, by_pair, top_k, bias
    assert descriptors.trial_error(*given, launch.rows_product) < descriptors.LARGEST_ERROR / 10

    def shifted(*args):
        return launch.rows_product(*args).roll(1, dims=1)

    assert descriptors.trial_error(*given, shifted) > descriptors.LARGEST_ERROR


def test_a_configuration_that_is_wrong_or_cannot_be_built_gives_way(monkeypatch, caplog):
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float16)
    monkeypatch.setattr(descriptors, "_right", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ask = lambda block: descriptors.are_right(x, False, None, block, T16, True, 0, False, None)  # noqa: E731
    assert not ask(16)
    assert not descriptors._right  # nothing is decided while a graph is captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    errors = iter([0.001, 1.4, float("inf")])
    monkeypatch.setattr(descriptors, "trial_error", lambda *args: next(errors))
    assert [ask(16), ask(32), ask(64)] == [True, False, False]
    assert [ask(16), ask(32), ask(64)] == [True, False, False]  # each is tried once
    assert "differ from their specification" in caplog.text
    monkeypatch.setattr(descriptors, "trial_error", lambda *args: 1 / 0)
    assert not ask(128)
    assert not descriptors.is_trying()


@pytest.mark.parametrize("shared", [101_376, 166_912, 232_448])  # of an RTX 4090, an A100, an H200
@pytest.mark.parametrize("size", [2, 4])
def test_tiles_fit_into_the_memory_of_a_multiprocessor(shared, size):
    for pairs, gated in itertools.product((8, 150, 300, 4000), (True, False)):
        block = naive.block_rows(pairs, 8)
        tiles = launch.default_tiles(block, 4096, 2048, gated)
        width = min(tiles.n, 128 if size == 4 else 256) * (2 if gated else 1)
        one = (block + width) * tiles.k * 2
        stages = fitting_stages(tiles.stages, one, shared)
        assert stages * one <= shared
        assert stages == tiles.stages or shared < 232_448
        assert stages > 1


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("gate", ["silu", "no-gate"])
def test_products_and_sum_by_themselves_are_the_layer(gate, device):
    gate = GATES[gate]
    given = layer(gate, bias=True, transposed=gate.layout == naive.CONCATENATED, device=device)
    hidden, chosen, weights = inputs(9, 2, 5, device=device, dropped=True)
    found = op.find_route(chosen, 5, 16)
    up, down = given.matrices
    rows = op.rows_product(hidden, up, given.up_bias, found, 2, False, 16)
    rows = op.rows_product(naive.apply_gate(rows, gate), down, given.down_bias, found, 0, True, 16)
    own = op.combine(rows, chosen, weights, 5, torch.float32)
    assert relative(own.cpu(), exact(hidden, chosen, weights, given, gate)) < 2e-6


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize(
    ("tokens", "top_k", "count"), [(0, 2, 3), (1, 1, 1), (5, 1, 1), (6, 3, 3), (40, 2, 3)],
)  # fmt: skip
def test_the_least_and_the_most_of_everything(tokens, top_k, count, device):
    given = layer(Gate(), experts=count, d=16, inner=16, device=device)
    hidden, chosen, weights = inputs(tokens, top_k, count, d=16, device=device)
    for case in (chosen, torch.full_like(chosen, count - 1), torch.full_like(chosen, count), -torch.ones_like(chosen)):
        own = op.mixture(hidden, case, weights, given, Gate())
        assert own.shape == hidden.shape
        expected = exact(hidden, case, weights, given, Gate())
        assert float((own.cpu() - expected).abs().max() if tokens else 0) < 1e-5


@pytest.mark.parametrize("device", EVERYWHERE)
def test_inputs_need_not_be_contiguous(device):
    given = layer(Gate(), bias=True, device=device)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in given[:4]]
    hidden, chosen, weights = inputs(6, 2, 5, device=device)
    others = [torch.stack([t, t], dim=-1)[..., 0] for t in (hidden, chosen, weights)]
    assert not any(t.is_contiguous() for t in (*strided, *others))
    own = op.mixture(*others, Weights(*strided, False), Gate())
    assert relative(own.cpu(), exact(hidden, chosen, weights, given, Gate())) < BOUND[torch.float32]


@pytest.mark.parametrize("device", EVERYWHERE)
def test_operators_have_the_shapes_of_their_fakes(device):
    given = layer(Gate(), device=device, experts=3, d=16, inner=16)
    hidden, chosen, weights = inputs(5, 2, 3, d=16, device=device)
    ops, utils = torch.ops.hf_optim, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.experts_mixture, (hidden, chosen, weights, *given, *Gate()), test_utils=utils)
    found = op.find_route(chosen, 3, 16)
    torch.library.opcheck(ops.experts_rows, (hidden, given.up, None, *found, 2, False, 16), test_utils=utils)
    rows = torch.randn(10, 16, device=device)
    torch.library.opcheck(ops.experts_combine, (rows, chosen, weights, 3, torch.float16), test_utils=utils)


@pytest.mark.gpu
def test_experts_beyond_2_to_the_31_weights_are_read():
    E, d, inner = 40, 4096, 8192  # the matrices of the last experts begin behind 2^31
    up = torch.zeros(E, 2 * inner, d, dtype=torch.bfloat16, device="cuda")
    down = torch.zeros(E, d, inner, dtype=torch.bfloat16, device="cuda")
    assert up.numel() > 1 << 31
    up[-1].normal_(std=d**-0.5)
    down[-1].normal_(std=inner**-0.5)
    given = Weights(up, down, None, None, False)
    last = Weights(up[-1:], down[-1:], None, None, False)
    for tokens in (1, 8, 300, 3000):
        hidden = torch.randn(tokens, d, dtype=torch.bfloat16, device="cuda")
        chosen = torch.full((tokens, 1), E - 1, device="cuda")
        weights = torch.ones(tokens, 1, device="cuda")
        expected = naive.mixture(hidden, torch.zeros_like(chosen), weights, last, Gate())
        assert relative(op.mixture(hidden, chosen, weights, given, Gate()), expected) < 2**-6


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 300, 3000])
def test_a_captured_layer_follows_other_inputs(tokens):
    given = layer(Gate(), experts=8, d=256, inner=384, dtype=torch.bfloat16, device="cuda")
    hidden, chosen, weights = inputs(tokens, 2, 8, d=256, dtype=torch.bfloat16, device="cuda")
    op.mixture(hidden, chosen, weights, given, Gate())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.mixture(hidden, chosen, weights, given, Gate())
    hidden.normal_()
    chosen.copy_(torch.randint(0, 9, chosen.shape))
    graph.replay()
    expected = naive.mixture(hidden, chosen, weights, given, Gate())
    assert relative(out, expected) < 2**-6
    assert torch.equal(out, op.mixture(hidden, chosen, weights, given, Gate()))
