"""hf_optim::decode_attention: the specification, the kernels, and what they do not read."""

from __future__ import annotations

import pytest
import torch
from interpreting import BOUND, on_triton, relative

pytest.importorskip("triton")

from absent_device import launches_on

from hf_optim_kernels.decode_attention import launch, naive, op
from hf_optim_kernels.decode_attention.kernel import _attend_kernel, _combine_kernel

SHAPES = {  # rows, heads, key heads, new tokens, positions, head size, value head size
    "grouped": (2, 4, 2, 1, 37, 32, 32),
    "one-key-head": (1, 8, 1, 1, 300, 64, 64),
    "a-few-tokens": (3, 4, 4, 3, 130, 40, 24),
    "many-pieces": (1, 6, 2, 2, 2500, 16, 16),
    "more-rows-than-a-program": (1, 10, 2, 16, 150, 16, 16),
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
    found = naive.decode_attention(query, key, value, mask, None, sinks, 0.3, softcap)
    assert relative(found, oracle(query, key, value, mask, sinks, 0.3, softcap)) < 1e-6


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel(shape, dtype, device):
    query, key, value = tensors(shape, dtype, device)
    mask = padded(shape, device)
    found = op.decode_attention(query, key, value, mask, None, None, 0.2, 0.0)
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
        found = op.decode_attention(query, key, value, mask, None, sinks, 0.4, 2.5)
        assert relative(found.cpu(), oracle(query, key, value, mask, sinks, 0.4, 2.5)) < 4e-6


@on_triton
def test_masked_positions_are_not_read(device):
    """A cache has numbers of an earlier sequence, or none at all, behind the tokens that it holds."""
    query, key, value = tensors("many-pieces", torch.float32, device)
    mask = torch.zeros(1, 1, 2, 2500, dtype=torch.bool, device=device)
    mask[..., 700:1900] = True  # padding before, a window behind: whole pieces are left out
    expected = op.decode_attention(query, key, value, mask, None, None, 0.2, 0.0)
    key[:, :, :700], value[:, :, 1900:] = float("nan"), float("nan")
    key[:, :, 1900:], value[:, :, :700] = float("inf"), float("inf")
    assert torch.equal(op.decode_attention(query, key, value, mask, None, None, 0.2, 0.0), expected)


@on_triton
def test_a_query_that_sees_nothing_gives_zero(device):
    query, key, value = tensors("grouped", torch.float32, device)
    mask = torch.ones(2, 1, 1, 37, dtype=torch.bool, device=device)
    mask[1] = False
    found = op.decode_attention(query, key, value, mask, None, None, 0.2, 0.0)
    assert not found[1].any()
    assert relative(found[0], op.decode_attention(query, key, value, None, None, None, 0.2, 0.0)[0]) < 1e-6


@on_triton
def test_strides_of_a_larger_cache(device):
    query, key, value = tensors("grouped", torch.float32, device)
    room = torch.zeros(2, 2, 64, 32, device=device)
    room[:, :, :37] = key
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    found = op.decode_attention(transposed, room[:, :, :37], value, None, None, None, 0.2, 0.0)
    assert torch.equal(found, op.decode_attention(query, key, value, None, None, None, 0.2, 0.0))


def windows(shape, device, window=20):
    """A mask with padding on the left, causal among the new tokens, that shows the last ``window`` positions."""
    B, _, _, Q, N, _, _ = SHAPES[shape]
    at = torch.arange(N)
    query = N - 9 - Q + torch.arange(Q)[:, None]
    mask = ((at <= query) & (at > query - window)).repeat(B, 1, 1, 1)
    mask[0, ..., : N - Q - 14] = False
    return mask.to(device)


@on_triton
@pytest.mark.parametrize("shape", ["grouped", "many-pieces", "more-rows-than-a-program"])
def test_ranges_take_the_place_of_a_mask(shape, device):
    """Left padding, a sliding window and causal tokens are ranges, with which no mask is read."""
    query, key, value = tensors(shape, torch.float32, device)
    mask = windows(shape, device)
    ranges = op.mask_ranges(mask)
    expected = oracle(query, key, value, mask, None, 0.2, 0.0)
    for given in (mask, None):
        found = op.decode_attention(query, key, value, given, ranges, None, 0.2, 0.0)
        assert relative(found.cpu(), expected) < 4e-6
    assert relative(naive.decode_attention(query, key, value, None, ranges, None, 0.2, 0.0).cpu(), expected) < 4e-6
    if shape == "many-pieces":  # nothing outside of the window is read
        key[:, :, : 2500 - 9 - 2 - 14], value[:, :, 2500 - 9 :] = float("nan"), float("nan")
        assert torch.equal(op.decode_attention(query, key, value, None, ranges, None, 0.2, 0.0), found)


@on_triton
@pytest.mark.parametrize("shape", ["one-key-head", "a-few-tokens"])
def test_masks_with_holes(shape, device):
    query, key, value = tensors(shape, torch.float32, device)
    mask = padded(shape, device)
    mask[0, ..., 9:30:3] = False
    found = op.decode_attention(query, key, value, mask, None, None, 0.2, 0.0)
    assert relative(found.cpu(), oracle(query, key, value, mask, None, 0.2, 0.0)) < 4e-6


def test_ranges_of_a_mask():
    mask = torch.zeros(2, 1, 2, 6, dtype=torch.bool)
    mask[0, 0, 0, 2:5] = True
    mask[0, 0, 1, [1, 4]] = True
    mask[1, 0, 1] = True
    assert op.mask_ranges(mask).tolist() == [[[2, 5, 3], [1, 5, 2]], [[6, 0, 0], [0, 6, 6]]]


def test_pieces_fill_the_device():
    def busy(pairs, positions):
        """The share of the time of the slots in which programs read, and the pieces."""
        split = launch.pieces(pairs, positions, 64, 512, 264, 2)
        return pairs * positions / (-(-pairs * split // 264) * 264 * -(-positions // split)), split

    assert busy(8, 32768) == (pytest.approx(1.0, abs=0.01), 33)
    assert busy(16, 16384)[0] > 0.95
    assert busy(128, 8192)[0] > 0.95
    assert busy(140, 32768)[0] > 0.9  # a piece for each would leave half of the device idle
    assert busy(8, 256)[1] == 4
    assert busy(4096, 256)[1] == 1


@on_triton
def test_a_cache_that_grows_adds_no_launches(device, monkeypatch):
    """A dynamic cache has another length at each token: what was compiled for one serves the next."""
    found = []
    monkeypatch.setattr(launch, "launch", lambda *args, key, **options: found.append((args[0], args[3], key)))
    for positions in range(1999, 2034):
        query, key = (torch.zeros(1, heads, n, 16, device=device) for heads, n in ((4, 1), (2, positions)))
        launch.decode_attention(query, key, key, None, None, None, 0.2, 0.0)
    attend, combine = ([each for each in found if each[0] is kernel] for kernel in (_attend_kernel, _combine_kernel))
    assert len({key for *_, key in attend}) == 1
    # Sums of pieces are compiled for powers of two of them.
    assert len({key for *_, key in combine}) == len({constants["SPLITS"] for _, constants, _ in combine}) <= 2


@pytest.mark.parametrize("processors", [4, 108, 132])
def test_a_long_text_compiles_a_few_kernels(processors):
    """From the first token to 4,096, on devices on which the number of pieces goes up and down with the length."""
    with launches_on(launch, processors=processors) as found:
        query = torch.empty(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
        for positions in (*range(1, 4096, 13), *range(4080, 4100)):
            key = torch.empty(1, 2, positions, 128, device="cuda", dtype=torch.bfloat16)
            launch.decode_attention(query, key, key, None, None, None, 0.2, 0.0)
    attend, combine = (
        {each["key"] for each in found if each["name"] == name} for name in ("_attend_kernel", "_combine_kernel")
    )
    assert len(attend) == 2  # in one piece, and in several
    assert 1 <= len(combine) <= launch.MOST_PIECES.bit_length() - 1


@pytest.mark.parametrize("ahead", [False, True])
def test_attention_begins_early_where_it_is_switched_on(ahead, monkeypatch):
    """The sum of pieces does in both cases; that it lets the next launch begin is of use to attention alone."""
    monkeypatch.setattr(launch, "AHEAD", ahead)
    with launches_on(launch) as found:
        query, key = (torch.empty(1, n, m, 128, device="cuda", dtype=torch.float16) for n, m in ((8, 1), (2, 4096)))
        launch.decode_attention(query, key, key, None, None, None, 0.2, 0.0)
    attend, combine = (each["constants"] for each in found)
    assert (attend["EARLY"], attend["AHEAD"], combine["EARLY"], combine["AHEAD"]) == (True, ahead, True, ahead)
    assert {each["fetched"] for each in launch.candidates()} == ({0, 2} if ahead else {2})


def test_what_it_does_not_take():
    query, key, value = tensors("grouped", torch.bfloat16, "cpu")
    assert op.unsupported(query, key, value, None) is None
    assert "float64" in op.unsupported(query.double(), key.double(), value.double(), None)
    assert "evenly" in op.unsupported(query[:, :3], key, value, None)
    assert "17 new tokens" in op.unsupported(query.expand(2, 4, 17, 32), key, value, None)
    assert "mask" in op.unsupported(query, key, value, torch.zeros(2, 4, 1, 37, dtype=torch.bool))
    assert "mask" in op.unsupported(query, key, value, torch.zeros(2, 1, 1, 37))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_is_registered(dtype):
    query, key, value = tensors("grouped", dtype, "cpu")
    mask = padded("grouped", "cpu")
    arguments = (query, key, value, mask, op.mask_ranges(mask), None, 0.2, 0.0)
    torch.library.opcheck(op.decode_attention, arguments, test_utils=("test_schema", "test_faketensor"))
