"""Every technique of ``hf-optim list`` is in a published card, or on a page of measurements that has a record."""

from __future__ import annotations

import json
from importlib.metadata import entry_points

import pytest
import yaml
from conftest import ROOT

from hf_optim.recipes.catalogue import GROUP
from hf_optim.recipes.config import OptimConfig
from hf_optim.runs.record import FILE_NAME

CARDS = ROOT / "model_cards"
PAGES = json.loads((CARDS / "pages.json").read_text(encoding="utf-8"))
EXCEPTIONS: dict[str, str] = {}
"""Techniques without a card and without a page, and why."""


def carded() -> dict[str, list[str]]:
    """Return the folders of the cards by the techniques of their recipes."""
    found: dict[str, list[str]] = {}
    for path in sorted(CARDS.glob(f"*/{FILE_NAME}")):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["measured"]["after"], path
        for step in record["recipe"]["steps"]:
            found.setdefault(step["technique"], []).append(path.parent.name)
    return found


BY_TECHNIQUE = carded()
# Without those that other distributions add.
SHIPPED = sorted(e.name for e in entry_points(group=GROUP) if e.value.startswith("hf_optim_plugins."))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_technique_has_a_card_or_a_page(name):
    if name in EXCEPTIONS:
        assert name not in {*BY_TECHNIQUE, *PAGES}, "it is no exception any more"
        return
    folders = BY_TECHNIQUE.get(name, [])
    for folder in folders:
        assert name in (CARDS / folder / "README.md").read_text(encoding="utf-8")
    assert folders or name in PAGES, (
        f"{name} is in no card and on no page: add a recipe to examples/model_cards.yaml and run "
        f"`python examples/make_model_cards.py --only NAME`, or name its page in model_cards/pages.json"
    )


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_names_its_technique_and_has_a_record(name):
    entry = PAGES[name]
    page = CARDS / entry["page"]
    assert name in SHIPPED
    assert len(entry["why"]) > 10
    text = page.read_text(encoding="utf-8")
    assert name in text or entry["title"] in text
    assert json.loads((CARDS / entry["record"]).read_text(encoding="utf-8"))


def test_cards_of_short_conversions_are_those_of_the_list():
    listed = yaml.safe_load((ROOT / "examples" / "model_cards.yaml").read_text(encoding="utf-8"))
    made = 0
    for name, entry in listed["cards"].items():
        settings = listed["defaults"] | entry
        steps = [{"technique": step} if isinstance(step, str) else step for step in settings["steps"]]
        path = CARDS / f"{settings['model']}-{name}" / FILE_NAME
        if not path.exists():
            assert {step["technique"] for step in steps} <= {*BY_TECHNIQUE, *PAGES}, (
                f"make_model_cards.py --only {name}"
            )
            continue
        recipe = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        assert recipe["steps"] == OptimConfig.parse({"steps": steps}).to_dict()["steps"]
        assert recipe.get("training", settings)["max_steps"] == settings["max_steps"]
        made += 1
    assert made
