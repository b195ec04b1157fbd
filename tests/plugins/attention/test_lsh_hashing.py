"""Hashing by rotations: the formula, and the same buckets whatever else is computed beside a vector."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.attention.lsh_hashing import WIDEST, draw_rotations, hash_vectors


def vectors(count, width=8, dtype=torch.float32):
    return torch.randn(2, 3, count, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("factors", [(2,), (8,), (4, 6), (2, 2, 4)])
def test_buckets_are_those_of_the_formula(factors):
    x, rounds = vectors(50, dtype=torch.float64), 3
    rotations = draw_rotations(3, 8, rounds, factors, seed=5)
    found = hash_vectors(x, rotations, factors)
    for r in range(rounds):
        expected, begin, step = 0, 0, 1
        for factor in factors:
            turned = x @ rotations[:, :, r, begin : begin + factor // 2].double()
            expected = expected + torch.cat([turned, -turned], -1).argmax(-1) * step
            begin, step = begin + factor // 2, step * factor
        assert torch.equal(found[:, :, r], expected)
    assert found.max() < step
    assert found.unique().numel() > step // 2


def test_rotations_are_gaussian_and_those_of_their_seed():
    drawn = draw_rotations(8, 64, 2, (64,), seed=3)
    assert torch.equal(drawn, draw_rotations(8, 64, 2, (64,), seed=3))
    assert not torch.equal(drawn, draw_rotations(8, 64, 2, (64,), seed=4))
    values = drawn.double() / 2**18
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vector_has_its_bucket_alone_and_in_every_batch(dtype):
    x = vectors(300, 48, dtype)
    rotations = draw_rotations(3, 48, 2, (16,), seed=2)
    found = hash_vectors(x, rotations, (16,))
    alone = torch.stack([hash_vectors(x[:, :, i : i + 1], rotations, (16,))[..., 0] for i in range(300)], -1)
    assert torch.equal(found, alone)
    sums = (x.double() / x.double().abs().amax(-1, keepdim=True) * 2**22).round() @ rotations.flatten(2).double()
    turned = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    others = (x.double() / x.double().abs().amax(-1, keepdim=True) * 2**22).round()[..., turned]
    assert torch.equal(sums, others @ rotations.flatten(2).double()[:, turned])  # exact in any order


def test_lengths_of_vectors_do_not_count_and_zero_has_a_bucket():
    x, rotations = vectors(40), draw_rotations(3, 8, 2, (8,), seed=2)
    assert torch.equal(hash_vectors(x, rotations, (8,)), hash_vectors(1024 * x, rotations, (8,)))
    assert hash_vectors(torch.zeros_like(x), rotations, (8,)).unique().numel() == 1


def test_one_bucket_needs_no_rotation():
    rotations = draw_rotations(3, 8, 2, (1,), seed=2)
    assert rotations.numel() == 0
    assert not hash_vectors(vectors(5), rotations, (1,)).any()


def test_vectors_too_wide_to_be_hashed_exactly_are_refused():
    with pytest.raises(ValueError, match=f"at most {WIDEST}"):
        draw_rotations(1, WIDEST + 1, 1, (2,), seed=0)
