"""Work items of block-sparse attention: every block of every head once, in pieces, the longest first."""

from __future__ import annotations

import pytest
import torch
from block_layouts import layout_of

pytest.importorskip("triton")

from hf_optim_kernels.sparse_attention import items, tiles


def random_layout(L=1, n=160, heads=(0, 0), share=0.3, **options):
    random = torch.Generator().manual_seed(L)
    seen = torch.rand(L, n, n, generator=random) < 0.5
    kept = torch.rand(L, n // 32, n // 32, generator=random) < share
    kept[:, 2] = True
    seen |= torch.rand(L, n, n, generator=random) < 2 * torch.eye(n)[None]
    spread = kept.repeat_interleave(32, 1).repeat_interleave(32, 2)
    seen[:, 64:96, :64] = True
    return layout_of(seen & spread, 32, list(heads), **options)


def listed(table, others, masks):
    """(block, other block, mask, head) of every entry of the items of a table."""
    found = []
    for block, first, _, end, _, low, high, _ in table.tolist():
        for entry in range(first, end):
            found += [(block, int(others[entry]), int(masks[entry]), head) for head in range(low, high)]
    return found


@pytest.mark.parametrize("split", [1, 3, 100])
@pytest.mark.parametrize("heads", [(0, 0, 0, 0), (0, 1, 1, 2)], ids=str)
def test_every_entry_is_computed_once(heads, split):
    layout = random_layout(max(heads) + 1, heads=heads)
    made = items.make(layout, 4, 2, 160, 160, split)
    bounds = layout.starts.tolist()
    lists = {
        kind: [
            (q, int(layout.columns[e]), int(layout.masks[e]))
            for q in range(5)
            for e in range(bounds[kind][q], bounds[kind][q + 1])
        ]
        for kind in range(max(heads) + 1)
    }
    for kind, table in enumerate(made.q_items):
        assert sorted(listed(table, made.columns, made.masks)) == sorted((*each, 0) for each in lists[kind])
    for g in range(2):
        found = listed(made.k_items[made.k_tables[g]], made.rows, made.key_masks)
        assert sorted(found) == sorted((k, q, m, r) for r in range(2) for q, k, m in lists[heads[2 * g + r]])
    for tables in (made.q_items, made.k_items):
        lengths = (tables[..., 3] - tables[..., 1]) * (tables[..., 6] - tables[..., 5])
        assert (lengths.diff() <= 0).all()
        assert lengths.max() <= max(split, 1)


def test_whole_blocks_come_first_and_the_ragged_one_last():
    layout = layout_of(torch.ones(1, 96, 96, dtype=torch.bool))
    made = items.make(layout, 1, 1, 96, 90, 100)
    first, middle, end = made.q_items[0, :, 1:4].unbind(1)
    assert (middle - first).tolist() == [2, 2, 2]
    assert (end - middle).tolist() == [1, 1, 1]
    assert made.columns[middle.long()].tolist() == [2, 2, 2]  # the block of keys with empty places
    assert torch.equal(made.k_items[0, :, 2], made.k_items[0, :, 3])  # no block of queries has any


@pytest.mark.parametrize("split", [1, 2])
def test_slots_of_pieces_are_merged_once(split):
    layout = random_layout(2, heads=(0, 1))
    made = items.make(layout, 2, 1, 160, 160, split)
    for tables, merges, slots in (
        (made.q_items, made.q_merges, made.q_slots),
        (made.k_items, made.k_merges, made.k_slots),
    ):
        for table, merge in zip(tables, merges, strict=True):
            pieces = {}
            for block, *_, slot, _, _, _ in table.tolist():
                pieces.setdefault(block, []).append(slot)
            taken = []
            for block, low, high, _ in merge.tolist():
                if block >= 0:
                    assert sorted(pieces.pop(block)) == list(range(low, high))
                    taken += range(low, high)
            assert taken == list(range(len(taken)))
            assert len(taken) <= slots
            assert set(pieces.pop(-1, [-2])) == {-2}
            assert all(each == [-1] for each in pieces.values())


def test_blocks_without_entries_have_an_item():
    layout = layout_of(torch.zeros(1, 64, 96, dtype=torch.bool))
    made = items.make(layout, 1, 1, 64, 96, 4)
    assert made.q_items[0, :, 0].tolist() == [0, 1]
    assert made.k_items[0, :, 0].tolist() == [0, 1, 2]
    assert made.key_bits.shape == (1, 32, 1)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_masks_are_transposed(block):
    seen = torch.rand(1, block, 2 * block, generator=torch.Generator().manual_seed(0)) < 0.5
    layout = layout_of(seen, block)
    shifts = torch.arange(32)
    for one, other in zip(layout.bits, items.transposed(layout.bits), strict=True):
        first, second = (((each.long()[..., None] >> shifts) & 1).flatten(1) for each in (one, other))
        assert torch.equal(first.T, second)


def test_items_are_made_once(monkeypatch):
    layout = random_layout()
    calls = []
    make = items.make
    monkeypatch.setattr(items, "make", lambda *args: calls.append(args) or make(*args))
    first = items.plan(layout, 1, 2, 1, 160, 160)
    assert items.plan(layout, 1, 2, 1, 160, 160) is first
    assert items.plan(layout, 2, 2, 1, 160, 160) is first  # pieces are as long
    assert items.plan(layout, 1, 2, 2, 160, 160) is not first
    assert len(calls) == 2


def test_tokens_without_a_place_are_known():
    order = torch.full((1, 64), -1, dtype=torch.int32)
    order[0, 10:50] = torch.arange(40).flip(0)
    layout = layout_of(torch.ones(1, 64, 64, dtype=torch.bool), heads=[0], order_q=order, order_k=order)
    assert items.make(layout, 1, 1, 40, 40, 4)[-2:] == (1, 1)
    assert items.make(layout, 1, 1, 41, 40, 4)[-2:] == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 48}, "48"),
        ({"heads": [0, 1]}, "heads"),
        ({"columns": [0, 1, 2, 3, 9]}, "columns"),
        ({"masks": [7] * 5}, "masks"),
        ({"rows": [0, 1, 2, 3, 3]}, "not the same"),
        ({"columns": [0, 0, 2, 3, 4], "rows": [0, 0, 2, 3, 4]}, "same|twice"),
        ({"order_q": [[0] * 160]}, "two places"),
        ({"order_k": [[160] * 160]}, "outside"),
        ({"order_k": [[-1] * 128]}, "order_k must be"),
    ],
    ids=str,
)
def test_layouts_that_do_not_fit(change, message):
    layout = layout_of(torch.eye(160, dtype=torch.bool)[None], heads=[0, 0])
    for name, value in change.items():
        setattr(layout, name, value if name == "block" else torch.tensor(value, dtype=torch.int32))
    with pytest.raises(ValueError, match=message):
        items.make(layout, 2, 1, 160, 160, 4)


def test_tensors_of_a_layout_are_contiguous_int32():
    layout = layout_of(torch.eye(160, dtype=torch.bool)[None])
    layout.columns = layout.columns.long()
    with pytest.raises(ValueError, match="columns of the layout must be contiguous int32"):
        items.make(layout, 1, 1, 160, 160, 4)


def test_other_lengths_need_other_layouts():
    layout = layout_of(torch.eye(160, dtype=torch.bool)[None])
    with pytest.raises(ValueError, match="5 blocks of 32 places do not hold 161 tokens"):
        items.make(layout, 1, 1, 161, 160, 4)


def test_long_lists_are_cut_to_the_share_of_a_program():
    for tokens in (4096, 16384, 131072):
        blocks = tokens // 64
        entries = 8 * blocks + 4 * blocks  # two lists and two columns of all blocks
        piece = tiles.piece(12, entries, blocks, 64, 132)
        assert 16 <= piece <= max(16, 12 * entries / (132 * 3))


def test_lists_of_the_usual_length_are_not_cut():
    assert tiles.piece(12, 32 * 11, 32, 128, 132) >= 11  # a share would be 8
    assert tiles.piece(1, 256 * 256, 256, 64, 132) == 64  # fewer programs than run at once


@pytest.mark.parametrize("direction", [tiles.FORWARD, tiles.QUERIES, tiles.KEYS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_divide_blocks_and_fit(direction, dtype):
    for block in (32, 64, 128):
        for size in (16, 32, 64, 80, 96, 128):
            found = tiles.tiles(direction, block, size, size, dtype, torch.device("cpu"))
            assert block % found.step == 0
            own = 1 if direction == tiles.FORWARD else 2
            rows = own * block + 2 * found.step * found.stages
            assert rows * tiles.padded(size) * dtype.itemsize < 200_000
