"""Phrases that an engineer reads twice stay out of the sources and the documents (CONTRIBUTING.md)."""

from __future__ import annotations

import re

from conftest import ROOT

PHRASES = re.compile(
    r"""
      (?<!there\ )\b(is|are)\ no\b(?!\ (longer|slower|faster|larger|smaller)\b)  # "is not a", "does not", "has no"
    | \bbit\ (by|for)\ bit\b      # bit-exact, bitwise identical
    | \bin\ work\b                # current
    | \b(anew|amid|whoever)\b
    | \bto\ be\ had\b
    | \bas\ ever\b
    | \bwhat\ it\ was\ told\b
    | \"\"\"Whether\b             # a docstring starts with a verb: "Return True if ..."
    | \bowes\ a\b                # must be followed by
    | \b(before|after)\ it\ ended\b
    | \bfound\ nothing\ to\ work\ on\b   # has no layer to change
    | \bthese\ layers\ stay\ as\b         # run on dense kernels; are not quantized
    | \bweight\ is\ shared\ with\b        # tied to
    | \bwhat\ (it|they)\ buys?\b | \bbuy\ nothing\b   # save memory or time
    | \bfaster\ by\ as\ much\b
    """,
    re.VERBOSE | re.IGNORECASE,
)
WRITTEN = ROOT / "docs" / "architectures.md"  # by `make sweep`, with the messages of its day


def sources():
    for folder, pattern in (
        ("hf_optim", "*.py"),
        ("plugins", "*.py"),
        ("kernels", "*.py"),
        ("examples", "*.py"),
        ("docs", "*.md"),
        ("hf_optim/recipes/shipped", "*.yaml"),
    ):
        yield from sorted(set((ROOT / folder).rglob(pattern)) - {WRITTEN})
    yield ROOT / "README.md"


def test_no_phrase_is_left():
    found = []
    for path in sources():
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, 1)
            if PHRASES.search(line)
        ]
    assert not found, "\n".join(found)


def test_the_pattern_finds_them():
    for line in (
        "`X` is no linear layer",
        "the weight it had before, bit by bit",
        "The stage in work, or None",
        '    """Whether the scope holds it."""',
        "the file is not to be had",
        "step 1 (smoothquant) owes a later step",
        "gptq before it ended that",
        "rtn found nothing to work on in GPT2LMHeadModel",
        "these layers stay as they are",
        "its weight is shared with lm_head",
        "## What it buys",
        "zeros in a dense checkpoint buy nothing",
        "smaller, and faster by as much",
    ):
        assert PHRASES.search(line), line
    for line in (
        "there is no mask",
        "a notable",
        "is not a linear layer",
        "is no longer packed",
        "This is normal",
        "owes: traits",
    ):
        assert not PHRASES.search(line), line
