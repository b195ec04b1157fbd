"""The published cards and their index are what the records give today: ``examples/make_model_cards.py --render``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from hf_optim.evaluation.cards import plots
from hf_optim.evaluation.cards.card import Card
from hf_optim.evaluation.cards.index import PAGES, render_index
from hf_optim.runs.record import FILE_NAME, Record

CARDS = ROOT / "model_cards"
NAMES = sorted(path.parent.name for path in CARDS.glob(f"*/{FILE_NAME}"))
HINT = "python examples/make_model_cards.py --render"


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are planned and not drawn: that they are the committed ones would take a minute."""

    def plot(*args, **kwargs) -> Path:
        path = next(value for value in args if isinstance(value, Path))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    for name in ("plot_layers", "plot_quality_against_bytes", "plot_pareto"):
        monkeypatch.setattr(plots, name, plot)


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.png"))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", NAMES)
def test_a_published_card_is_what_its_record_gives(name, tmp_path):
    shutil.copyfile(CARDS / name / FILE_NAME, tmp_path / FILE_NAME)
    text = Card(Record.read(tmp_path), tmp_path).write().read_text(encoding="utf-8")
    assert text == (CARDS / name / "README.md").read_text(encoding="utf-8"), HINT
    assert pictures(tmp_path / "plots") == pictures(CARDS / name / "plots"), HINT


@pytest.mark.usefixtures("undrawn")
def test_the_published_index_and_page_are_what_the_records_give(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        shutil.copyfile(CARDS / name / FILE_NAME, tmp_path / name / FILE_NAME)
    shutil.copyfile(CARDS / PAGES, tmp_path / PAGES)
    render_index(tmp_path)
    for page in ("README.md", "index.html"):
        assert (tmp_path / page).read_text(encoding="utf-8") == (CARDS / page).read_text(encoding="utf-8"), HINT
    assert pictures(tmp_path) == pictures(CARDS), HINT


def test_links_of_the_published_page_lead_to_files():
    text = (CARDS / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#:]+)"', text)
    assert len(links) == 2 * len(NAMES)
    assert [link for link in links if not (CARDS / link).is_file()] == []
