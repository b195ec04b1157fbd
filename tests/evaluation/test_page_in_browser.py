"""The page of results in headless Chromium: filters, sorting, plots, keyboard, print, and what it looks like narrow."""

from __future__ import annotations

import json
import re

import pytest
from headless import Browser, find_browser
from PIL import Image
from result_cards import RECIPES, write_results
from test_hostile_records import HOSTILE, record_with

from hf_optim.evaluation.cards.page import render_page
from hf_optim.evaluation.cards.page_plot import METRICS
from hf_optim.evaluation.cards.summary import read_cards

NAMES = "Array.from(document.querySelectorAll('#table tbody tr:not([hidden]) th'), cell => cell.textContent)"
SHOWN = "document.querySelector('#shown').textContent"


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium, or CHROMIUM=its path)")
    made = Browser(program)
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_results(tmp_path_factory.mktemp("results"))
    path = folder / "index.html"
    path.write_text(render_page(read_cards(folder)), encoding="utf-8")
    return path


def place_of(browser, selector):
    """The middle of an element in the window, which is scrolled to it."""
    return browser.eval(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
        "e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect(); "
        "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )


def click(browser, selector):
    browser.click(*place_of(browser, selector))


@pytest.mark.parametrize("width", [360, 390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_its_window_asks_for_nothing_and_reports_no_error(browser, page, width, dark, tmp_path):
    browser.open(page, width, 900, dark)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.eval("document.documentElement.scrollWidth") == width
    assert browser.eval(NAMES) == sorted(RECIPES)
    assert browser.eval(SHOWN) == "6 of 6 cards"
    with Image.open(browser.screenshot(tmp_path / "page.png", whole=False)) as image:
        red, green, blue = image.convert("RGB").getpixel((2, 2))
        assert image.width == width
    assert max(red, green, blue) < 60 if dark else min(red, green, blue) > 240


def test_the_theme_is_switched_by_its_button(browser, page):
    browser.open(page)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser.eval(paper)
    assert browser.eval("document.querySelector('#theme').textContent") == "Dark theme"
    click(browser, "#theme")
    assert browser.eval("document.querySelector('#theme').textContent") == "Light theme"
    assert browser.eval(paper) != light
    click(browser, "#theme")
    assert browser.eval(paper) == light


def test_filters_show_the_cards_that_match_all_of_them_and_say_how_many(browser, page):
    browser.open(page)
    click(browser, "[name=family][value='0']")  # quantization
    assert browser.eval(NAMES) == ["alpha-w4", "alpha-w8", "beta-w8"]
    assert browser.eval(SHOWN) == "3 of 6 cards"
    click(browser, "[name=family][value='3']")  # or distillation
    assert browser.eval(NAMES) == ["alpha-2of4-kd", "alpha-w4", "alpha-w8", "beta-w8"]
    browser.eval(
        "(() => { const s = document.querySelector('[name=base]'); s.value = '0'; "
        "s.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    assert browser.eval(NAMES) == ["alpha-2of4-kd", "alpha-w4", "alpha-w8"]
    # A plot without a card that matches is hidden, other points are faded, and so are the cards below.
    assert browser.eval("Array.from(document.querySelectorAll('.plot'), p => p.hidden)") == [False, True]
    assert browser.eval("Array.from(document.querySelectorAll('.point.off'), p => p.dataset.card)") == ["2", "5"]
    assert browser.eval("document.querySelectorAll('details:not([hidden])').length") == 3
    browser.eval("document.querySelector('[name=words]').focus()")
    browser.call("Input.insertText", text="GPTQ 4-bit")
    assert browser.eval(NAMES) == ["alpha-w4"]
    assert browser.eval(SHOWN) == "1 of 6 cards"
    browser.call("Input.insertText", text=" nothing")
    assert browser.eval(SHOWN) == "No card matches: clear a filter"
    click(browser, "[type=reset]")
    browser.eval("new Promise(done => setTimeout(done, 20))")
    assert browser.eval(NAMES) == sorted(RECIPES)
    assert browser.eval("document.querySelectorAll('.off').length") == 0


def test_a_click_on_a_head_sorts_by_its_column_and_missing_figures_are_last(browser, page):
    browser.open(page)
    result = "#table thead tr:last-child th:nth-child(2)"  # perplexity of the result
    assert browser.eval("document.querySelector('#table thead th').getAttribute('aria-sort')") == "ascending"
    click(browser, f"{result} button")
    assert browser.eval(NAMES) == [
        "alpha-w8",
        "alpha-w4",
        "alpha-2of4-kd",
        "alpha-pruned",
        "beta-w8",
        "gamma-unmeasured",
    ]
    assert browser.eval(SHOWN) == "6 of 6 cards, sorted by perplexity: result, ascending"
    assert browser.eval("document.querySelectorAll('[aria-sort]').length") == 1
    click(browser, f"{result} button")
    assert browser.eval(f"document.querySelector('{result}').getAttribute('aria-sort')") == "descending"
    assert browser.eval(NAMES) == [
        "beta-w8",
        "alpha-pruned",
        "alpha-2of4-kd",
        "alpha-w4",
        "alpha-w8",
        "gamma-unmeasured",
    ]
    # By text, from the keyboard.
    browser.eval("document.querySelectorAll('#table thead [data-sort] button')[3].focus()")  # recipe
    browser.press("Enter")
    assert browser.eval(NAMES)[0] == "alpha-w4"
    assert browser.eval(NAMES)[-1] == "beta-w8"
    # Each head sorts by the cells below it.
    count = browser.eval("document.querySelectorAll('#table thead [data-sort]').length")
    assert count == browser.eval("document.querySelector('#table tbody tr').cells.length")
    for index in range(count):
        browser.eval(f"document.querySelectorAll('#table thead [data-sort] button')[{index}].click()")
        found = browser.eval(
            f"(() => {{ const head = document.querySelectorAll('#table thead [data-sort]')[{index}]; "
            "const x = head.getBoundingClientRect(); "
            "const cells = Array.from(document.querySelector('#table tbody tr').cells); "
            "const at = cells.findIndex(c => Math.abs(c.getBoundingClientRect().x - x.x) < 1); "
            "return Array.from(document.querySelectorAll('#table tbody tr'), r => r.cells[at].dataset.v "
            "?? (r.cells[at].classList.contains('missing') ? '' : r.cells[at].textContent)); })()"
        )
        shown = [value for value in found if value]
        assert found[: len(shown)] == shown  # missing ones are last
        key = float if all(re.fullmatch(r"-?[\d.e-]+", value) for value in shown) else None
        assert shown in (sorted(shown, key=key), sorted(shown, key=key)[::-1])


def test_points_tell_their_figures_on_hover_and_on_focus_and_lead_to_the_cards(browser, page):
    browser.open(page)
    tip = "document.querySelector('#tip').hidden ? '' : document.querySelector('#tip').innerText"
    browser.move(*place_of(browser, ".point[data-card='3'] path"))
    assert browser.eval(tip).splitlines()[:3] == ["3. alpha-w4", "gptq 4-bit g32", "perplexity 2.2661, 779 kB"]
    assert browser.eval("document.querySelector('#table tr.lit th').textContent") == "alpha-w4"
    browser.move(2, 2)
    assert browser.eval(tip) == ""
    # One stop of the Tab key for a plot; arrows move by place.
    stops = "Array.from(document.querySelectorAll('.plot'), p => p.querySelectorAll('.point[tabindex=\"0\"]').length)"
    assert browser.eval(stops) == [1, 1]
    browser.eval("document.querySelector('.point[tabindex=\"0\"]').focus()")
    browser.press("Home")
    assert browser.eval(tip).splitlines()[0] == "3. alpha-w4"
    browser.press("ArrowRight")
    assert browser.eval(tip).splitlines()[0] == "4. alpha-w8"
    assert browser.eval(stops) == [1, 1]
    browser.press("Escape")
    assert browser.eval(tip) == ""
    browser.press("Enter")
    assert browser.eval("location.hash") == "#card-alpha-w8"
    browser.eval("new Promise(done => setTimeout(done, 50))")
    assert browser.eval("document.querySelector('#card-alpha-w8').open")
    assert browser.eval("document.activeElement.parentNode.id") == "card-alpha-w8"
    # From the table, and a second time.
    for _ in range(2):
        click(browser, "#table tbody tr:nth-child(1) a")
        browser.eval("new Promise(done => setTimeout(done, 50))")
        assert browser.eval("document.querySelector('#card-alpha-2of4-kd').open")
        browser.eval("document.querySelector('#card-alpha-2of4-kd').open = false")
    assert browser.complaints() == []


def test_names_and_roles_for_a_screen_reader(browser, page):
    browser.open(page)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")]
    for wanted in (
        ("main", ""),
        ("search", "Filter the cards"),
        ("checkbox", "quantization 3"),
        ("combobox", "Base model"),
        ("searchbox", "Search"),
        ("status", ""),
        ("button", "perplexity: result"),
        ("rowheader", "alpha-w4"),
        ("columnheader", "recipe"),
        ("region", "All figures"),
    ):
        assert wanted in told, wanted
    points = [name for role, name in told if role == "link" and "perplexity 2.2661" in name]
    assert points == [
        "3. alpha-w4, gptq 4-bit g32, perplexity 2.2661, 779 kB, +1.8 % perplexity, 4.98 times smaller, "
        f"top-1 agreement {METRICS['top1_agreement'].format(0.9411)}, KL 0.01713"
    ]


def test_colours_have_enough_contrast(browser, page):
    for dark in (False, True):
        browser.open(page, dark=dark)
        ratios = browser.eval(
            """(() => {
              const light = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
              const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
              const probe = document.body.appendChild(document.createElement('i'));
              const colour = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
              const found = {};
              for (const name of ['ink', 'muted', 'link', 'warning', ...[0,1,2,3,4,5,6,7].map(i => `family-${i}`)])
                found[name] = Math.min(ratio(colour(name), colour('paper')), ratio(colour(name), colour('raised')));
              probe.remove();
              return found;
            })()"""
        )
        assert len(ratios) == 12
        assert {name: r for name, r in ratios.items() if r < (3 if name.startswith("family") else 4.5)} == {}


def test_print_shows_every_card_in_light_colours_and_no_controls(browser, page, tmp_path):
    browser.open(page, dark=True)
    click(browser, "[name=family][value='3']")
    click(browser, "#theme")
    browser.media(dark=True, medium="print")
    shown = "Array.from(document.querySelectorAll({}), e => getComputedStyle(e).display)"
    assert browser.eval(shown.format("'#table tbody tr'")) == ["table-row"] * len(RECIPES)
    assert set(browser.eval(shown.format("'#controls, #theme, #shown, details'"))) == {"none"}
    assert set(browser.eval(shown.format("'.plot'"))) == {"block"}
    assert browser.eval("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.pdf(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_without_scripts_the_table_is_complete_and_controls_are_hidden(browser, page):
    browser.open(page, scripts=False)
    text = browser.call("Accessibility.getFullAXTree")["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in text if not node.get("ignored")]
    assert [name for role, name in told if role == "rowheader" and name in RECIPES] == sorted(RECIPES)
    assert not [name for role, name in told if role in ("button", "checkbox", "searchbox")]
    assert any(role == "link" and "alpha-w4" in name and "2.2661" in name for role, name in told)


def test_markup_of_a_stranger_has_no_effect(browser, tmp_path):
    for number, text in enumerate(HOSTILE):
        (tmp_path / f"{number} <b>\" & '").mkdir()
        record_with(text).write(tmp_path / f"{number} <b>\" & '")
    path = tmp_path / "index.html"
    path.write_text(render_page(read_cards(tmp_path)), encoding="utf-8")
    browser.open(path)
    browser.eval("document.querySelectorAll('details').forEach(card => card.open = true)")
    browser.eval("document.querySelectorAll('.point').forEach(point => point.focus())")
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.eval("document.querySelectorAll('img, iframe, #table b, script[src]').length") == 0
    assert browser.eval("document.documentElement.scrollWidth") == 1280
    assert browser.eval(SHOWN) == f"{len(HOSTILE)} of {len(HOSTILE)} cards"
