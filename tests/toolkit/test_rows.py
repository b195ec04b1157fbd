"""Documents of a batch in rows of their own."""

from __future__ import annotations

import torch

from hf_optim.toolkit.attention import Apart, Rows


def test_padding_alone_is_moved_like_documents_and_comes_back_as_zeros():
    segments = torch.full((2, 3), -1, dtype=torch.int32)
    apart = Apart.of(Rows.of(segments))
    part = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    taken = apart.take(part)
    assert taken.shape[1::2] == (4, 5)
    assert len(apart.lengths()) == len(apart.segments()) == len(taken)
    assert torch.equal(apart.put(taken, 2), torch.zeros_like(part))
