"""The page of results, as a parser reads it: complete without a script, and intact whoever wrote the records."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from result_cards import FIGURES, RECIPES, result_record, write_results
from test_hostile_records import HOSTILE, record_with

from hf_optim.cli import main
from hf_optim.evaluation.cards import page_plot, plots
from hf_optim.evaluation.cards.page import render_page, static
from hf_optim.evaluation.cards.page_plot import METRICS
from hf_optim.evaluation.cards.points import FAMILIES
from hf_optim.evaluation.cards.summary import read_cards

AGREEMENT = METRICS["top1_agreement"].format
VOID = {"br", "col", "input", "link", "meta", "wbr"}


class Node:
    """An element with its attributes and children, text included."""

    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children = tag, attributes, []

    @property
    def text(self):
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag="", **attributes):
        """Return the elements below with this tag and these attributes; True stands for any value."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                wanted = all(
                    (key in child.attributes) if value is True else value in (child.attributes.get(key) or "").split()
                    for key, value in ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items())
                )
                if wanted and tag in ("", child.tag):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found


class Tree(HTMLParser):
    """A parser that refuses what is not nested, and comments."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(source)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        assert len({key for key, _ in attrs}) == len(attrs), "an attribute twice"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")


def parse(text):
    return Tree(text).root


def rows_of(page):
    (table,) = page.all("table", id="table")
    (body,) = table.all("tbody")
    return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in body.all("tr")]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = write_results(tmp_path_factory.mktemp("results"))
    return folder, render_page(read_cards(folder))


@pytest.fixture
def page(rendered):
    return parse(rendered[1])


def test_the_table_has_the_figures_of_every_card(page):
    rows = {row[1]: row for row in rows_of(page)}
    assert list(rows) == sorted(RECIPES)
    assert rows["alpha-w4"] == [
        "3", "alpha-w4", "alpha", "gptq 4-bit g32", "quantization", "2.2251", "2.2661", "+1.8 %",
        AGREEMENT(0.9411), "0.01713", "3.88 MB", "779 kB", "4.98", "6.43", "stock format",
    ]  # fmt: skip
    assert rows["alpha-2of4-kd"][4] == "sparsitydistillation"
    assert rows["gamma-unmeasured"][3:6] == ["not_installed_here", "other", "–not measured"]
    (table,) = page.all("table", id="table")
    cells = {row[1]: row for row in rows_of(page)}
    assert len({len(row) for row in cells.values()}) == 1
    # What a column sorts by is the number of the record, not its text.
    values = [float(cell.attributes["data-v"]) for cell in table.all("td", class_="n") if cell.text == "0.01713"]
    assert values == [0.01713]


def test_columns_without_a_figure_are_left_out_and_times_are_shown_where_measured(page, tmp_path):
    def groups(tree):
        return [cell.text for cell in tree.all("th", scope="colgroup")]

    assert groups(page) == ["perplexity", "against the original", "weights on disk"]
    made = result_record("alpha-w4")
    made.measured["before"]["ms_per_token"] = 2.5
    made.measured["after"] |= {"ms_per_token": 3.25, "ms_per_token_iqr": 0.5}
    made.measured["accelerated"] = {"ms_per_token": 1.25}
    other = result_record("beta-w8")
    other.measured["after"] = {"accuracy": 0.75, "bytes_on_disk": 10}
    for name, record in (("a", made), ("b", other)):
        (tmp_path / name).mkdir()
        record.write(tmp_path / name)
    tree = parse(render_page(read_cards(tmp_path)))
    # More than one metric: each row names its own.
    assert groups(tree) == ["quality", "against the original", "weights on disk", "ms per token"]
    rows = rows_of(tree)
    assert rows[0][5] == "perplexity"
    assert rows[1][5:8] == ["accuracy", "–not measured", "0.7500"]
    assert rows[0][-4:-1] == ["2.50", "3.25 ± 0.25", "1.25"]


def test_the_head_spans_the_columns_below_it(page):
    (table,) = page.all("table", id="table")
    top, below = table.all("thead")[0].all("tr")
    width = sum(int(cell.attributes.get("colspan", 1)) for cell in top.all("th"))
    assert width == len(rows_of(page)[0])
    assert len(below.all("th")) == sum(int(cell.attributes["colspan"]) for cell in top.all("th", scope="colgroup"))
    assert all(cell.attributes["scope"] in ("col", "colgroup") for cell in table.all("thead")[0].all("th"))
    assert [cell.attributes["scope"] for cell in table.all("th", class_="name")[1:]] == ["row"] * len(RECIPES)


def test_links_lead_to_places_of_the_page_and_to_files_that_exist(rendered, page):
    folder, _ = rendered
    names = [node.attributes["id"] for node in page.all(id=True)]
    assert len(names) == len(set(names))
    links = [node.attributes["href"] for node in page.all("a", href=True)]
    for link in links:
        if link.startswith("#"):
            assert link[1:] in names
        else:
            assert (folder / unquote(link)).name in ("README.md", "hf_optim.json")
            assert (folder / unquote(link)).parent.is_dir()
    for name in RECIPES:
        # In the table, and in a plot.
        assert links.count(f"#card-{name}") == (2 if name in FIGURES else 1)
        assert f"{name}/README.md" in links


def test_the_plots_show_the_models_that_can_be_compared(page):
    figures = page.all("figure")
    assert [figure.all("h3")[0].text for figure in figures] == ["alpha on eval.jsonl", "beta on eval.jsonl"]
    titles = [title.text for title in figures[0].all("title")]
    assert len(titles) == 5
    assert titles[0] == "original | perplexity 2.2251, 3.88 MB"
    assert titles[3] == (
        "3. alpha-w4 | gptq 4-bit g32 | perplexity 2.2661, 779 kB | +1.8 % perplexity, 4.98 times smaller"
        f" | top-1 agreement {AGREEMENT(0.9411)}, KL 0.01713"
    )
    numbers = [node.text for node in figures[0].all("text", class_="number")]
    assert sorted(numbers) == ["1", "2", "3", "4", "original"]
    places = [
        tuple(map(float, re.findall(r"[\d.]+", node.attributes["transform"])))
        for node in figures[0].all(class_="point")
    ]
    assert len(set(places)) == 5
    # Fewer bytes stand left, a lower perplexity below.
    numbers = [node.attributes.get("data-card") for node in figures[0].all(class_="point")]
    by_number = dict(zip(numbers, places, strict=True))
    assert by_number["3"][0] < by_number["4"][0] < by_number["2"][0]
    assert by_number["2"][1] < by_number["1"][1] < by_number["4"][1]


def test_every_family_has_a_shape_and_a_colour_of_its_own_in_all_plots():
    for listed in (page_plot.SHAPES, plots.FAMILY_MARKERS, plots.FAMILY_COLOURS):
        assert len(set(listed)) == len(FAMILIES)
    for place in range(len(FAMILIES)):
        assert f".family-{place} {{ fill: var(--family-{place}); }}" in static("page.css")


def test_a_series_with_one_model_has_no_plot(tmp_path):
    made = result_record("alpha-w4")
    made.measured["before"] = {}
    (tmp_path / "a").mkdir()
    made.write(tmp_path / "a")
    page = parse(render_page(read_cards(tmp_path)))
    assert page.all("figure") == []
    assert "Quality against bytes" not in page.text.replace(static("page.js"), "")


def test_each_card_unfolds_to_its_figures(page):
    cards = page.all("details")
    assert [card.attributes["id"] for card in cards] == [f"card-{name}" for name in sorted(RECIPES)]
    assert [title.text for title in cards[2].all("h3")] == [
        "Results", "Recipe", "Coverage", "Reported by the steps", "Data", "Stages", "Notes",
    ]  # fmt: skip
    text = cards[2].text
    for shown in ("2.2661", "+1.8 %", "technique: gptq", "head: lm_head", "mean error", "0.0125", "eval.jsonl", "1.2"):
        assert shown in text
    assert "Group 32 does not divide down_proj." in text
    assert "Not measured." in cards[5].text


def test_controls_are_hidden_without_a_script_and_headings_are_in_order(page):
    (form,) = page.all("form")
    (theme,) = page.all("button", id="theme")
    assert "hidden" in form.attributes
    assert "hidden" in theme.attributes
    assert [label.text.split()[0] for label in form.all("label")[:5]] == [
        "quantization", "pruning", "sparsity", "distillation", "other",
    ]  # fmt: skip
    assert [option.text for option in form.all("option")] == ["all 3", "alpha", "beta", "gamma"]
    (html,) = page.all("html")
    assert html.attributes["lang"] == "en"
    assert len(page.all("main")) == len(page.all("h1")) == len(page.all("caption")) == 1
    levels = [int(node.tag[1]) for node in page.all() if re.fullmatch(r"h[1-6]", node.tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_nothing_is_asked_from_outside_and_only_the_page_s_own_script_runs(rendered, page):
    text = rendered[1]
    assert not re.search(r"(?:https?:)?//[a-z]", text.replace(static("page.js"), ""))
    assert "@import" not in static("page.css")
    assert "url(" not in static("page.css")
    policy = page.all("meta", http_equiv="Content-Security-Policy")[0].attributes["content"]
    for kind, name in (("style", "page.css"), ("script", "page.js")):
        (node,) = page.all(kind)
        digest = base64.b64encode(hashlib.sha256(node.text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        assert node.text == static(name)
    assert "default-src 'none'" in policy
    assert not [node for node in page.all() if any(k.startswith("on") or k == "style" for k in node.attributes)]


def test_the_same_records_give_the_same_bytes(rendered):
    folder, text = rendered
    assert render_page(read_cards(folder)) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_record_makes_an_intact_page(text, tmp_path):
    for number, folder in enumerate(("x [a](javascript:alert(1)) \"' <b>`", "y&quot;<script>")):
        (tmp_path / folder).mkdir()
        made = record_with(text)
        made.measured["after"]["perplexity"] += number
        made.write(tmp_path / folder)
    tree = parse(render_page(read_cards(tmp_path)))
    plain = parse(render_page([]))
    assert len(tree.all("script")) == len(tree.all("style")) == 1
    known = {node.tag for node in plain.all()} | {
        "a", "button", "code", "dd", "details", "dl", "dt", "fieldset", "figcaption", "figure", "form", "g", "h3",
        "input", "label", "legend", "li", "option", "path", "pre", "select", "span", "summary", "svg", "tbody", "td",
        "text", "th", "thead", "tr", "ul", "wbr",
    }  # fmt: skip
    assert {node.tag for node in tree.all()} <= known
    assert not [node for node in tree.all() if any(k.startswith("on") or k == "style" for k in node.attributes)]
    for node in tree.all("a"):
        assert re.fullmatch(r"#[\w-]+|(?:x|y)%[\w%()]+/(?:README\.md|hf_optim\.json)|y%26.*", node.attributes["href"])
    assert not tree.all("img")
    assert len(rows_of(tree)) == 2


def test_folders_whose_names_make_one_id_have_places_of_their_own(tmp_path):
    for name in ("a b", "a.b", "a_b"):
        (tmp_path / name).mkdir()
        result_record("alpha-w4").write(tmp_path / name)
    page = parse(render_page(read_cards(tmp_path)))
    assert [card.attributes["id"] for card in page.all("details")] == ["card-a_b", "card-a_b--2", "card-a_b--3"]


def test_the_command_writes_the_page_beside_the_readme(tmp_path, capsys):
    folder = write_results(tmp_path / "results")
    assert main(["card", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "README.md"), str(folder / "index.html")]
    assert (folder / "index.html").read_text(encoding="utf-8") == render_page(read_cards(folder))
    with pytest.raises(SystemExit):
        main(["card", "--help"])
    assert "index.html" in capsys.readouterr().out
