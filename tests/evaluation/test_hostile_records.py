"""Cards of records that a stranger wrote: no markup of theirs has an effect, and nothing is written outside."""

from __future__ import annotations

import itertools
import json
import os
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from hf_optim import CheckpointError
from hf_optim.cli import main
from hf_optim.evaluation.cards.card import Card
from hf_optim.evaluation.cards.index import render_index
from hf_optim.runs.record import Record

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "[click](javascript:alert(1))",
    "![track](https://evil.example/x.png)",
    "`</code><b>x</b>",
    "```\n</pre><iframe src=x>\n```\n# Owned",
    "a | b |\n|---|---|\n| x | y |",
    "x\n---\nlicense: mit\n---\n# Owned",
    "text\n\n## Limits\n\n- none",
    "[x]: javascript:alert(1)",
    "<!-- ",
    "$\\frac{1}{$ $x^$",
    "\u202e\x00\x1b[31m",
    "&lt;script&gt; &#60;b&#62;",
    "*a* _b_ ~~c~~ **d**",
    "~~~\nx",
    "\\`x` \\[y](javascript:1)",
    "}\n}\n```\n<u>",
]
PNG_SAFE = re.compile(r"[\w\-./%]+")


def record_with(text: str) -> Record:
    """A record with ``text`` wherever text can stand."""
    side = {"perplexity": 2.0, "bytes_on_disk": 1000, "device": text, "peak_memory_of": text, "task": text}
    side |= {"ms_per_token": 4.0, "ms_per_token_iqr": 0.5, "time_rounds": text}
    measured = {
        "before": side,
        "after": dict(side),
        "accelerated": {**side, "kernels": text},
        "control": {**side, "name": text},
        "evaluation": {"dataset": text, "split": text, "samples": text},
        "timing": {"what": text, "in_turn": text, "load_average": text, "cores": 2},
    }
    return Record(
        recipe={
            "steps": [{"technique": text, "bits": 4, "other": text}],
            "description": text,
            "calibration": {"dataset": text},
            "training": {"max_steps": text},
        },
        base_model={"id": text, "class": text, "parameters": 7, "dtype": text, "license": text},
        calibration={"dataset": text, "split": text, "text_column": text, "sha256": text, "tokens": text},
        stages=[{"steps": [text], "driver": text, "seconds": 1.0, "device": text, "peak_memory_of": text}],
        coverage={
            text: {
                "weights_touched": 1,
                "weights_total": 2,
                "share": 0.5,
                "skipped": {text: [text]},
                "left_alone": {f"role {text}": {"reason": text, "names": [text], "weights": 1}},
            }
        },
        steps={"0": {"technique": text, text: text, "layer_metric": text, "layers": {f"a.{text}": 1.0, "b.c": 2.0}}},
        measured=measured,
        reload="STOCK_FORMAT",
        traits=["quantized", text],
        notes=[text],
        sections=[
            {"kind": "paragraph", "title": text, "markdown": text},
            {"kind": "table", "title": text, "header": [text], "rows": [[text]]},
            {"kind": "figure", "title": text, "path": "plots/a b(c).png", "alt": text},
        ],
        versions={text: text},
        finished=True,
    )


HEADINGS = [
    "Results", "How to load", "Recipe", "Coverage", "Metrics of the steps", "Calibration data", "How it was made",
    "Limits", "Versions",
]  # fmt: skip


def tokens_of(markdown: str) -> list:
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough").parse(markdown):
        found += [token, *(token.children or [])]
    return found


@pytest.mark.many
@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_record_makes_an_intact_card(text, tmp_path):
    home = tmp_path / "card"
    home.mkdir()
    made = record_with(text)
    made.write(home)
    page = Card(Record.read(home), home).write().read_text(encoding="utf-8")
    _, front, body = page.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "transformers"
    assert not {"license", "datasets", "base_model"} & metadata.keys()
    assert metadata["tags"] == ["hf_optim", "compressed-tensors"]
    tokens = tokens_of(body)
    assert [t.type for t in tokens if t.type in ("html_block", "html_inline")] == []
    for token in tokens:
        if token.type == "link_open":
            assert token.attrs["href"].startswith("https://")
        if token.type == "image":
            assert PNG_SAFE.fullmatch(token.attrs["src"])
    titles = [b.content for a, b in itertools.pairwise(tokens) if a.type == "heading_open" and a.tag == "h2"]
    assert titles == [title for title in HEADINGS if title not in ("Coverage", "Metrics of the steps")]
    # Each fenced block ends where it should: the recipe comes back, and no fence is opened by a note.
    blocks = [t for t in tokens if t.type == "fence"]
    assert [t.info for t in blocks] == ["python", "python", "yaml"]
    assert yaml.safe_load(blocks[2].content)["steps"][0]["bits"] == 4
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert written[:2] == ["card/README.md", "card/hf_optim.json"]
    assert all(re.fullmatch(r"card/plots/[\w\-]+\.png", name) for name in written[2:])


def test_an_index_of_hostile_cards(tmp_path):
    for number, text in enumerate(HOSTILE):
        home = tmp_path / f"{number} [x](javascript:alert(1)) `b` <i>"
        home.mkdir()
        made = record_with(text)
        made.measured["after"].pop("perplexity" if number else "task")  # one point: plots take time
        made.measured["before"].pop("perplexity")
        made.write(home)
    tokens = tokens_of(render_index(tmp_path))
    assert not [t for t in tokens if t.type in ("html_block", "html_inline")]
    page, *links = [t.attrs["href"] for t in tokens if t.type == "link_open"]
    assert page == "index.html"
    assert len(links) == len(HOSTILE)
    assert all(re.fullmatch(r"\d+%20[\w\-./%()]+/README\.md", link) for link in links)


@pytest.mark.parametrize("metric", ["/../../../x", "..", "/etc/x", "a/b", "C:\\x", "x" * 5000, "\x00"])
def test_a_plot_is_written_inside_the_checkpoint(metric, tmp_path):
    home = tmp_path / "a" / "b" / "c"
    home.mkdir(parents=True)
    made = Record(steps={"0": {"technique": "x", "layers": {"a.b": 1.0, "a.c": 2.0}, "layer_metric": metric}})
    made.write(home)
    assert main(["card", str(home)]) == 0
    assert {p.parent for p in tmp_path.rglob("*") if p.is_file()} == {home, home / "plots"}


def test_links_in_the_checkpoint_are_not_followed(tmp_path):
    home, outside = tmp_path / "card", tmp_path / "outside"
    home.mkdir()
    outside.mkdir()
    (outside / "file").write_text("kept")
    (home / "README.md").symlink_to(outside / "file")
    made = Record(steps={"0": {"technique": "x", "layers": {"a.b": 1.0, "a.c": 2.0}, "layer_metric": "m"}})
    made.write(home)
    (home / "plots").symlink_to(outside)
    with pytest.raises(CheckpointError, match="not a folder of its own"):
        Card(Record.read(home), home).write()
    (home / "plots").unlink()
    (home / "plots").mkdir()
    (home / "plots" / "step_1_m.png").symlink_to(outside / "file")
    Card(Record.read(home), home).write()
    assert (outside / "file").read_text() == "kept"
    assert not (home / "README.md").is_symlink()


WRONG = [
    ("recipe", []),
    ("recipe", {"steps": ["rtn"]}),
    ("recipe", {"steps": [{"bits": 4}]}),
    ("base_model", "x"),
    ("calibration", {"dataset": ["a"]}),
    ("stages", [{"seconds": "x"}]),
    ("coverage", {"s": {"share": 1.0}}),
    ("steps", {"../x": {}}),
    ("steps", {"99999999999": {}}),
    ("measured", {"after": {"perplexity": [1]}}),
    ("measured", {"evaluation": {"split": "x"}}),
    ("reload", "__class__"),
    ("notes", [1]),
    ("sections", [{"kind": "html", "title": "x"}]),
    ("sections", [{"kind": "figure", "title": "x", "path": "../x.png", "alt": ""}]),
    ("sections", [{"kind": "figure", "title": "x", "path": "javascript:1", "alt": ""}]),
    ("sections", [{"kind": "table", "title": "x", "header": ["a"], "rows": [["a", "b"]]}]),
    ("finished", "yes"),
    ("versions", {"torch": 2}),
    ("schema", 99),
    ("base_model", {"parameters": 10**30}),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_record_with_an_entry_of_another_type_is_refused(key, value, tmp_path):
    data = json.loads(record_with("plain").to_json()) | {key: value}
    (tmp_path / "hf_optim.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"hf_optim\.json cannot be read: .{5,300}$"):
        Record.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{}",
        b"[]",
        b"5",
        b"[" * 100_000,
        b'{"schema": 1, "schema": 1}',
        b'{"schema": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_record_that_is_not_one(content, tmp_path, capsys):
    (tmp_path / "hf_optim.json").write_bytes(content)
    assert main(["card", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_a_pipe_in_place_of_a_record_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "hf_optim.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Record.read(tmp_path)


def test_figures_that_are_not_finite_and_unknown_entries_are_read(tmp_path):
    data = json.loads(record_with("plain").to_json())
    data["measured"]["after"]["perplexity"] = float("inf")
    (tmp_path / "hf_optim.json").write_text(json.dumps(data | {"of_a_later_version": 1}))
    text = Card(Record.read(tmp_path), tmp_path).render()
    assert "| perplexity | 2.0000 | 2.0000 | not finite |" in text
