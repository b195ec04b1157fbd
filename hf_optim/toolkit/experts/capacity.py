"""How many tokens an expert computes: the capacity C k T / E of a group of T tokens, under the published roundings.

    round   C k T / E to the nearest integer, halves to the even one       V-MoE, the formula of the paper
    ceil    rounded up                                                     GShard-like code, DeepSpeed
    floor   rounded down                                                   Mesh TensorFlow
    vmoe    rounded up, then up to a multiple of 4                         V-MoE, the released code
    tutel   k floor(C ceil(T / E))                                         Tutel
    nllb    ceil(C T), a fraction of the tokens                            NLLB-MoE in evaluation

For T = 7, k = 2, E = 8, C = 1 they give 2, 2, 1, 4, 2 and 7. Everything is computed with integers, on the device of the
token counts: a capacity such as 0.1 * 3 * 10 is 3, not a little more, and no rule waits for an accelerator.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", Tensor, int)

ROUNDINGS = ("round", "ceil", "floor", "vmoe", "tutel", "nllb")

LARGEST_DENOMINATOR = 10**6
"""Capacity factors are taken as fractions with denominators up to this one."""


def as_fraction(factor: float) -> Fraction:
    """Return a capacity factor as a fraction: 0.1 is 1/10."""
    return Fraction(factor).limit_denominator(LARGEST_DENOMINATOR)


def is_dropless(rounding: str, factor: float, top_k: int, experts: int) -> bool:
    """Return True if no number of tokens can exceed the capacity: ``C >= E / k``, or ``C >= 1`` under ``nllb``.

    An expert is chosen by each token at most once, so a capacity of T drops nothing. Under ``tutel`` the formula may
    give fewer than T slots at ``C = E / k``; there, too, nothing is dropped from this factor on.
    """
    return as_fraction(factor) * (1 if rounding == "nllb" else Fraction(top_k, experts)) >= 1


def capacity(rounding: str, factor: float, tokens: Number, top_k: int, experts: int) -> Number:
    """Return the slots of each expert for groups of tokens.

    Args:
        rounding: one of ``ROUNDINGS``.
        factor: C, above 0.
        tokens: T of each group, int64 of any shape; or one number, which may be symbolic.
        top_k: experts per token.
        experts: E.

    Returns:
        As ``tokens``; may be 0.
    """
    if is_dropless(rounding, factor, top_k, experts):
        return tokens + 0
    share = as_fraction(factor)
    if rounding == "nllb":
        return _ceil(tokens * share.numerator, share.denominator)
    if rounding == "tutel":
        return top_k * (_ceil(tokens, experts) * share.numerator // share.denominator)
    share *= Fraction(top_k, experts)
    above, below = tokens * share.numerator, share.denominator
    if rounding == "floor":
        return above // below
    if rounding == "ceil":
        return _ceil(above, below)
    if rounding == "vmoe":
        return _ceil(_ceil(above, below), 4) * 4
    if rounding == "round":
        # Halves rounded up are one too many if they are halves and the result is odd; without comparisons, so that
        # a symbolic number needs no guard.
        doubled = 2 * above + below
        whole, is_half = doubled // (2 * below), (2 * below - 1 - doubled % (2 * below)) // (2 * below - 1)
        return whole - is_half * (whole % 2)
    raise ValueError(f"no rounding {rounding!r}")


def _ceil(above: Number, below: int) -> Number:
    return -(-above // below)
