"""Axial attention: the dense softmax under the mask of rows and columns, on images and on folded sequences."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from pairs_oracle import masked_attention
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5, tiny_vit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
)

import hf_optim
from hf_optim import ModelError, RecipeError

AXES = ("layers", "heads", "union")
IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))


def axial(model, *more, **fields):
    return hf_optim.optimize(model, [{"technique": "axial", **fields}, *more])


def wide_vit(**changes):
    """Return a ViT whose images have 3 rows of 5 patches."""
    return tiny_vit(**{"image_size": (24, 40), **changes})


def pixels(rows=3, columns=5, dtype=torch.float64):
    return torch.randn(2, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(0), dtype=dtype)


def inputs_of(model):
    return {"pixel_values": pixels()} if model.main_input_name == "pixel_values" else {"input_ids": IDS}


def rule(axes, columns, first, causal, heads=4):
    """Return the oracle's ``seen``, pair by pair."""

    def seen(layer, head, tokens):
        found = torch.zeros(tokens, tokens, dtype=torch.bool)
        both = axes == "union"
        down = layer % 2 == 1 if axes == "layers" else head >= heads / 2
        for i in range(tokens):
            for j in range(i + 1 if causal else tokens):
                (row, column), (other_row, other_column) = divmod(i - first, columns), divmod(j - first, columns)
                in_row, in_column = row == other_row, column == other_column
                found[i, j] = (
                    i < first or j < first or (in_row or in_column if both else (in_column if down else in_row))
                )
        return found

    return seen


def wide_deit():
    """Return a DeiT, which has a class and a distillation token, whose images have 3 rows of 5 patches."""
    config = DeiTConfig(
        image_size=(24, 40), patch_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DeiTForImageClassification(config).eval()


CASES = {
    "vit": (wide_vit, {}, 5, 1, False),
    "deit": (wide_deit, {"first": 2}, 5, 2, False),
    "bert": (tiny_bert, {"columns": 5}, 5, 0, False),
    "bert, first": (tiny_bert, {"columns": 5, "first": 2}, 5, 2, False),
    "gpt2": (tiny_gpt2, {"columns": 4}, 4, 0, True),
    "llama, first": (tiny_llama, {"columns": 4, "first": 1}, 4, 1, True),
    "opt": (tiny_opt, {"columns": 7}, 7, 0, True),
}


@pytest.mark.many
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_the_masked_softmax(case, axes):
    build, fields, columns, first, causal = CASES[case]
    dense = build().double()
    with masked_attention(dense, rule(axes, columns, first, causal)):
        expected = dense(**inputs_of(dense)).logits
        expected.square().sum().backward()
    model = axial(build().double(), axes=axes, **fields)
    found = model(**inputs_of(model)).logits
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for (name, one), other in zip(model.named_parameters(), dense.parameters(), strict=True):
        if other.grad is not None:
            scale = other.grad.abs().max().clamp_min(1.0)
            torch.testing.assert_close(one.grad / scale, other.grad / scale, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("axes", AXES)
def test_long_rows_by_blocks(axes):
    build = lambda: tiny_bert(max_position_embeddings=320, num_hidden_layers=2)  # noqa: E731
    ids = torch.randint(3, 60, (2, 301), generator=torch.Generator().manual_seed(1))
    dense = build().double()
    place = torch.arange(301)
    row, column = place[:, None] // 20 == place // 20, place[:, None] % 20 == place % 20
    masks = {"layers": lambda x, h: (row, column)[x % 2], "heads": lambda x, h: (row, column)[h // 2]}
    seen = masks.get(axes, lambda x, h: row | column)
    with masked_attention(dense, lambda layer, head, tokens: seen(layer, head)), torch.no_grad():
        expected = dense(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(
            axial(build().double(), columns=20, axes=axes)(ids).logits, expected, rtol=0, atol=1e-11
        )


@pytest.mark.many(every=4)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("lines", [(1, 5), (5, 1)])
def test_a_grid_of_one_row_or_column_is_full_attention_to_the_bit(axes, lines):
    build = lambda: tiny_vit(image_size=(8 * lines[0], 8 * lines[1]))  # noqa: E731
    x = pixels(*lines, dtype=torch.float32)
    assert torch.equal(axial(build(), axes=axes)(x).logits, build()(x).logits)
    if axes == "union" and lines == (1, 5):
        assert torch.equal(axial(tiny_gpt2(), axes=axes, columns=64)(IDS).logits, tiny_gpt2()(IDS).logits)
        assert torch.equal(axial(tiny_bert(), axes=axes, columns=1)(IDS).logits, tiny_bert()(IDS).logits)


@pytest.mark.many
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_opt, tiny_bert])
def test_a_padded_row_is_that_row_alone(build, side):
    model, length = axial(build().double(), columns=4, first=1), 15
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    part = slice(23 - length, 23) if side == "left" else slice(0, length)
    mask[1] = 0
    mask[1, part] = 1
    extra = {}
    if build in (tiny_gpt2, tiny_llama) or (build is tiny_bert and side == "left"):
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        body = model.base_model
        found, alone = body(ids, attention_mask=mask, **extra)[0][1, part], body(ids[1:, part])[0][0]
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("axes", AXES)
def test_nothing_comes_from_the_future_nor_from_the_right_of_earlier_rows(axes):
    model, other = axial(tiny_llama().double(), columns=4, axes=axes), IDS[:1].clone()
    other[:, 6] = (other[:, 6] + 1) % 60
    with torch.no_grad():
        moved = (model(other).logits - model(IDS[:1]).logits).abs().amax(-1)[0] > 0
    # Position 6 is in row 1 and column 2: columns 0 and 1 of later rows never hear of it.
    reached = [i for i in range(6, 23) if i % 4 >= 2]
    assert moved.nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("axes", AXES)
def test_dropout_is_of_training_alone(axes):
    model = axial(wide_vit(attention_probs_dropout_prob=0.5), axes=axes)
    x = pixels(dtype=torch.float32)
    with torch.no_grad(), torch.random.fork_rng():
        assert torch.equal(model(x).logits, model(x).logits)
        model.train()
        assert not torch.equal(model(x).logits, model(x).logits)


def test_two_layers_connect_all_patches():
    model = axial(wide_vit().double())
    before, x = model.vit(pixels())[0], pixels()
    x[0, :, 0, 0] += 1
    assert ((model.vit(x)[0] - before).abs().amax(-1)[0] > 0).all()


def test_generation_with_a_cache_is_generation_without():
    model = axial(tiny_llama(), columns=4)
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    fields = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(IDS, **fields), model.generate(IDS, use_cache=False, **fields))


@pytest.mark.parametrize(("size", "grid"), [((40, 24), "5 x 3"), ((24, 48), "3 x 6")])
def test_images_of_another_grid_are_refused_when_they_come(size, grid):
    model = axial(wide_vit())
    image = torch.zeros(1, 3, *size)
    for part in (model, model.vit):
        with pytest.raises(ValueError, match=f"3 x 5 patches got an image of {grid}"):
            part(image, interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (
            wide_vit,
            {"columns": 3},
            r"step 1 \(axial\): a grid of 3 x 3 is not that of the model's images, 3 x 5 patches",
        ),
        (wide_vit, {"rows": 5}, "a grid of 5 x 5 is not"),
        (wide_vit, {"first": 2}, "1 tokens stand before the patches, not 2"),
        (tiny_gpt2, {}, "gpt2 reads sequences, which have no rows: set columns"),
        (tiny_gpt2, {"columns": 8, "rows": 8}, "fill as many rows as they need"),
        (tiny_gpt2, {"columns": 64}, "64 positions fill one row of 64 columns"),
        (lambda: wide_vit(num_hidden_layers=1), {}, "has one of its layers"),
        (lambda: tiny_bert(num_attention_heads=1), {"columns": 4, "axes": "heads"}, "has one of its heads"),
        (tiny_t5, {"columns": 4}, "has cross-attention"),
    ],
)
def test_what_has_no_such_grid_is_refused_and_unchanged(build, fields, message):
    model = build()
    kind = type(model)
    with pytest.raises(ModelError, match=message):
        axial(model, **fields)
    assert type(model) is kind
    assert not hasattr(model.config, "attention_pattern")


def test_a_grid_is_refused_before_weights_are_read(tmp_path):
    wide_vit().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="a grid of 3 x 4 is not"):
        AutoModelForImageClassification.from_pretrained(tmp_path, optim_config=[{"technique": "axial", "columns": 4}])


@pytest.mark.parametrize("fields", [{"columns": 0}, {"axes": "diagonals"}, {"first": -1}, {"rows": 2.5}])
def test_fields_are_checked(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        axial(wide_vit(), **fields)


RELOAD = """
    import torch
    from transformers import {auto}
    model = {auto}.from_pretrained({folder!r}, trust_remote_code=True).eval()
    given = torch.load({folder!r} + "/given.pt")
    with torch.no_grad():
        torch.save(model(**given).logits, {folder!r} + "/logits.pt")
    try:
        model(pixel_values=torch.zeros(1, 3, 40, 24), interpolate_pos_encoding=True)
    except ValueError as error:
        print(error)
"""


@pytest.mark.many
@pytest.mark.parametrize("more", [(), ({"technique": "rtn", "bits": 8},)])
@pytest.mark.parametrize("build", [wide_vit, tiny_opt])
def test_a_checkpoint_needs_no_hf_optim(build, more, tmp_path, stock_python):
    given = {"pixel_values": pixels(dtype=torch.float32)} if build is wide_vit else {"input_ids": IDS}
    auto = "AutoModelForImageClassification" if build is wide_vit else "AutoModelForCausalLM"
    model = axial(build(), *more, **({} if build is wide_vit else {"columns": 4}))
    model.save_pretrained(tmp_path)
    torch.save(given, tmp_path / "given.pt")
    done = stock_python.copy(textwrap.dedent(RELOAD.format(auto=auto, folder=str(tmp_path))))
    assert done.status == 0, done.err
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(**given).logits)
    assert build is tiny_opt or "got an image of 5 x 3" in done.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": 0}, "columns=0, not a whole number from 1"),
        ({"columns": True}, "columns=True"),
        ({"rows": 10**12}, "rows=1000000000000"),
        ({"rows": 3}, "does not make patches"),
        ({"first": "1"}, "first='1'"),
        ({"axes": ["union"]}, "not one of layers, heads, union"),
    ],
)
def test_a_damaged_configuration_is_an_error(settings, message, tmp_path):
    axial(tiny_gpt2(), columns=4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)(IDS)


def test_the_report_and_the_card(tmp_path):
    model = axial(wide_vit())
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "its row and column of a grid of 3 x 5 patches (by layer); 1 tokens before it" in text
    report = hf_optim.run_of(model).record.steps["0"]
    assert {k: report[k] for k in ("first", "rows", "columns", "axes", "context")} == {
        "first": 1, "rows": 3, "columns": 5, "axes": "layers", "context": 16
    }  # fmt: skip
    rows, columns = 15 * 5, 15 * 3
    assert report["share_of_attention"] == pytest.approx(((rows + 31) + (columns + 31)) / 2 / 256)
