"""Model cards: everything on them comes from the record, the Hub can read them, and plots are drawn."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.text import Text
from PIL import Image

from hf_optim import CheckpointError, Contract, Paper, Reload, Technique, option, technique
from hf_optim.evaluation.cards import plots
from hf_optim.evaluation.cards.card import Card
from hf_optim.evaluation.cards.index import render_index
from hf_optim.evaluation.cards.points import ORIGINAL, Point, bytes_differ, layers_differ, models_differ, pareto_front
from hf_optim.evaluation.reported import REPORTED_METRICS, format_bytes, recipe_label
from hf_optim.recipes.catalogue import catalogue
from hf_optim.runs.record import Record

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


@technique(
    "card_test_grid",
    family="quantization",
    contract=Contract(),
    reload=Reload.STOCK_FORMAT,
    paper=Paper("2210.17323", "A Paper on Grids", 2022),
)
class Grid(Technique):
    """Rounds to a grid.

    Attributes:
        bits: of a weight.
        group_size: inputs that share a scale.
    """

    bits: int = option(4, low=2, high=8)
    group_size: int | None = 32


@pytest.fixture(autouse=True)
def known_technique(monkeypatch):
    # Only during the test: the process has one catalogue.
    monkeypatch.setitem(catalogue()._classes, Grid.spec.name, Grid)


def layers(blocks: int) -> dict[str, float]:
    return {
        f"model.layers.{i}.{kind}": 0.01 * (i + 1) + 0.001 * j for i in range(blocks) for j, kind in enumerate(KINDS)
    }


def record(**changes) -> Record:
    before = {
        "task": "text-generation",
        "perplexity": 2.22506,
        "bits_per_byte": 1.11234,
        "tokens": 373575,
        "bytes_on_disk": 3881848,
        "peak_memory_bytes": 612345678,
        "peak_memory_of": "process (resident)",
        "ms_per_token": 3.2149,
        "device": "cpu",
    }
    after = {
        **before,
        "perplexity": 2.27311,
        "bits_per_byte": 1.13021,
        "bytes_on_disk": 1103000,
        "top1_agreement": 0.95671,
        "kl": 0.021345,
        "peak_memory_bytes": 632345678,
        "ms_per_token": 3.4172,
    }
    made = Record(
        recipe={
            "steps": [{"technique": "card_test_grid", "bits": 3}],
            "calibration": {"dataset": "/home/somebody/calibration.jsonl", "samples": 128},
        },
        base_model={
            "id": "somebody/babyllama-1m",
            "revision": None,
            "class": "LlamaForCausalLM",
            "parameters": 968576,
            "dtype": "float32",
        },
        calibration={
            "dataset": "calibration.jsonl",
            "text_column": "text",
            "samples": 128,
            "seq_len": 256,
            "tokens": 32768,
            "seed": 0,
            "sha256": "0123456789abcdef" * 4,
        },
        stages=[
            {
                "steps": ["card_test_grid"],
                "driver": "blockwise",
                "seconds": 12.345,
                "peak_memory_bytes": 812345678,
                "device": "cpu",
            }
        ],
        coverage={
            "step 1 (card_test_grid)": {
                "weights_touched": 921600,
                "weights_total": 967680,
                "share": 0.952381,
                "skipped": {"output head": ["lm_head"], "too small": [f"model.layers.{i}.tiny" for i in range(12)]},
            }
        },
        steps={
            "0": {"technique": "card_test_grid", "layers": layers(2), "layer_metric": "squared_error", "mean": 0.0125}
        },
        measured={"before": before, "after": after, "evaluation": {"dataset": "eval.jsonl", "seq_len": 256}},
        reload="STOCK_FORMAT",
        traits=["quantized"],
        notes=["Group 32 does not divide 172 inputs: four layers use groups of 4."],
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        finished=True,
    )
    return dataclasses.replace(made, **changes)


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def section(text: str, title: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    level = re.search(rf"^(#+) {re.escape(title)}$", text, re.M)
    assert level, f"no heading {title!r}"
    rest = text[level.end() :]
    following = re.search(rf"^#{{1,{len(level.group(1))}}} ", rest, re.M)
    return rest[: following.start()] if following else rest


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# -- front matter -----------------------------------------------------------------------------------------------------


def test_the_hub_reads_the_front_matter(tmp_path):
    text = Card(record()).render()
    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    data = front(text)
    assert data["base_model"] == "somebody/babyllama-1m"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["hf_optim", "compressed-tensors", "card_test_grid", "quantization"]
    assert "license" not in data
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    after = record().measured["after"]
    assert results == {k: after[k] for k in ("perplexity", "bits_per_byte", "top1_agreement", "kl")}
    assert {r.dataset_name for r in card.data.eval_results} == {"eval.jsonl"}
    # Through the Hub's own writer and back, nothing changes.
    card.save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()


def test_a_local_base_model_is_not_a_link_and_a_licence_is_given_if_known():
    base = record().base_model
    data = front(Card(record(base_model={**base, "id": "babyllama-1m"})).render())
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert front(Card(record(base_model={**base, "license": "mit"})).render())["license"] == "mit"


def test_the_relation_and_tags_follow_the_result():
    data = front(Card(record(traits=["sparse"], reload="STOCK_DENSE")).render())
    assert data["base_model_relation"] == "finetune"
    assert "compressed-tensors" not in data["tags"]


def test_the_class_comes_from_the_checkpoint_if_there_is_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    card = Card(record(), tmp_path)
    assert front(card.render())["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained(checkpoint)" in card.render()


# -- the body ---------------------------------------------------------------------------------------------------------


def number(cell: str) -> float:
    exact = re.search(r"\(([\d,]+)\)", cell)
    value = float((exact.group(1) if exact else cell).replace(",", "").rstrip("% "))
    return value / 100 if cell.endswith("%") else value


def test_every_number_of_the_table_is_in_the_record():
    made = record()
    rows = {row[0]: row[1:] for row in table(section(Card(made).render(), "Results"))}
    keys = {metric.label: metric for metric in REPORTED_METRICS}
    assert len(rows) == 7
    digits = {"perplexity": 4, "bits_per_byte": 4, "top1_agreement": 4, "kl": 5, "ms_per_token": 2}
    for label, cells in rows.items():
        key = keys[label].key
        for side, cell in zip(("before", "after"), cells[:2], strict=True):
            value = made.measured[side].get(key)
            assert (cell == "-") if value is None else number(cell) == round(value, digits.get(key, 0))
    assert rows["weights on disk (bytes)"][2] == "-71.6 %"
    assert rows["KL from the original (nats per position)"][2] == ""


def test_figures_of_the_model_in_memory_are_told_from_those_of_the_files():
    results = section(Card(record()).render(), "Results")
    assert (
        "Measured on the model in memory, before it was saved: top-1 agreement with the original, KL from the original "
        "(nats per position); all other figures of this checkpoint were measured on its files, loaded again.\n"
    ) in results
    made = record()
    for key in ("top1_agreement", "kl"):
        del made.measured["after"][key]
    assert "in memory, before" not in section(Card(made).render(), "Results")
    assert "Computed on the model in memory, while the recipe ran." in section(
        Card(made).render(), "Metrics of the steps"
    )


NO_CONTROL = "no control: a dense model trained alike was not measured"


@pytest.mark.parametrize("steps", [["qat"], ["magnitude", "logit_kd"], ["technique_of_another_package", "gmp"]])
def test_a_trained_result_without_a_control_says_so_in_the_table(steps):
    made = record(recipe={"steps": [{"technique": name} for name in steps]})
    assert [NO_CONTROL, "-", "-", ""] in table(section(Card(made).render(), "Results"))
    made.measured["control"] = {"perplexity": 2.19, "name": "dense-alike"}
    assert NO_CONTROL not in Card(made).render()


def test_results_that_were_not_trained_or_not_evaluated_need_no_control():
    assert NO_CONTROL not in Card(record()).render()
    measured = {"before": {"bytes_on_disk": 10}, "after": {"bytes_on_disk": 5}}
    assert NO_CONTROL not in Card(record(recipe={"steps": [{"technique": "qat"}]}, measured=measured)).render()


def test_a_control_has_its_own_column():
    made = record(recipe={"steps": [{"technique": "qat"}]})
    made.measured["control"] = {"perplexity": 2.19001, "bytes_on_disk": 3881848, "name": "dense-alike"}
    results = section(Card(made).render(), "Results")
    assert "|  | original | original, trained alike | this checkpoint | change |" in results
    rows = {row[0]: row[1:] for row in table(results)}
    assert rows["perplexity"] == ["2.2251", "2.1900", "2.2731", "+2.2 %"]
    assert rows["bits per byte"][1] == "-"
    assert "The control is dense-alike, a model that this recipe did not make." in results


def test_the_card_has_recipe_coverage_data_stages_limits_papers_and_versions():
    text = Card(record()).render()
    assert "968,576 parameters in float32" in text
    assert "weights on disk: 1.1 MB (original: 3.88 MB)." in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", section(text, "Recipe"), re.S).group(1))
    assert recipe["steps"] == [{"technique": "card_test_grid", "bits": 3}]
    assert recipe["calibration"] == {"dataset": "calibration.jsonl", "samples": 128}
    coverage = section(text, "Coverage")
    assert table(coverage) == [["step 1 (card_test_grid)", "921,600", "967,680", "95.2 %"]]
    assert "skipped 1: output head (`lm_head`)" in coverage
    assert "skipped 12: too small" in coverage
    assert "and 4 more" in coverage
    assert ["step 1 (card_test_grid)", "mean", "0.0125"] in table(section(text, "Metrics of the steps"))
    data = dict(table(section(text, "Calibration data")))
    assert data["sha256"] == "`" + "0123456789abcdef" * 4 + "`"
    assert data["tokens"] == "32,768"
    assert table(section(text, "How it was made")) == [["1", "card_test_grid", "blockwise", "12.3", "812 MB", "cpu"]]
    limits = section(text, "Limits")
    assert "four layers use groups of 4" in limits
    assert "saves bytes on disk, but neither time nor memory of inference" in limits
    assert "Evaluated on eval.jsonl only" in limits
    papers = section(text, "Papers")
    assert "[A Paper on Grids](https://arxiv.org/abs/2210.17323) (2022)" in papers
    assert "url = {https://arxiv.org/abs/2210.17323}" in papers
    assert "torch 2.13.0, transformers 5.23.0" in section(text, "Versions")
    assert "373,575 tokens scored" in text
    assert "on cpu with stock transformers" in text


@pytest.mark.parametrize(("tokens", "words"), [(64, ("token ids", "text")), (None, ("pixels or features", "data"))])
def test_calibration_data_is_called_what_it_is(tokens, words):
    data = {"dataset": "batches in memory", "samples": 2, "sha256": "0", **({"tokens": tokens} if tokens else {})}
    text = Card(record(calibration=data)).render()
    assert f"The hash covers the model inputs ({words[0]}), in order." in text
    assert f"{words[1]} of other kinds may lose more quality" in text


def test_training_data_is_named_and_a_column_without_a_figure_left_out():
    trained = {
        "steps": ["card_test_grid"],
        "driver": "training",
        "seconds": 4.0,
        "device": "cpu",
        "data": "train.jsonl",
    }
    text = Card(record(calibration={}, stages=[trained])).render()
    assert "## Calibration data" not in text
    assert section(text, "Training data").strip() == "Trained on train.jsonl."
    assert table(section(text, "How it was made")) == [["1", "card_test_grid", "training", "4.0", "cpu"]]
    both = section(Card(record(stages=[trained])).render(), "Calibration data")
    assert "sha256" in both
    assert "Trained on train.jsonl." in both
    del trained["data"]
    assert "is not recorded" in section(Card(record(calibration={}, stages=[trained])).render(), "Training data")


def test_no_path_of_the_machine_reaches_the_card():
    assert "/home/" not in Card(record()).render()


@pytest.mark.parametrize(
    ("level", "traits", "expected", "absent"),
    [
        ("STOCK_DENSE", ["sparse"], "from_pretrained(checkpoint)", "trust_remote_code"),
        ("STOCK_FORMAT", ["quantized"], 'optim_config="auto"', "trust_remote_code"),
        ("STOCK_ARCH", ["moe"], "from_pretrained(checkpoint)", 'optim_config="auto"'),
        ("REMOTE_CODE", [], "from_pretrained(checkpoint, trust_remote_code=True)", 'optim_config="auto"'),
    ],
)
def test_the_snippet_is_right_for_the_reload_level(level, traits, expected, absent):
    loading = section(Card(record(reload=level, traits=traits)).render(), "How to load")
    assert expected in loading
    assert absent not in loading
    for source in re.findall(r"```python\n(.*?)```", loading, re.S):
        compile(source, "snippet", "exec")


def test_a_checkpoint_without_evaluation_is_marked_not_measured():
    text = Card(record(measured={"after": {"bytes_on_disk": 1103000}})).render()
    results = section(text, "Results")
    assert "Not measured" in results
    assert table(results) == [["weights on disk (bytes)", "-", "1.1 MB (1,103,000)", ""]]
    assert "model-index" not in front(text)
    assert "the loss of quality against the original is not known" in text
    bare = Card(Record()).render()
    assert "Not measured" in bare
    assert front(bare)["library_name"] == "transformers"


def test_an_unfinished_run_and_an_unknown_technique_still_render():
    text = Card(record(finished=False, recipe={"steps": [{"technique": "not_installed_here", "bits": 2}]})).render()
    assert "training is not complete" in text
    assert "not_installed_here 2-bit" in text
    assert "## Papers" not in text


def test_sections_of_steps_are_kept_in_the_record_and_rendered_again(tmp_path):
    made = record()
    card = Card(made, tmp_path)
    for text in ("Old words.", "New words."):
        card.paragraph("Grids", text)
        card.table("Worst layers", ["layer", "error"], [["`a|b`", 0.25], ["`c`", 3]])
        card.image("Curve", tmp_path / "curve.png", "error over time")
    (tmp_path / "hf_optim.json").write_text(made.to_json())
    again = Card(Record.read(tmp_path), tmp_path).render()
    assert again == card.render()
    assert "New words." in again
    assert "Old words." not in again
    assert "| `a\\|b` | 0.25 |" in again
    assert "![error over time](curve.png)" in again
    with pytest.raises(ValueError, match="every row needs 2 cells"):
        card.table("Bad", ["a", "b"], [["x"]])
    with pytest.raises(ValueError, match="is outside the checkpoint"):
        card.image("Bad", "/etc/picture.png", "")


def test_labels_use_the_defaults_that_a_recipe_leaves_out():
    assert recipe_label({"steps": [{"technique": "card_test_grid"}]}) == "card_test_grid 4-bit g32"
    two = [{"technique": "unknown_mask", "keep": 2, "group": 4}, {"technique": "unknown_prune", "sparsity": 0.5}]
    assert recipe_label({"steps": two}) == "unknown_mask 2:4 + unknown_prune 50 %"


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 B"), (3881848, "3.88 MB"), (900_000, "900 kB"), (5e12, "5,000 GB"), (1.5e9, "1.5 GB")]
)
def test_bytes_are_written_in_decimal_units(size, text):
    assert format_bytes(size) == text


# -- plots ------------------------------------------------------------------------------------------------------------


def check_picture(path, height=600):
    assert path.stat().st_size < 100_000
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert image.size == (1000, height)
        assert len(image.convert("RGB").getcolors(10**6)) > 5


def test_write_draws_the_plots_that_the_card_shows(tmp_path):
    text = Card(record(), tmp_path).write().read_text()
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert shown == ["plots/quality_against_bytes.png", "plots/step_1_squared_error.png"]
    for path in shown:
        check_picture(tmp_path / path)
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted(p.split("/")[1] for p in shown)


def test_without_results_there_are_no_plots(tmp_path):
    Card(record(measured={}, steps={})).write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_the_same_record_draws_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Card(record()).write(tmp_path / name)
    one, two = ((tmp_path / n / "plots/quality_against_bytes.png").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("blocks", [1, 5, 48])
def test_layers_are_bars_or_lines_by_their_number(tmp_path, blocks):
    check_picture(plots.plot_layers(layers(blocks), "error", tmp_path / "layers.png", "Step 1"))


def test_numbers_per_layer_are_found_in_what_steps_report():
    steps = {
        "0": {"technique": "a", "layers": 7, "errors": {"m.0.q": 1.0, "m.0.k": 2.0}, "by_kind": {"x": 1, "y": 2}},
        "1": {"technique": "b", "sparsity": 0.5, "layers": {"m.0.q": 0.5, "m.0.k": 0.5}},
    }
    found = plots.find_layer_values(steps)
    assert [(index, name, metric) for index, name, _, metric in found] == [
        ("0", "a", "errors"),
        ("1", "b", "sparsity"),
    ]


def labels_of(monkeypatch, call):
    """Boxes of all labels of a plot, in pixels, as they are when it is saved."""
    boxes = []

    def keep(figure, path):
        figure.draw_without_rendering()
        for axes in figure.axes:
            frame = axes.get_window_extent()
            for note in axes.texts:
                if note.get_text():
                    note.update_positions(figure.canvas.get_renderer())
                    boxes.append((note.get_text(), Text.get_window_extent(note, figure.canvas.get_renderer()), frame))
        return path

    monkeypatch.setattr(plots, "save", keep)
    call()
    return boxes


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.3])
def test_labels_cover_neither_each_other_nor_the_frame(monkeypatch, tmp_path, spread):
    points = [
        Point(1e6 * (1 + spread * i), 2.2 + 0.1 * spread * i, "recipe", "quantization", number=i + 1) for i in range(6)
    ]
    points.append(Point(4e6, 2.2, ORIGINAL))
    boxes = labels_of(monkeypatch, lambda: plots.plot_pareto({"m": points}, REPORTED_METRICS[0], tmp_path / "p.png"))
    assert sorted(text for text, _, _ in boxes) == ["1", "2", "3", "4", "5", "6", "original"]
    for i, (name, box, frame) in enumerate(boxes):
        assert frame.x0 <= box.x0, name
        assert box.x1 <= frame.x1, name
        for other, second, _ in boxes[:i]:
            assert not box.overlaps(second), (name, other)


def test_the_pareto_front_is_what_nothing_else_beats():
    points = [Point(b, q, "") for b, q in ((3, 1.0), (1, 5.0), (2, 2.0), (2.5, 2.5), (2, 3.0))]
    assert [(p.bytes, p.quality) for p in pareto_front(points)] == [(1, 5.0), (2, 2.0), (3, 1.0)]
    assert [(p.bytes, p.quality) for p in pareto_front(points, lower_is_better=False)] == [(1, 5.0)]


# -- plots with nothing to tell ---------------------------------------------------------------------------------------


def test_a_plot_is_worth_drawing_if_it_shows_more_than_one_number():
    assert not layers_differ([0.5, 0.5001, 0.49999])
    assert not layers_differ([0.799988, 0.800049])
    assert layers_differ([0.999, 0.9999])
    assert layers_differ([1e-5, 2e-5])
    quality = REPORTED_METRICS[0]
    original = Point(3881848, 2.22506, ORIGINAL)
    assert not models_differ([original], quality)
    assert not models_differ([original, Point(3881900, 2.22507, "same")], quality)
    assert models_differ([original, Point(3881848, 2.2252, "other quality")], quality)
    assert models_differ([original, Point(3871848, 2.22506, "other bytes")], quality)


def test_a_card_neither_draws_nor_links_plots_with_nothing_to_tell(tmp_path):
    made = record()
    Card(made, tmp_path).write()
    flat = record(
        steps={"0": {"technique": "x", "layer_metric": "squared_error", "layers": dict.fromkeys(layers(2), 0.5)}}
    )
    flat.measured["after"] |= {key: flat.measured["before"][key] for key in ("perplexity", "bytes_on_disk")}
    text = Card(flat, tmp_path).write().read_text()
    assert "![" not in text
    assert list((tmp_path / "plots").iterdir()) == []  # those of the card before are gone


# -- the index --------------------------------------------------------------------------------------------------------


def test_a_plot_against_bytes_needs_bytes_that_differ():
    assert bytes_differ([Point(3881848, 2.2, "a"), Point(1100000, 2.2, "b")])
    assert not bytes_differ([Point(3881848, 2.2, "a"), Point(3881900, 4.1, "b")])


def test_the_index_lists_pages_of_techniques_and_refuses_a_list_of_another_shape(tmp_path):
    record().write(folder(tmp_path / "one"))
    entry = {"page": "moe/page.md", "title": "A page", "why": "it has no weights"}
    (tmp_path / "pages.json").write_text(json.dumps({"card_test_grid": entry}))
    assert "| `card_test_grid` | [A page](moe/page.md) | it has no weights |" in render_index(tmp_path)
    (tmp_path / "pages.json").write_text(json.dumps({"card_test_grid": {"page": 3}}))
    with pytest.raises(CheckpointError, match="needs a page, a title and why"):
        render_index(tmp_path)


def folder(path):
    path.mkdir()
    return path


def test_the_index_is_a_table_and_a_plot_over_all_cards(tmp_path):
    for name, bits, perplexity, size in (("w4", 4, 2.27311, 1103000), ("w3", 3, 2.438, 900000)):
        made = record(recipe={"steps": [{"technique": "card_test_grid", "bits": bits}]})
        made.measured["after"] |= {"perplexity": perplexity, "bytes_on_disk": size}
        (tmp_path / name).mkdir()
        made.write(tmp_path / name)
    unmeasured = record(measured={}, base_model={"id": "other", "class": "BertModel"})
    (tmp_path / "x").mkdir()
    unmeasured.write(tmp_path / "x")
    text = render_index(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    rows = {row[1]: row for row in table(text)}
    assert [row[0] for row in table(text)] == ["1", "2", "3"]
    assert rows["[w4](w4/README.md)"][3:7] == ["card_test_grid 4-bit g32", "perplexity", "2.2251", "2.2731"]
    assert rows["[w3](w3/README.md)"][10] == "900 kB"
    assert rows["[x](x/README.md)"][4] == "not measured"
    assert "[index.html](index.html)" in text
    picture = tmp_path / re.search(r"\]\((quality[^)]+)\)", text).group(1)
    check_picture(picture)
    # One model has nothing to be compared with: its plot is gone.
    for name in ("w4", "w3"):
        made = record()
        made.measured["before"].pop("perplexity")
        made.measured["after"] |= {"perplexity": 2.3, "bytes_on_disk": 1103000}
        made.write(tmp_path / name)
    assert "![" not in render_index(tmp_path)
    assert not picture.exists()


@pytest.mark.parametrize("name", ["README.md", "index.html"])
def test_an_index_replaces_no_page_of_somebody_else(tmp_path, name):
    record().write(folder(tmp_path / "one"))
    render_index(tmp_path)
    render_index(tmp_path)  # its own pages are replaced
    (tmp_path / name).write_text("My project")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=f"{name} was not written by `hf-optim card`"):
        render_index(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_index_of_nothing_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no folder in"):
        render_index(tmp_path)


def test_the_legend_of_a_plot_may_have_other_words_than_original(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(plots, "save", lambda figure, path: seen.extend(figure.legends[0].get_texts()))
    points = {"": [Point(1e6, 2.0, "r"), Point(2e6, 3.0, "q", "pruning")]}
    plots.plot_pareto(points, REPORTED_METRICS[0], tmp_path / "p.png", legend={"original": "reference"})
    assert [each.get_text() for each in seen] == ["reference", "pruning"]


def test_several_base_models_get_a_panel_each(tmp_path):
    series = {
        "a": [Point(1e6, 2.0, "r"), Point(2e6, 90.0, "r", "pruning", 1)],
        "b": [Point(2e6, 20.0, "r"), Point(2e6, 21.0, "r", "no such family", 2)],
        "c": [Point(3e6, 9.0, "r"), Point(4e6, 8.0, "$r$", "several families", 3)],
    }
    check_picture(plots.plot_pareto(series, REPORTED_METRICS[0], tmp_path / "p.png"), height=1350)
