"""docs/hooks.md tells the order of a stage's callbacks: this is that order."""

from __future__ import annotations

import re

from conftest import ROOT
from tiny_models import tiny_llama
from toy_training import ToyRamp, begin

import hf_optim


def test_the_callbacks_come_in_the_documented_order():
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.+?) \| .+ \|$", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == [1, 2, 3, 4, 5]
    model = tiny_llama()
    run = begin(model, ToyRamp(), ToyRamp())
    own = [type(callback).__name__ for hook in run.call("training_callbacks") for callback in hook]
    assert len(own) == 2
    documented = [name.strip("`") for _, name in rows]
    place = documented.index("those of the steps")
    documented[place : place + 1] = own
    assert [type(callback).__name__ for callback in hf_optim.callbacks(model)] == documented
