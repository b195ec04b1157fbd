"""2:4 codes of four bits in the order of sparse tensor cores: the order, its kernels, and the layers on them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from interpreting import BOUND, CUDA, EVERYWHERE, on_triton, relative
from tiny_models import tiny_llama
from torch import nn

import hf_optim
from hf_optim import Kernel, compressed
from hf_optim.compressed.packed.swap import prepack as prepack_first
from hf_optim_kernels.sparse24 import layer, mma_layout, naive, op, tiles
from hf_optim_kernels.sparse24.naive import PackedTensors

ROW = 1 << 20
# group, zero points
GRIDS = [(128, False), (64, True), (32, False), (32, True), (ROW, False), (ROW, True), (256, True)]


def product(x, *weight):
    return op.linear(x, PackedTensors(*weight))


def random_codes(out, columns, group, zero, seed=0):
    """uint8 codes, where they are kept, scale and zero [groups, out]; some 2:4 groups keep one column or none."""
    g = torch.Generator().manual_seed(seed)
    order = torch.rand(out, columns // 4, 4, generator=g).argsort(-1).argsort(-1)
    kept = (order < 2).view(out, columns) & (torch.rand(out, columns, generator=g) > 0.1)
    size = min(group, columns)
    scale = torch.rand(columns // size, out, generator=g) * 0.1 + 0.01
    points = torch.randint(0, 16, scale.shape, generator=g, dtype=torch.uint8) if zero else None
    spread = (torch.full(scale.shape, 8, dtype=torch.uint8) if points is None else points).T.repeat_interleave(size, 1)
    codes = torch.where(kept, torch.randint(0, 16, (out, columns), generator=g, dtype=torch.uint8), spread)
    return codes, codes != spread, scale, points


def random_case(rows, out, columns, group, zero, dtype, device="cpu", seed=0, bias=True):
    """Arguments of the operator and the float64 result."""
    codes, kept, scale, points = random_codes(out, columns, group, zero, seed)
    g, size, scale = torch.Generator().manual_seed(seed + 1), min(group, columns), scale.to(dtype)
    offset = 8.0 if points is None else points.double().T.repeat_interleave(size, 1)
    weight = (codes.double() - offset) * scale.double().T.repeat_interleave(size, 1)
    added = torch.randn(out, generator=g).to(dtype) if bias else None
    x = torch.randn(rows, columns, generator=g).to(dtype)
    reference = x.double() @ weight.T + (0.0 if added is None else added.double())
    semaphores = torch.zeros(tiles.SEMAPHORES, dtype=torch.int32)
    tensors = [x, *mma_layout.pack(codes, kept), scale, points, added, semaphores]
    moved = [None if tensor is None else tensor.to(device) for tensor in tensors]
    return (*moved, 4, size, 8), reference.to(device)


# -- the order --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(16, 128), (48, 384)])
def test_packing_is_undone_by_unpacking(shape):
    codes, kept, *_ = random_codes(*shape, 128, True)
    values, bits = mma_layout.pack(codes, kept)
    assert values.shape == (shape[0] // 16, shape[1] // 128, 32, 4)
    # Three bits a weight.
    assert 4 * (values.numel() + bits.numel()) == shape[0] * shape[1] * 3 // 8
    found, at = mma_layout.unpack(values, bits)
    assert torch.equal(found[kept], codes[kept])
    assert not bool((kept & ~at).any())
    assert bool((at.view(-1, 4).sum(1) == 2).all())


def test_more_than_two_of_four_are_refused():
    kept = torch.zeros(16, 128, dtype=torch.bool)
    kept[3, 8:11] = True
    with pytest.raises(ValueError, match="more than two"):
        mma_layout.pack(torch.ones(16, 128, dtype=torch.uint8), kept)


def inputs_of(x, unit, i):
    """What the lanes of a warp read of ``x`` [8, in] for instruction ``i`` of a column tile: [32, 4, 2]."""
    lane, pair, half = torch.arange(32)[:, None, None], torch.arange(4)[:, None], torch.arange(2)
    place = lane % 4
    return x[lane // 4, unit * 128 + i * 32 + place // 2 * 16 + place % 2 * 2 + pair * 4 + half]


def instruction(stored, places, selector, inputs):
    """``mma.sp.m16n8k32``: registers of 32 lanes (numbers [32, 4, 2], places [32], inputs [32, 4, 2]) to [16, 8]."""
    sparse, dense = torch.zeros(16, 32, dtype=torch.float64), torch.zeros(32, 8, dtype=torch.float64)
    for lane in range(32):
        quad, place = divmod(lane, 4)
        for j in range(4):
            dense[8 * j + 2 * place : 8 * j + 2 * place + 2, quad] = inputs[lane, j]
            row, four = quad + 8 * (j % 2), place + 4 * (j // 2)
            word = int(places[quad * 4 + selector * 2 + four // 4]) >> (16 * (j % 2) + 4 * (four % 4))
            for k in range(2):
                sparse[row, 4 * four + (word >> (2 * k) & 3)] += stored[lane, j, k]
    return sparse @ dense


@pytest.mark.parametrize("zero", [False, True])
def test_the_instruction_gives_the_product(zero):
    """The order against the instruction as its manual has it, not against ``unpack``."""
    (x, values, bits, scale, points, *_), reference = random_case(8, 32, 256, 128, zero, torch.float32, bias=False)
    found = torch.zeros(8, 32, dtype=torch.float64)
    shifts = torch.tensor([[4 * r, 4 * r + 16] for r in range(4)])
    quad = torch.arange(32) // 4
    for tile in range(2):
        for unit in range(2):
            rows = 16 * tile + quad[:, None] + 8 * (torch.arange(4) % 2)
            offset = points[unit][rows].double() if zero else torch.full((32, 4), 8.0, dtype=torch.float64)
            total = torch.zeros(16, 8, dtype=torch.float64)
            for i in range(4):
                codes = values[tile, unit, :, i].long()[:, None, None] >> shifts & 15
                words = bits[tile, unit, :, i // 2].long() & 0xFFFFFFFF
                total += instruction(codes.double() - offset[..., None], words, i % 2, inputs_of(x, unit, i).double())
            found[:, 16 * tile : 16 * tile + 16] += (total * scale[unit, 16 * tile : 16 * tile + 16, None].double()).T
    assert relative(found, reference) < 1e-12


# -- the kernels ------------------------------------------------------------------------------------------------------
@on_triton
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_is_decompressed_as_the_specification_says(grid, device):
    (_, values, bits, scale, zero, _, _, *form), _ = random_case(1, 48, 256, *grid, torch.float16, device)
    wanted = naive.dequantize(PackedTensors(values, bits, scale, zero, None, None, *form), 256)
    assert torch.equal(op.weight_of(values, bits, scale, zero, *form, 256, torch.float16), wanted.half())
    (_, values, bits, scale, zero, _, _, *form), _ = random_case(1, 48, 256, *grid, torch.bfloat16, device)
    wanted = naive.dequantize(PackedTensors(values, bits, scale, zero, None, None, *form), 256, torch.float64)
    found = op.weight_of(values, bits, scale, zero, *form, 256, torch.bfloat16)
    assert relative(found, wanted) < BOUND[torch.bfloat16]
    assert torch.equal(found == 0, wanted == 0)


@on_triton
@pytest.mark.parametrize("rows", [1, 8, 11, 17])
def test_staged_inputs_are_what_lanes_read(rows, device):
    from hf_optim_kernels.sparse24 import tensor_core_launch

    x = torch.randn(rows, 384, generator=torch.Generator().manual_seed(0)).half()
    found = tensor_core_launch.staged(x.to(device), 2).cpu()
    assert found.shape == (2 * -(-rows // 16), 3, 1024)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -rows % 16))
    for block in range(len(found)):
        for unit in range(3):
            wanted = torch.stack([inputs_of(padded[8 * block : 8 * block + 8], unit, i) for i in range(4)])
            assert torch.equal(found[block, unit], wanted.flatten())


# Every grid with one type: compiling takes longer than running.
@pytest.mark.many
@on_triton
@pytest.mark.parametrize(
    ("grid", "dtype"), [(g, (torch.bfloat16, torch.float16)[i % 2]) for i, g in enumerate(GRIDS)], ids=str
)
def test_the_operator_equals_float64(grid, dtype, device):
    for rows in (1, 3) if device == "cpu" else (*range(1, 18), 31, 65, 300):
        arguments, reference = random_case(rows, 80, 768, *grid, dtype, device)
        # Decompressed, a weight is rounded by itself.
        bound = BOUND[dtype] * (1.5 if device == "cpu" or rows > tiles.MOST_TILED_ROWS else 1)
        assert relative(product(*arguments), reference) < bound, rows
        assert not bool(arguments[6].any())


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("shape", [(48, 256), (336, 11008), (1008, 14336)], ids=str)
def test_every_configuration_equals_float64(shape, device):
    from hf_optim_kernels.sparse24 import launch

    for rows, dtype in ((1, torch.bfloat16), (5, torch.float16), (16, torch.bfloat16), (65, torch.bfloat16)):
        arguments, reference = random_case(rows, *shape, 128, True, dtype, device)
        for config in tiles.tiled_candidates(*shape, rows)[: 4 if rows == 5 else 3]:
            torch.full((rows, shape[0]), float("nan"), dtype=dtype, device=device)
            y = launch.sparse24(arguments[0], PackedTensors(*arguments[1:]), config)
            assert relative(y, reference) < BOUND[dtype] * (1.5 if config["path"] == "dense" else 1), config
            assert torch.equal(launch.sparse24(arguments[0], PackedTensors(*arguments[1:]), config), y), config
            assert not bool(arguments[6].any()), config


@on_triton
def test_no_rows_more_dimensions_and_strides(device):
    (x, *rest), reference = random_case(6, 32, 128, 64, True, torch.float16, device)
    bound = 1.5 * BOUND[torch.float16]
    assert product(x[:0], *rest).shape == (0, 32)
    assert relative(product(x.view(2, 3, 128), *rest).view(6, 32), reference) < bound
    shifted = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(6, 128)  # not aligned to 16 bytes
    for strided in (x.T.contiguous().T, torch.stack((x, x), 1)[:, 0], torch.stack((x, x), 2)[:, :, 1], shifted):
        assert relative(product(strided, *rest), reference) < bound


# -- the operator -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", EVERYWHERE)
def test_the_operator_is_well_formed(device):
    arguments, _ = random_case(3, 32, 128, 64, True, torch.float16, device)
    arguments[0].requires_grad_()
    torch.library.opcheck(torch.ops.hf_optim.sparse24.default, arguments)
    _, values, bits, scale, zero, _, _, *form = arguments
    weight = (values, bits, scale, zero, *form, 128, torch.float16)
    torch.library.opcheck(torch.ops.hf_optim.sparse24_weight.default, weight)


def test_inputs_of_another_width_are_refused():
    (x, *rest), _ = random_case(3, 32, 256, 64, False, torch.float16)
    with pytest.raises(ValueError, match="columns"):
        product(x.new_zeros(3, 128), *rest)


# -- layers -----------------------------------------------------------------------------------------------------------
def weight_as_told(out, columns, group, zero, dtype=torch.float16, *, bias=True, seed=0, **changes):
    """A weight as the host describes it, and its codes."""
    codes, _, scale, points = random_codes(out, columns, group, zero, seed)
    found = SimpleNamespace(
        codes=codes, scale=scale.to(dtype).T.contiguous(), zero=None if points is None else points.T.contiguous(),
        order=None, input_scale=None, input_zero=None,
    )  # fmt: skip
    told = {
        "name": "m", "shape": (out, columns), "dtype": dtype, "device": torch.device("cpu"), "kind": "int", "bits": 4,
        "group_size": min(group, columns), "symmetric": not zero, "ordered": False, "inputs": None, "outliers": None,
        "sparse24": True, "codes": lambda: found,
        "bias": torch.randn(out, generator=torch.Generator().manual_seed(seed + 5)).to(dtype) if bias else None,
    }  # fmt: skip
    return SimpleNamespace(**{**told, **changes}), found


def same(found, wanted):
    for name in ("codes", "scale", "zero"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert (one is None) == (other is None), name
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), name


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_come_back_bit_for_bit(grid):
    weight, codes = weight_as_told(48, 256, *grid)
    bound = layer.prepack(weight)
    assert mma_layout.holds(bound.values)
    assert "sparse tensor cores" in bound.label
    same(bound.codes(), codes)
    again = layer.prepack(weight)
    again.load_state_dict(copy.deepcopy(bound).state_dict())
    same(again.codes(), codes)


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("bias", [True, False])
def test_joined_operands(device, bias):
    told = [weight_as_told(out, 256, 128, True, bias=bias, seed=out)[0] for out in (48, 16, 16)]
    bound = [layer.prepack(weight).to(device) for weight in told]
    whole = layer.join(bound)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(7)).half().to(device)
    assert relative(whole(x), torch.cat([part(x).double() for part in bound], -1)) < BOUND[torch.float16]
    assert torch.equal(whole.codes().codes.cpu(), torch.cat([weight.codes().codes for weight in told]))
    other = layer.prepack(weight_as_told(24, 256, 128, True, bias=bias)[0]).to(device)
    assert not mma_layout.holds(other.values)
    assert layer.join([*bound, other]) is None


@pytest.mark.parametrize("device", EVERYWHERE)
def test_a_layer_again_and_again(device):
    """Launches that are kept ready, compiled graphs, a gradient, and a bias that became another tensor."""
    weight, found = weight_as_told(48, 256, 128, True)
    bound = layer.prepack(weight).to(device)
    scale, zero = (part.double().repeat_interleave(128, 1) for part in (found.scale, found.zero))
    value = (found.codes.double() - zero) * scale
    for rows in (1, 1, 4, 40, 1):
        x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).half().to(device)
        wanted = x.double() @ value.T.to(device) + weight.bias.double().to(device)
        for _ in range(3):
            assert relative(bound(x), wanted) < 1.5 * BOUND[torch.float16]
        assert relative(torch.compile(bound, backend="eager", fullgraph=True)(x), wanted) < 1.5 * BOUND[torch.float16]
    z = x.clone().requires_grad_()
    bound(z).sum().backward()
    assert relative(z.grad, value.sum(0, keepdim=True).to(device)) < 2 * BOUND[torch.float16]
    bound._buffers["bias"] = bound.bias + 1
    bound.renew()
    assert relative(bound(x), wanted + 1) < 1.5 * BOUND[torch.float16]
    assert not copy.deepcopy(bound).plans


@pytest.mark.parametrize(
    ("shape", "changes", "served"),
    [
        ((2048, 2048), {}, True),
        ((2048, 2048), {"group_size": 32}, True),
        ((2048, 2048), {"group_size": 2048}, True),
        ((2048, 2048), {"group_size": 48}, False),
        ((2048, 2048), {"bits": 8}, False),
        ((2056, 2048), {}, False),
        ((2048, 2112), {}, False),
    ],
)
def test_which_codes_are_served(monkeypatch, shape, changes, served):
    monkeypatch.setattr(layer, "unsupported_device", lambda device: None)
    told = {**vars(weight_as_told(16, 128, 128, False)[0]), "shape": shape, "group_size": 128, **changes}
    reason = layer.supports(SimpleNamespace(**told))
    assert reason is None if served else reason


def test_a_kernel_of_24_is_asked_first_for_what_is_24():
    weight, _ = weight_as_told(16, 128, 128, False)
    every = Kernel("every", supports=lambda w: None, prepack=layer.prepack)
    special = Kernel("24", supports=lambda w: None, prepack=layer.prepack, sparse24=True)
    assert prepack_first(weight, [every, special])[0] is special
    weight.sparse24 = False
    assert prepack_first(weight, [every, special])[0] is every


@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (4096, 4096), (16, 128), (48, 896)])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 32, 64, 128, 256, 8192])
def test_configurations_are_whole_tiles(shape, rows):
    for config in [tiles.default_tiles(*shape, rows), *tiles.tiled_candidates(*shape, rows)]:
        assert config.keys() == tiles.DENSE.keys()
        if config["path"] == "tiles":
            assert config["BLOCK_M"] in (8, 16, 32, 64)
            assert config["BLOCK_N"] in (16, 32, 64)
            assert config["FOURS"] >= 32
            # Registers: sums of a lane.
            assert config["BLOCK_M"] * config["BLOCK_N"] <= 2048


# -- models -----------------------------------------------------------------------------------------------------------
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


def pruned_llama(device="cpu", **sizes):
    """A Llama of 2:4 codes of four bits, in groups of 32, the last layer not 2:4."""
    model = tiny_llama(**{**SIZES, **sizes}).to(torch.bfloat16).requires_grad_(False)
    scheme = hf_optim.compressed.schemes.scheme(4, strategy="group", group_size=32)
    g = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            codes, _, scale, _ = random_codes(module.out_features, module.in_features, 32, False)
            if "down" in name:
                codes = torch.randint(0, 16, codes.shape, generator=g, dtype=torch.uint8)
            compressed.store(module, scheme, (codes.int() - 8).to(torch.int8), scale.T.bfloat16() / 10)
    compressed.attach_quantizer(model)
    return model.to(device)


def labels(model):
    return {row.name.rsplit(".", 1)[-1]: row.kernel for row in hf_optim.report(model) if row.name != "lm_head"}


def test_a_model_lands_on_the_kernel_and_is_saved_as_it_was(monkeypatch, tmp_path):
    """The host's part, with the specification for a kernel: without a recipe the whole catalogue offers."""
    monkeypatch.setattr(layer, "unsupported_device", lambda device: None)
    monkeypatch.setattr(layer, "LEAST_WEIGHTS", 0)
    lands_and_is_saved(pruned_llama(), tmp_path)


@pytest.mark.parametrize("device", [CUDA])
def test_a_model_on_a_device(tmp_path, device):
    lands_and_is_saved(pruned_llama(device, hidden_size=2048, intermediate_size=4096), tmp_path)


def lands_and_is_saved(model, folder):
    tokens = torch.arange(5, 17, device=model.device)[None]
    model.save_pretrained(folder / "before")
    logits = model(tokens).logits
    hf_optim.accelerate(model)
    runs = labels(model)
    assert all("sparse tensor cores" in runs[name] for name in ("q_proj", "o_proj", "gate_proj", "up_proj")), runs
    assert "sparse24" not in (runs["down_proj"] or "")
    assert relative(model(tokens).logits, logits) < 3e-2
    model.save_pretrained(folder / "after")
    before, after = ((folder / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    where = {"device_map": str(model.device)} if model.device.type == "cuda" else {}
    again = type(model).from_pretrained(folder / "after", optim_config="auto", dtype=torch.bfloat16, **where)
    assert labels(again)["q_proj"] == runs["q_proj"]
    assert relative(again(tokens).logits, logits) < 3e-2
    hf_optim.restore(model)
    assert torch.equal(model(tokens).logits, logits)
