"""Tables of tuned tiles: precedence, damage, and interrupted writes."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from hf_optim_kernels.common import choice, tuning

CARD = torch.device("cuda", 0)
DEFAULT = {"BLOCK": 16, "num_warps": 4}


@pytest.fixture
def card(tmp_path, monkeypatch):
    """A card of capability 9.0 with a shipped table and an empty cache."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    entry = {"op 8x8x1 bfloat16": {"BLOCK": 32, "num_warps": 8}, "op 8x8x2 bfloat16": {"OLD_NAME": 1}}
    (shipped / "sm_90.json").write_text(json.dumps(entry))
    monkeypatch.setattr(tuning, "SHIPPED", shipped)
    monkeypatch.setenv("HF_OPTIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Card 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4))
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    tuning.table.cache_clear()
    yield tmp_path
    tuning.table.cache_clear()


def choose(rows, **options):
    return tuning.choose("op", (8, 8), rows, torch.bfloat16, CARD, lambda rows: DEFAULT, **options)


@pytest.mark.parametrize(("rows", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (4096, 4096)])
def test_buckets_are_powers_of_two(rows, bucket):
    assert tuning.bucket(rows) == bucket


def test_the_shipped_table_then_the_users_then_the_default(card):
    assert choose(1) == {"BLOCK": 32, "num_warps": 8}
    assert choose(4) == DEFAULT
    path = tuning.remember("op", (8, 8, 1), torch.bfloat16, {"BLOCK": 64, "num_warps": 2}, CARD)
    assert choose(1) == {"BLOCK": 64, "num_warps": 2}
    assert torch.__version__.split("+")[0] in path.name
    assert "Some_Card_80GB" in path.name


def test_an_entry_of_an_older_kernel_is_passed_over(card):
    assert choose(2) == DEFAULT


def test_rows_are_rounded_to_a_sixteenth_of_their_bucket():
    assert [tuning.rounded(rows) for rows in (1, 3, 64, 65, 129, 1000, 1025, 4000)] == [
        1, 4, 64, 128, 192, 1024, 1152, 4096,
    ]  # fmt: skip


@pytest.fixture
def predicted(monkeypatch):
    """Two kinds of "op": the second is faster, on 4 to 64 rows."""
    kind = choice.Kind(
        {"BLOCK": 128, "num_warps": 8}, (128, 256), None, (1, 64), (1, 99), (1,), 4096, 1, 1.0, (9.0, 0, 0, 0, 0, 0)
    )
    fast = choice.Kind(
        {"BLOCK": 256, "num_warps": 8}, (128, 256), None, (4, 64), (1, 99), (1,), 4096, 1, 1.0, (2.0, 0, 0, 0, 0, 0)
    )
    monkeypatch.setattr(choice, "kinds", lambda: {"op": (kind, fast)})


def test_a_shape_without_an_entry_takes_what_is_predicted(card, predicted):
    assert choose(1)["BLOCK"] == 32  # the table's
    assert choose(2)["BLOCK"] == 128
    assert choose(16)["BLOCK"] == 256
    assert choose(128) == DEFAULT  # measured on up to 64 rows


def test_entries_may_have_the_names_of_another_number_of_rows(card):
    few = {"BLOCK": 16, "num_warps": 4, "SPLIT": 2}
    guess = lambda rows: few if rows < 64 else DEFAULT  # noqa: E731
    assert tuning.choose("op", (8, 8), 1, torch.bfloat16, CARD, guess)["BLOCK"] == 32
    assert tuning.choose("op", (8, 8), 2, torch.bfloat16, CARD, guess) == few


def test_what_cannot_run_is_not_chosen(card, predicted):
    assert choose(16, usable=lambda config: config["BLOCK"] != 256, variant=1)["BLOCK"] == 128
    assert choose(1, usable=lambda config: config["BLOCK"] != 32, variant=1)["BLOCK"] == 128
    assert choose(16)["BLOCK"] == 256  # each variant has its own choice


def test_a_cpu_has_no_table():
    assert tuning.table(torch.device("cpu")) == {}


@pytest.mark.parametrize("damage", ["{", "[1]", '{"op 8x8x1 bfloat16": 3}'])
def test_a_damaged_cache_is_said_and_passed_over(card, damage):
    path = tuning.cache_file(CARD)
    path.parent.mkdir(parents=True)
    path.write_text(damage)
    with pytest.warns(UserWarning, match="is ignored"):
        assert choose(1) == {"BLOCK": 32, "num_warps": 8}


def test_an_interrupted_write_leaves_the_old_cache(card, monkeypatch):
    path = tuning.remember("op", (8, 8, 1), torch.bfloat16, {"BLOCK": 64, "num_warps": 2}, CARD)
    before = path.read_text()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuning.remember("op", (8, 8, 4), torch.bfloat16, {"BLOCK": 8, "num_warps": 2}, CARD)
    assert path.read_text() == before
    assert os.listdir(path.parent) == [path.name]


def test_shipped_tables_are_well_formed():
    for path in tuning.SHIPPED.glob("sm_*.json"):
        entries = json.loads(path.read_text())
        assert entries
        for key, config in entries.items():
            name, shape, dtype = key.split()
            assert len(shape.split("x")) in (3, 4), key  # with the width of the values in one operator
            assert hasattr(torch, dtype), key
            assert all(isinstance(value, (int, str)) for value in config.values()), (name, config)
