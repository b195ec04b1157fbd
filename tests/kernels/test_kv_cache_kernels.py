"""hf_optim::kv_append and kv_attend: the specification, the kernels, and what they do not read."""

from __future__ import annotations

import pytest
import torch
from interpreting import BOUND, on_triton, relative

pytest.importorskip("triton")

from absent_device import launches_on
from compile_launches import compile_one

from hf_optim_kernels.decode_attention import launch as decode_launch
from hf_optim_kernels.kv_cache import launch, naive, op
from hf_optim_kernels.kv_cache.format import FLOAT8_MAX, TINY, Format, Store, allocate, capacity

FORMATS = {
    "int8": Format(8, False, False, 64, 32, True),
    "int8-zeros-group-32": Format(8, False, False, 32, 8, False),
    "int8-per-token": Format(8, False, True, 64, 0, True),
    "float8": Format(8, True, False, 64, 16, True),
    "int4": Format(4, False, False, 64, 32, False),
    "int4-symmetric-group-128": Format(4, False, False, 128, 0, True),
    "int4-per-token": Format(4, False, True, 64, 16, False),
}
SHAPES = {  # rows, heads, key heads, new tokens, positions, head size, value head size
    "grouped": (2, 4, 2, 1, 300, 24, 20),
    "one-key-head": (1, 8, 1, 1, 390, 16, 16),
    "a-few-tokens": (2, 3, 3, 3, 290, 16, 24),
}
WIDE = {"wide": (1, 2, 1, 1, 110, 256, 256), "wide-keys": (1, 2, 1, 1, 110, 192, 64)}


def tensors(shape, dtype=torch.float32, device="cpu", seed=0):
    B, H, G, Q, N, D, DV = {**SHAPES, **WIDE}[shape]
    random = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(size, generator=random) for size in ((B, H, Q, D), (B, G, N, D), (B, G, N, DV)))
    key[..., ::7] += 5  # channels that are large for every token
    return tuple(t.to(device, dtype) for t in (query, key, value))


def filled(fmt, key, value, room=0):
    store = allocate(fmt, key, value, key.shape[2] + room)
    quantized = naive.append(store, fmt, 0, 0, key, value)
    return store, quantized


def state_of(tokens, quantized, device="cpu"):
    return torch.tensor([tokens, quantized, 0], dtype=torch.int32, device=device)


def fields(fmt):
    return [int(each) for each in fmt]


def mask_of(shape, device):
    """Padding on the left, a window, and room for more tokens on the right."""
    B, _, _, Q, N, _, _ = SHAPES[shape]
    mask = torch.zeros(B, 1, Q, N + 9, dtype=torch.bool)
    for row in range(B):
        for token in range(Q):
            mask[row, 0, token, 71 * row + 5 : N - Q + token + 1] = True
    return mask.to(device)


def exact(query, store, fmt, tokens, quantized, mask, sinks, scale, softcap):
    """Attention in float64, one head at a time, of the values that the codes stand for."""
    wide = Store(*(t.double().cpu() if t.is_floating_point() else t.cpu() for t in store))
    k, v = naive.read(wide, fmt, tokens, quantized)
    B, H, Q, _ = query.shape
    group, out = H // k.shape[1], torch.zeros(B, Q, H, v.shape[3], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            scores = query[b, h].double().cpu() @ k[b, h // group].T * scale
            if softcap:
                scores = softcap * (scores / softcap).tanh()
            for t in range(Q):
                allowed = torch.ones(tokens, dtype=torch.bool) if mask is None else mask[b, 0, t, :tokens].cpu()
                powers = scores[t, allowed].exp()
                total = powers.sum() + (sinks[h].double().cpu().exp() if sinks is not None else 0.0)
                out[b, t, h] = (powers / total) @ v[b, h // group, allowed]
    return out


# -- the formulas -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_the_nearest_of_the_formula(bits):
    x = torch.randn(5, 40, dtype=torch.float64).float() * torch.logspace(-3, 3, 5)[:, None]
    levels = 2**bits - 1
    codes, scale, zero = naive.quantize(x, 1, Format(bits, False, False, 64, 0, False))
    wide = x.double()
    low, high = wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)
    assert relative(scale, (high - low) / levels) < 1e-7
    assert int(codes.min()) == 0
    assert int(codes.max()) == levels
    values = naive.decode(codes, scale, zero, Format(bits, False, False, 64, 0, False)).double()
    assert ((values - wide).abs() <= (high - low) / levels * 0.5001).all()
    nearest = ((wide - low) / ((high - low) / levels)).round()
    assert (codes - nearest).abs().max() <= 1
    assert (codes == nearest).double().mean() > 0.99

    codes, scale, zero = naive.quantize(x, 1, Format(bits, False, False, 64, 0, True))
    top = 2 ** (bits - 1) - 1
    assert relative(scale, wide.abs().amax(1, keepdim=True) / top) < 1e-7
    assert not zero.any()
    values = scale.double() * (codes - 2 ** (bits - 1))
    assert ((values - wide).abs() <= scale * 0.5001).all()


def test_float8_codes_are_the_nearest_numbers_of_e4m3():
    x = torch.randn(4, 64)
    fmt = FORMATS["float8"]
    codes, scale, _ = naive.quantize(x, 1, fmt)
    assert relative(scale, x.double().abs().amax(1, keepdim=True) / FLOAT8_MAX) < 1e-7
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    nearest = (x.double() / scale.double())[..., None].sub(grid).abs().amin(-1) * scale
    found = (naive.decode(codes, scale, None, fmt).double() - x.double()).abs()
    assert torch.allclose(found, nearest, rtol=1e-4, atol=1e-6)


def test_equal_numbers_and_zeros_have_a_scale():
    for fmt in FORMATS.values():
        for x in (torch.zeros(2, 8), torch.full((2, 8), 3.25)):
            codes, scale, zero = naive.quantize(x, 1, fmt)
            assert (scale >= TINY).all()
            assert torch.allclose(naive.decode(codes, scale, zero, fmt), x, rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_scales_belong_to_channels_of_a_group_or_to_tokens(name):
    fmt = FORMATS[name]
    _, key, value = tensors("grouped")
    store, quantized = filled(fmt, key, value)
    k, v = naive.read(store, fmt, key.shape[2], quantized)
    assert quantized == (key.shape[2] - fmt.residual) // fmt.step * fmt.step > 0
    assert torch.equal(k[:, :, quantized:], key[:, :, quantized:])
    assert torch.equal(v[:, :, quantized:], value[:, :, quantized:])
    first = key[:, :, : fmt.step]
    codes, scale, zero = naive.quantize(first, -1 if fmt.per_token else 2, fmt)
    assert torch.equal(k[:, :, : fmt.step], naive.decode(codes, scale, zero, fmt))
    codes, scale, zero = naive.quantize(value[:, :, 5], -1, fmt)
    assert torch.equal(v[:, :, 5], naive.decode(codes, scale, zero, fmt))


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_one_by_one_are_stored_as_all_at_once(name):
    fmt = FORMATS[name]
    _, key, value = tensors("grouped")
    expected, quantized = filled(fmt, key, value)
    store, count, first = allocate(fmt, key, value, key.shape[2]), 0, 0
    for new in (1, 130, 1, 60, 1, 107):
        count = naive.append(store, fmt, first, count, key[:, :, first : first + new], value[:, :, first : first + new])
        first += new
    assert count == quantized
    for mine, theirs in zip(store[:6], expected[:6], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(naive.read(store, fmt, first, count)[0], naive.read(expected, fmt, first, count)[0])


def test_a_code_has_its_bits():
    _, key, value = tensors("grouped")
    sizes = {}
    for name in ("int4-symmetric-group-128", "int8"):
        store = allocate(FORMATS[name], key, value, 1024)
        assert capacity(store, FORMATS[name]) == 1024
        sizes[name] = store.key_words.numel() * 2 / (1024 * 2 * 2 * 32)  # two rows, two heads, 24 channels in 32
    assert sizes == {"int4-symmetric-group-128": 0.5, "int8": 1.0}


# -- attention --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_specification(name, shape):
    fmt = FORMATS[name]
    query, key, value = tensors(shape)
    store, quantized = filled(fmt, key, value)
    sinks = torch.linspace(-1, 2, query.shape[1])
    arguments = store, fmt, key.shape[2], quantized, mask_of(shape, "cpu"), sinks, 0.3, 2.5
    assert relative(naive.attend(query, *arguments), exact(query, *arguments)) < 1e-6


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel(name, dtype, device, monkeypatch):
    monkeypatch.setattr(launch, "LEAST_TOKENS", 64)  # several pieces
    monkeypatch.setattr(launch, "INTERPRETED_TAIL", launch.TAIL)
    fmt = FORMATS[name]
    query, key, value = tensors("grouped", dtype, device)
    store, quantized = filled(fmt, key, value, room=9)
    tokens = key.shape[2]
    assert launch.pieces(4, capacity(store, fmt), 4 * launch.SETTINGS[fmt.bits].resident) > 1
    for mask, sinks, softcap in (
        (None, None, 0.0),
        (mask_of("grouped", device), torch.linspace(-1, 3, query.shape[1], device=device), 2.5),
    ):
        found = op.kv_attend(
            query, state_of(tokens, quantized, device), 0, tokens + 9, mask, sinks, 0.2, softcap, fields(fmt), *store
        )
        assert found.dtype == dtype
        expected = exact(query, store, fmt, tokens, quantized, mask, sinks, 0.2, softcap)
        bound = accuracy(fmt, store, expected) if dtype == torch.float32 else 2 * BOUND[dtype]
        assert relative(found.cpu(), expected) < bound


def accuracy(fmt, store, expected):
    """Return the relative error of float32: a few roundings of sums of codes, from which their offset is subtracted."""
    if fmt.float8:
        return 4e-6
    scale = store.value_scale[store.value_scale > 0].double().mean()
    lost = fmt.offset * float(scale / expected.square().mean().sqrt())
    return max(4e-6, 4 * 2**-24 * lost)


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("name", ["int4", "int8", "float8"])
@pytest.mark.parametrize("shape", ["one-key-head", "a-few-tokens"])
def test_wirings(name, shape, device):
    fmt = FORMATS[name]
    query, key, value = tensors(shape, torch.float16, device)
    store, quantized = filled(fmt, key, value)
    tokens, mask = key.shape[2], mask_of(shape, device)
    found = op.kv_attend(
        query, state_of(tokens, quantized, device), 0, tokens + 9, mask, None, 0.2, 0.0, fields(fmt), *store
    )
    expected = exact(query, store, fmt, tokens, quantized, mask, None, 0.2, 0.0)
    assert relative(found.cpu(), expected) < 2 * BOUND[torch.float16]


@on_triton
@pytest.mark.parametrize("name", ["int8", "float8"])
@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_small_and_large_keys_keep_their_precision(name, factor, device):
    """A scale of which float16 holds a few bits only, or keys near the end of its range."""
    fmt = FORMATS[name]
    query, key, value = tensors("one-key-head", torch.float16, device)
    key = key * factor
    store, quantized = filled(fmt, key, value)
    state = state_of(key.shape[2], quantized, device)
    found = op.kv_attend(query, state, 0, key.shape[2], None, None, 0.2 / factor, 0.0, fields(fmt), *store)
    expected = exact(query, store, fmt, key.shape[2], quantized, None, None, 0.2 / factor, 0.0)
    assert relative(found.cpu(), expected) < 2 * BOUND[torch.float16]


@on_triton
@pytest.mark.parametrize("heads", [16, 32])
def test_many_heads_of_a_key_head(heads, device):
    """More rows than one warp has registers for."""
    fmt = FORMATS["int4"]
    query, key, value = tensors("one-key-head", torch.float16, device)
    query = query.repeat(1, heads // 8, 1, 1) * torch.linspace(0.5, 1.5, heads, device=device)[:, None, None]
    query = query.half()
    store, quantized = filled(fmt, key, value)
    state = state_of(key.shape[2], quantized, device)
    found = op.kv_attend(query, state, 0, key.shape[2], None, None, 0.2, 0.0, fields(fmt), *store)
    expected = exact(query, store, fmt, key.shape[2], quantized, None, None, 0.2, 0.0)
    assert relative(found.cpu(), expected) < 2 * BOUND[torch.float16]


@on_triton
@pytest.mark.parametrize(("shape", "name"), [("wide", "int4"), ("wide", "float8"), ("wide-keys", "int8")])
def test_wide_heads(shape, name, device, monkeypatch):
    """Few tokens in full precision are read at once, but as many as a tensor core sums over."""
    monkeypatch.setattr(launch, "INTERPRETED_TAIL", launch.TAIL)
    fmt = FORMATS[name]
    query, key, value = tensors(shape, torch.float16, device)
    store, quantized = filled(fmt, key, value)
    state = state_of(key.shape[2], quantized, device)
    found = op.kv_attend(query, state, 0, key.shape[2], None, None, 0.1, 0.0, fields(fmt), *store)
    expected = exact(query, store, fmt, key.shape[2], quantized, None, None, 0.1, 0.0)
    assert relative(found.cpu(), expected) < 2 * BOUND[torch.float16]


def launches_of(fmt, d, dv, dtype):
    """What attention of a token to keys of ``d`` channels and values of ``dv`` launches on a GPU."""
    with launches_on(launch, decode_launch) as found:
        query, key, value = (
            torch.empty(1, heads, 1, size, device="cuda", dtype=dtype) for heads, size in ((8, d), (2, d), (2, dv))
        )
        state = torch.empty(3, device="cuda", dtype=torch.int32)
        launch.attend(query, state, 0, 2000, allocate(fmt, key, value, 2000), fmt, None, None, 0.1, 0.0)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_sums_of_a_gpu_have_as_many_terms_as_a_tensor_core_takes(name, dtype):
    """Products sum over channels, over tokens of a place of words, and over tokens in full precision."""
    for d, dv in ((16, 16), (40, 24), (64, 64), (128, 128), (256, 64), (64, 256), (256, 256)):
        attend, _ = launches_of(FORMATS[name], d, dv, dtype)
        assert min(attend["constants"][term] for term in ("DP", "SUB", "TAIL")) >= 16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["int4", "int8", "float8"])
def test_attention_of_wide_heads_compiles(name, dtype, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as it is where nothing is set, without a warning
    for each in launches_of(FORMATS[name], 256, 256, dtype):
        assert compile_one(each, 90) is None


@on_triton
def test_a_cache_without_codes_is_dense_attention(device):
    """In full precision, attention is that of the tensors that were given."""
    fmt = FORMATS["int4"]._replace(residual=400)
    query, key, value = tensors("grouped", torch.float32, device)
    store, quantized = filled(fmt, key, value)
    assert quantized == 0
    k, v = naive.read(store, fmt, 300, 0)
    assert torch.equal(k, key)
    assert torch.equal(v, value)
    found = op.kv_attend(query, state_of(300, 0, device), 0, 300, None, None, 0.2, 0.0, fields(fmt), *store)
    expected = torch.nn.functional.scaled_dot_product_attention(query, k, v, scale=0.2, enable_gqa=True)
    assert relative(found.cpu(), expected.transpose(1, 2).cpu()) < 4e-6


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_appends_what_the_specification_does(name, device):
    fmt = FORMATS[name]
    _, key, value = tensors("grouped", torch.bfloat16, device)
    store, quantized = filled(fmt, key[:, :, :100], value[:, :, :100], room=200)
    expected = Store(*(t.clone() for t in store))
    state, tokens, count = state_of(100, quantized, device), 100, quantized
    for new in (1, 70, 1, 64):
        part = key[:, :, tokens : tokens + new], value[:, :, tokens : tokens + new]
        op.kv_append(*part, state, fields(fmt), *store)
        count = naive.append(expected, fmt, tokens, count, *part)
        tokens += new
        assert state.tolist() == [tokens, count, 0]
    assert count > quantized
    for mine, theirs in zip(store[:6], expected[:6], strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(
        naive.read(store, fmt, tokens, count), naive.read(expected, fmt, tokens, count), strict=True
    ):
        assert torch.equal(mine, theirs)


@on_triton
def test_what_is_masked_or_not_written_is_not_read(device):
    """Slots of the tail and codes behind the tokens have numbers of an earlier sequence, or none at all."""
    fmt = FORMATS["int4"]
    query, key, value = tensors("grouped", torch.float32, device)
    store, quantized = filled(fmt, key, value, room=300)
    mask = torch.ones(2, 1, 1, 600, dtype=torch.bool, device=device)
    mask[..., :70] = False  # a whole group, and a part of the next
    mask[..., 298:] = False

    def attend():
        state = state_of(300, quantized, device)
        return op.kv_attend(query, state, 0, 600, mask, None, 0.2, 0.0, fields(fmt), *store)

    expected = attend()
    store.key_scale[:, :, 0], store.value_scale[:, :, :70] = 1e30, 1e-30
    store.value_scale[:, :, quantized:], store.value_zero[:, :, quantized:] = float("nan"), float("nan")
    store.key_scale[:, :, quantized // 64 :] = float("inf")
    for tail in (store.tail_keys, store.tail_values):
        tail[:, :, 298 % fmt.ring], tail[:, :, 300 % fmt.ring] = float("nan"), float("nan")
    assert torch.equal(attend(), expected)


@on_triton
def test_a_query_that_sees_nothing_gives_zero(device):
    fmt = FORMATS["int8"]
    query, key, value = tensors("grouped", torch.float32, device)
    store, quantized = filled(fmt, key, value)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool, device=device)
    mask[1] = False
    state = state_of(300, quantized, device)
    found = op.kv_attend(query, state, 0, 300, mask, None, 0.2, 0.0, fields(fmt), *store)
    assert not found[1].any()
    assert found[0].isfinite().all()
    assert found[0].any()


def test_what_it_does_not_take():
    query = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16)
    assert op.unsupported(query, 2, None) is None
    assert "float64" in op.unsupported(query.double(), 2, None)
    assert "evenly" in op.unsupported(query, 3, None)
    assert "20 new tokens" in op.unsupported(query.expand(1, 8, 20, 64), 2, None)
    assert "heads of 320" in op.unsupported(torch.zeros(1, 8, 1, 320), 2, None)
    assert "mask" in op.unsupported(query, 2, torch.zeros(1, 8, 1, 5, dtype=torch.bool))


@pytest.mark.parametrize("slots", [1188, 1320])
def test_pieces_fill_rounds_of_programs_and_are_not_short(slots):
    for pairs, tokens in ((8, 32768), (64, 8192), (128, 8192), (128, 32768), (256, 4096), (4096, 64), (8, 32)):
        found = launch.pieces(pairs, tokens, slots)
        assert 1 <= found < launch.MOST_PIECES
        if found > 1:
            assert tokens >= found * launch.LEAST_TOKENS
        programs = pairs * (found + launch.TAILS)
        full = programs / (-(-programs // slots) * slots)
        assert full > 0.95 or tokens < (found + 2) * launch.LEAST_TOKENS


@pytest.mark.parametrize("name", ["int4", "float8"])
def test_the_operators_are_registered(name):
    fmt = FORMATS[name]
    query, key, value = tensors("grouped")
    store, quantized = filled(fmt, key, value, room=9)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    state = state_of(300, quantized)
    arguments = query, state, 0, 309, mask_of("grouped", "cpu"), None, 0.2, 0.0, fields(fmt), *store
    torch.library.opcheck(op.kv_attend, arguments, **checks)
    torch.library.opcheck(op.kv_append, (key[:, :, :2], value[:, :, :2], state, fields(fmt), *store), **checks)
