"""hf_optim::ring_attention: the specification, the kernels, and what they write and do not read."""

from __future__ import annotations

import pytest
import torch
from interpreting import BOUND, EVERYWHERE, on_triton, relative

pytest.importorskip("triton")

from absent_device import launches_on

from hf_optim_kernels.ring_attention import launch, naive, op
from hf_optim_kernels.ring_attention.kernel import ITEM

SIZE, RAMP, SCALE = 1000, 9, 0.3
CASES = {  # query heads of a key head; keys that each query head sees; head size, value head size
    "short-and-long": (1, (40, 8, 700, 1), 16, 16),
    "grouped": (3, (20, 5, 60, 300, 310, 2), 16, 32),
    "odd-sizes": (2, (33, 90, 17, 17), 24, 40),
    "one-head": (4, (5, 100, 9, 9), 32, 16),
}
TOKENS = torch.tensor([1, 650, 90])  # of the rows: one has nothing before the new token, and rings wrap in others


class Rings:
    """Rings filled with random keys of each row, and the keys that they should hold."""

    def __init__(self, case, dtype, device, tokens=TOKENS, least=None):
        group, counts, D, DV = CASES[case]
        random = torch.Generator().manual_seed(0)
        self.group, self.counts, self.tokens = group, torch.tensor(counts, dtype=torch.int32), tokens
        G, B, length = len(counts) // group, len(tokens), int(tokens.max())
        draw = lambda *shape: torch.randn(shape, generator=random)  # noqa: E731
        self.query, self.key, self.value = draw(B, len(counts), D), draw(B, G, D), draw(B, G, DV)
        self.all_keys, self.all_values = draw(B, G, length, D), draw(B, G, length, DV)
        rings, begin = [], 5  # the first five belong to nothing
        for g in range(G):
            count = max(counts[g * group : (g + 1) * group])
            slots = count + g % 3
            rings.append([begin, slots, slots, count])
            begin += B * slots
        self.rings = rings
        self.keys, self.values = torch.full((begin, D), float("nan")), torch.full((begin, DV), float("nan"))
        for b in range(B):
            new = int(tokens[b]) - 1
            self.all_keys[b, :, new], self.all_values[b, :, new] = self.key[b], self.value[b]
            for g, (first, apart, slots, _) in enumerate(rings):
                for place in range(max(0, new - slots), new):
                    at = first + b * apart + place % slots
                    self.keys[at], self.values[at] = self.all_keys[b, g, place], self.all_values[b, g, place]
        self.before = self.keys.clone()
        # One share is above 1, which counts as 1, and one below 0.
        self.shares = (self.counts - RAMP) / SIZE
        self.shares[0], self.shares[-1] = 1.7, -0.4
        names = ("query", "key", "value", "all_keys", "all_values", "keys", "values", "shares", "tokens", "counts")
        for name in names:
            part = getattr(self, name)
            setattr(self, name, part.to(device, dtype if name not in ("shares", "tokens", "counts") else part.dtype))

    def call(self, ramped):
        device = self.query.device
        items, merges = op.plan(self.rings, len(self.tokens), device)
        return op.ring_attention(
            self.query, self.key, self.value, self.keys, self.values, self.tokens,
            torch.tensor(self.rings, device=device), self.counts, self.shares if ramped else None, items, merges,
            SIZE, RAMP, SCALE,
        )  # fmt: skip

    def oracle(self, ramped):
        """Attention in float64, one row and head after the other, by the formula."""
        B, H, _ = self.query.shape
        out = torch.zeros(B, H, self.value.shape[2], dtype=torch.float64)
        query, keys, values = (part.double().cpu() for part in (self.query, self.all_keys, self.all_values))
        for b in range(B):
            new = int(self.tokens[b]) - 1
            for h in range(H):
                g = h // self.group
                away = new - torch.arange(new + 1, dtype=torch.float64)
                z = min(max(float(self.shares[h]), 0.0), 1.0)
                weight = ((z * SIZE + RAMP - away) / RAMP).clamp(0, 1) if ramped else torch.ones(new + 1)
                weight = weight * (away < int(self.counts[h]))
                weight = weight * (keys[b, g, : new + 1] @ query[b, h] * SCALE).exp()
                out[b, h] = weight @ values[b, g, : new + 1] / weight.sum()
        return out


@pytest.mark.parametrize("ramped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_specification(case, ramped):
    rings = Rings(case, torch.float64, "cpu")
    parts = (rings.query, rings.key, rings.value, rings.keys, rings.values, rings.tokens, torch.tensor(rings.rings))
    found = naive.ring_attention(*parts, rings.counts, rings.shares if ramped else None, SIZE, RAMP, SCALE)
    assert relative(found, rings.oracle(ramped)) < 1e-6  # shares are float32


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ramped", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel(case, ramped, dtype, device):
    if dtype != torch.float32 and case not in ("short-and-long", "grouped"):
        pytest.skip("one type is enough for the other shapes")
    rings = Rings(case, dtype, device)
    found = rings.call(ramped)
    assert found.dtype == dtype
    # The weights are rounded to the type of the values before their product, as in other flash kernels.
    bound = 4e-6 if dtype == torch.float32 else 2 * BOUND[dtype]
    assert relative(found.cpu(), rings.oracle(ramped)) < bound


@pytest.mark.parametrize("device", EVERYWHERE)
def test_the_new_token_is_written_and_nothing_else(device):
    rings = Rings("grouped", torch.float32, device)
    rings.call(True)
    expected, values = rings.before.to(device), rings.values.clone()
    for b, tokens in enumerate(TOKENS.tolist()):
        for g, (first, apart, slots, _) in enumerate(rings.rings):
            at = first + b * apart + (tokens - 1) % slots
            expected[at], values[at] = rings.key[b, g], rings.value[b, g]
    torch.testing.assert_close(rings.keys, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rings.values, values, rtol=0, atol=0, equal_nan=True)


@on_triton
def test_a_ring_in_many_pieces_is_that_in_one(device, monkeypatch):
    whole = Rings("grouped", torch.float32, device).call(True)
    monkeypatch.setattr(launch, "LEAST", 16)
    monkeypatch.setattr(launch, "RESIDENT", 1000)
    rings = Rings("grouped", torch.float32, device)
    items, merges = op.plan(rings.rings, len(TOKENS), rings.query.device)
    assert len(items) > 20
    assert merges[:, 2].tolist() == [4, 20]  # of the rings of 60 and of 310 keys, of which 59 and 309 are before
    assert relative(rings.call(True), whole) < 1e-6


@on_triton
def test_steps_one_after_the_other(device):
    """Forty tokens through rings of at most 21 slots, from nothing on."""
    counts, D = torch.tensor([6, 21], dtype=torch.int32, device=device), 16
    rings = [[0, 6, 6, 6], [12, 22, 22, 21]]
    keys, values = torch.zeros(2, 56, D, device=device)
    items, merges = op.plan(rings, 2, keys.device)
    table = torch.tensor(rings, device=device)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, D, generator=random).to(device) for _ in range(3))
    shares = torch.tensor([0.001, 0.012], device=device)
    place = torch.arange(40, device=device)
    away = place[:, None] - place
    weight = ((shares[:, None, None] * SIZE + RAMP - away) / RAMP).clamp(0, 1)
    weight = weight * (away < counts[:, None, None]) * (away >= 0)
    expected = ((q @ k.mT * SCALE) + weight.log()).softmax(-1) @ v
    for t in range(40):
        tokens = torch.full((2,), t + 1, device=device)
        found = op.ring_attention(
            q[:, :, t], k[:, :, t], v[:, :, t], keys, values, tokens, table, counts, shares,
            items, merges, SIZE, RAMP, SCALE,
        )  # fmt: skip
        torch.testing.assert_close(found, expected[:, :, t], rtol=0, atol=2e-5)


def test_work_is_divided_among_the_multiprocessors():
    rings = [[0, 64, 64, 64]] * 8 + [[0, 256, 264, 256]] * 3 + [[0, 32768, 32776, 32768]]
    for rows in (1, 8):
        items, merges = launch.items_of(rings, rows, 132)
        assert {len(item) for item in items} == {ITEM.value}
        longest = [-(-(item[7] - 1) // item[2]) for item in items]
        assert longest == sorted(longest, reverse=True)
        assert merges == [[11, 0, merges[0][2], 0]]
        assert [item[3] for item in items if item[0] == 11] == list(range(merges[0][2]))
        assert 132 <= rows * len(items) <= 3 * 132
    assert launch.items_of([[0, 9, 9, 1]], 1, 132) == ([[0, 0, 1, -1, 0, 9, 9, 1]], [])


def test_what_the_kernels_do_not_take_is_said():
    def asked(heads, groups, width, dtype=torch.float32, slots=100):
        like = torch.empty(1, heads, 1, width, dtype=dtype)
        return op.unsupported(like, like[:, :groups], like[:, :groups], slots)

    assert asked(4, 2, 64) is None
    assert "float64" in asked(4, 2, 64, torch.float64)
    assert "heads of 512" in asked(4, 2, 512)
    assert "do not share" in asked(4, 3, 64)
    assert "65 query heads" in asked(65, 1, 64)
    assert "rings of" in asked(4, 2, 128, slots=2**25)


def test_it_is_part_of_a_compiled_graph():
    """The operator says what it changes, so that later steps of the graph see the new key."""
    rings = Rings("grouped", torch.float32, "cpu")
    items, merges = torch.zeros(0, 8, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)
    table = torch.tensor(rings.rings)

    def step(tokens):
        given = (rings.query, rings.key, rings.value, rings.keys, rings.values, tokens, table, rings.counts, None)
        return op.ring_attention(*given, items, merges, SIZE, RAMP, SCALE), rings.keys[5:].nan_to_num().sum()

    expected = step(rings.tokens)
    rings.keys.copy_(rings.before)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(rings.tokens)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_launches_on_a_device():
    with launches_on(launch) as found:
        group, counts, D, DV = 2, (64, 64, 20000, 20000), 64, 64
        new = [torch.empty(2, heads, D, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2)]
        rings = [torch.empty(50000, D, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        tokens = torch.empty(2, dtype=torch.int64, device="cuda")
        of_heads = torch.empty(4, dtype=torch.int32, device="cuda")
        items, merges = (torch.empty(shape, dtype=torch.int64, device="cuda") for shape in ((41, 8), (1, 4)))
        launch.ring_attention(*new, *rings, tokens, of_heads, None, items, merges, 1, 1, 0.1)
    assert [each["name"] for each in found] == ["_ring_kernel", "_merge_kernel"]
    assert all(each["constants"]["EARLY"] for each in found)
    assert found[0]["constants"]["BLOCK_N"] == 128
    assert (group, len(counts), DV) == (2, 4, 64)
