"""hf_optim::decode_attention: the specification, the kernels, and what they do not read."""

from __future__ import annotations

import pytest
import torch
from interpreting import BOUND, on_triton, relative

from hf_optim_kernels.decode_attention import launch, naive, op

pytest.importorskip("triton")

SHAPES = {  # rows, heads, key heads, new tokens, positions, head size, value head size
    "grouped": (2, 4, 2, 1, 37, 32, 32),
    "one-key-head": (1, 8, 1, 1, 300, 64, 64),
    "a-few-tokens": (3, 4, 4, 3, 130, 40, 24),
    "many-pieces": (1, 6, 2, 2, 2500, 16, 16),
}


def tensors(shape, dtype, device, seed=0):
    B, H, G, Q, N, D, DV = SHAPES[shape]
    random = torch.Generator().manual_seed(seed)
    sizes = (B, H, Q, D), (B, G, N, D), (B, G, N, DV)
    return tuple(torch.randn(size, generator=random).to(device, dtype) for size in sizes)


def oracle(query, key, value, mask, sinks, scale, softcap):
    """Attention in float64, one query head at a time."""
    B, H, Q, _ = query.shape
    group = H // key.shape[1]
    out = torch.zeros(B, Q, H, value.shape[3], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            k, v = key[b, h // group].double().cpu(), value[b, h // group].double().cpu()
            scores = query[b, h].double().cpu() @ k.T * scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            for t in range(Q):
                allowed = torch.ones(len(k), dtype=torch.bool)
                if mask is not None:
                    allowed = mask[b if mask.shape[0] > 1 else 0, 0, t].cpu()
                if not allowed.any():
                    continue
                powers = scores[t, allowed].exp()
                total = powers.sum() + (sinks[h].double().cpu().exp() if sinks is not None else 0.0)
                out[b, t, h] = (powers / total) @ v[allowed]
    return out


def padded(shape, device):
    """A mask with padding on the left and room for more tokens on the right."""
    B, _, _, Q, N, _, _ = SHAPES[shape]
    mask = torch.zeros(B, 1, Q, N, dtype=torch.bool)
    for row in range(B):
        for token in range(Q):
            mask[row, 0, token, 2 * row : N // 2 + token] = True
    return mask.to(device)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("shape", ["grouped", "a-few-tokens"])
def test_the_specification(shape, with_sinks, softcap):
    query, key, value = tensors(shape, torch.float64, "cpu")
    sinks = torch.linspace(-1, 2, query.shape[1]) if with_sinks else None
    mask = padded(shape, "cpu")
    found = naive.decode_attention(query, key, value, mask, sinks, 0.3, softcap)
    assert relative(found, oracle(query, key, value, mask, sinks, 0.3, softcap)) < 1e-6


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel(shape, dtype, device):
    query, key, value = tensors(shape, dtype, device)
    mask = padded(shape, device)
    found = op.decode_attention(query, key, value, mask, None, 0.2, 0.0)
    assert found.dtype == dtype
    # The weights are rounded to the type of the values before their product, as in other flash kernels.
    bound = 4e-6 if dtype == torch.float32 else 2 * BOUND[dtype]
    assert relative(found.cpu(), oracle(query, key, value, mask, None, 0.2, 0.0)) < bound


@on_triton
@pytest.mark.parametrize("shape", ["grouped", "many-pieces"])
def test_softcap_and_sinks(shape, device):
    query, key, value = tensors(shape, torch.float32, device)
    sinks = torch.linspace(-1, 3, query.shape[1]).to(device)
    for mask in (None, padded(shape, device)):
        found = op.decode_attention(query, key, value, mask, sinks, 0.4, 2.5)
        assert relative(found.cpu(), oracle(query, key, value, mask, sinks, 0.4, 2.5)) < 4e-6


@on_triton
def test_masked_positions_are_not_read(device):
    """A cache has numbers of an earlier sequence, or none at all, behind the tokens that it holds."""
    query, key, value = tensors("many-pieces", torch.float32, device)
    mask = torch.zeros(1, 1, 2, 2500, dtype=torch.bool, device=device)
    mask[..., 700:1900] = True  # padding before, a window behind: whole pieces are left out
    expected = op.decode_attention(query, key, value, mask, None, 0.2, 0.0)
    key[:, :, :700], value[:, :, 1900:] = float("nan"), float("nan")
    key[:, :, 1900:], value[:, :, :700] = float("inf"), float("inf")
    assert torch.equal(op.decode_attention(query, key, value, mask, None, 0.2, 0.0), expected)


@on_triton
def test_a_query_that_sees_nothing_gives_zero(device):
    query, key, value = tensors("grouped", torch.float32, device)
    mask = torch.ones(2, 1, 1, 37, dtype=torch.bool, device=device)
    mask[1] = False
    found = op.decode_attention(query, key, value, mask, None, 0.2, 0.0)
    assert not found[1].any()
    assert relative(found[0], op.decode_attention(query, key, value, None, None, 0.2, 0.0)[0]) < 1e-6


@on_triton
def test_strides_of_a_larger_cache(device):
    query, key, value = tensors("grouped", torch.float32, device)
    room = torch.zeros(2, 2, 64, 32, device=device)
    room[:, :, :37] = key
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    found = op.decode_attention(transposed, room[:, :, :37], value, None, None, 0.2, 0.0)
    assert torch.equal(found, op.decode_attention(query, key, value, None, None, 0.2, 0.0))


@pytest.mark.parametrize(
    ("pairs", "positions", "count"), [(8, 256, 4), (8, 32768, 66), (128, 32768, 16), (4096, 256, 1)]
)
def test_pieces_fill_the_device(pairs, positions, count):
    found = launch.pieces(pairs, positions, 64, 132)
    assert found == count
    assert -(-positions // found) <= launch.LONGEST


def test_what_it_does_not_take():
    query, key, value = tensors("grouped", torch.bfloat16, "cpu")
    assert op.unsupported(query, key, value, None) is None
    assert "float64" in op.unsupported(query.double(), key.double(), value.double(), None)
    assert "evenly" in op.unsupported(query[:, :3], key, value, None)
    assert "100 new tokens" in op.unsupported(query.expand(2, 4, 100, 32), key, value, None)
    assert "mask" in op.unsupported(query, key, value, torch.zeros(2, 4, 1, 37, dtype=torch.bool))
    assert "mask" in op.unsupported(query, key, value, torch.zeros(2, 1, 1, 37))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_is_registered(dtype):
    query, key, value = tensors("grouped", dtype, "cpu")
    arguments = (query, key, value, padded("grouped", "cpu"), None, 0.2, 0.0)
    torch.library.opcheck(op.decode_attention, arguments, test_utils=("test_schema", "test_faketensor"))
