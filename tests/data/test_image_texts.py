"""Images with texts as calibration data, by the model's processor; and which files of images are read."""

from __future__ import annotations

import io
import json
import logging
import os

import pytest
import torch
from PIL import Image
from tiny_models import tiny_llama
from tiny_processors import CHAT, PROCESSED, build_processed, picture

import hf_optim
from hf_optim import DataConfig, DataError, run_of
from hf_optim.cli import main
from hf_optim.data.calibration_set import build_calibration_data
from hf_optim.data.images import load_image

CAPTIONS = ["a dog", "two red cars", "x", "a long text"]
GPTQ = {"technique": "gptq", "group_size": 16}


def png(seed: int, **options) -> bytes:
    stream = io.BytesIO()
    picture(seed, **options).save(stream, "PNG")
    return stream.getvalue()


def dataset(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def build(model, processor, source, **fields):
    config = DataConfig(**{"samples": None, "batch_size": 2, **fields})
    return build_calibration_data(source, model_config=model.config, tokenizer=processor, data=config, model=model)


def folder_of_images(home, rows):
    for number in range(len(CAPTIONS)):
        (home / f"{number}.png").write_bytes(png(number))
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home / "rows.jsonl"


@pytest.mark.parametrize("family", PROCESSED)
@pytest.mark.parametrize("kind", ["bytes", "paths", "pil"])
def test_images_with_captions_are_what_the_processor_makes_of_them(family, kind, tmp_path):
    model, processor = build_processed(family)
    if kind == "paths":
        rows = [{"image": f"{i}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]
        source = str(folder_of_images(tmp_path, rows))
    else:
        images = [png(i) if kind == "bytes" else picture(i) for i in range(4)]
        source = dataset(image=images, text=CAPTIONS)
    made = build(model, processor, source)
    assert [len(batch["input_ids"]) for batch in made] == [2, 2]
    assert made.description["image_column"] == "image"
    assert made.description["text_column"] == "text"
    image = processor.image_processor(picture(2), return_tensors="pt")["pixel_values"]
    batch = made.batches[1]
    assert torch.equal(batch["pixel_values"][: len(image)], image)
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert "x" in text
    if family != "clip":
        token = processor.image_token
        assert text.startswith("<s>[user]")
        assert text.count(token) == {"llava": 4, "qwen2-vl": 1}[family]
    with torch.no_grad():
        model(**batch)  # tokens and features of images fit


@pytest.mark.parametrize("family", PROCESSED)
def test_a_model_is_calibrated_on_images_and_texts(family):
    _, processor = build_processed(family)
    source = dataset(image=[picture(i) for i in range(4)], text=CAPTIONS)
    other = dataset(image=[picture(i + 9) for i in range(4)], text=CAPTIONS)
    step = {"technique": "nm", "score": "activation", "targets": ["*.mlp.*"]}
    done = []
    for data in (source, other):
        model = hf_optim.optimize(build_processed(family)[0], [step], data, tokenizer=processor)
        assert run_of(model).record.calibration["samples"] == 4
        done.append(model.state_dict())
    assert any(not torch.equal(tensor, done[1][name]) for name, tensor in done[0].items())


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
@pytest.mark.parametrize("form", ["embedded", "column", "unmentioned", "path"])
def test_conversations_with_images(family, form, tmp_path):
    model, processor = build_processed(family)
    own = {"embedded": {"image": {"bytes": png(0), "path": None}}, "path": {"path": "0.png"}}.get(form, {})
    content = [{"type": "image", **own}, {"type": "text", "text": "what is it?"}]
    first = {"role": "user", "content": "what is it?" if form == "unmentioned" else content}
    row = {"messages": [first, {"role": "assistant", "content": "noise"}]}
    if form in ("column", "unmentioned"):
        row["images"] = [picture(0)]
    if form == "path":
        source = str(folder_of_images(tmp_path, [row]))
    else:
        source = type("Rows", (list,), {"features": {}, "column_names": [], "info": None})([row])
    (batch,) = build(model, processor, source).batches
    text = processor.tokenizer.decode(batch["input_ids"][0]).replace(processor.image_token, "")
    marks = "<|vision_start|><|vision_end|>" if family == "qwen2-vl" else ""
    assert text == f"<s>[user]{marks}what is it?[assistant]noise"
    assert torch.equal(
        batch["pixel_values"], processor.image_processor(picture(0), return_tensors="pt")["pixel_values"]
    )


def test_a_template_that_writes_the_first_token_does_not_double_it():
    model, processor = build_processed("llava", template="{{ bos_token }}" + CHAT.replace("IMAGE", "<image>"))
    (batch,) = build(model, processor, dataset(image=[picture(0)], text=["plain"])).batches
    assert batch["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1


def test_without_a_template_the_image_comes_before_the_text():
    model, processor = build_processed("llava", template=None)
    source = dataset(image=[picture(0), picture(1)], text=["before <image> after", "plain"])
    (batch,) = build(model, processor, source).batches
    texts = [processor.tokenizer.decode(row) for row in batch["input_ids"]]
    assert texts[0].startswith("<s>before <image><image><image><image> after")
    assert texts[1].startswith("<s><image><image><image><image>\nplain")


def test_texts_alone_are_enough_for_llava_and_not_for_clip():
    texts = ["some words " * 40]
    model, processor = build_processed("llava")
    assert set(build(model, processor, texts, seq_len=16).batches[0]) == {"input_ids"}
    model, processor = build_processed("clip")
    for tokenizer in (processor, processor.tokenizer):
        with pytest.raises(DataError, match="texts alone, and the model also reads pixel_values: give rows with an"):
            build(model, tokenizer, texts, seq_len=8)


def test_a_text_model_leaves_images_out_with_a_note_and_a_vision_model_the_texts(caplog):
    source = dataset(image=[picture(0), picture(1)], text=["words and words " * 20] * 2)
    llama = tiny_llama()
    llama.resize_token_embeddings(300)
    _, processor = build_processed("clip")
    with caplog.at_level(logging.WARNING, "hf_optim"):
        made = build(llama, processor.tokenizer, source, seq_len=16)
    assert set(made.batches[0]) == {"input_ids"}
    assert "the model reads no images: column 'image' is left out" in caplog.text
    vision = build_processed("clip")[0].vision_model
    made = build(vision, processor.image_processor, source)
    assert set(made.batches[0]) == {"pixel_values"}


def test_a_missing_processor_is_named():
    model, processor = build_processed("llava")
    with pytest.raises(DataError, match=r"need the model's processor.*pass tokenizer=AutoProcessor"):
        build(model, processor.tokenizer, dataset(image=[picture(0)], text=["a"]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "../secret.png", "text": "a"}, "not a file inside the folder of the data"),
        ({"image": "{home}/secret.png", "text": "a"}, "not a file inside the folder of the data"),
        ({"image": "link.png", "text": "a"}, "not a file inside the folder of the data"),
        ({"image": "missing.png", "text": "a"}, "not a file inside the folder of the data"),
        ({"image": "folder.png", "text": "a"}, "not a file inside the folder of the data"),
        ({"image": "https://example.org/a.png", "text": "a"}, "is a URL, which is not fetched"),
        ({"image": "broken.png", "text": "a"}, "row 0: cannot decode an image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "http://x.org/a.png"}]}]},
            "is a URL, which is not fetched",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/a"}}]}]},
            "is a URL, which is not fetched",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "mentions 1 images, and has 0"),
    ],
)
def test_only_files_inside_the_folder_of_the_data_are_read(row, message, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret.png").write_bytes(png(7))
    os.symlink(tmp_path / "secret.png", data / "link.png")
    (data / "folder.png").mkdir()
    (data / "broken.png").write_bytes(png(1)[:40])
    (data / "rows.jsonl").write_text(json.dumps(row).replace("{home}", str(tmp_path)) + "\n")
    model, processor = build_processed("llava")
    with pytest.raises(DataError, match=message):
        build(model, processor, str(data / "rows.jsonl"))


def test_names_in_memory_and_bombs_are_refused(monkeypatch):
    with pytest.raises(DataError, match="read only from a local data file"):
        load_image("a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="cannot decode an image"):
        load_image(png(0))


def test_the_command_line_finds_the_processor_of_the_model(tmp_path, capsys):
    model, processor = build_processed("llava")
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    parts = [[{"type": "image", "path": f"{i}.png"}, {"type": "text", "text": CAPTIONS[i]}] for i in range(4)]
    rows = [{"messages": [{"role": "user", "content": part}]} for part in parts]
    file = folder_of_images(tmp_path, rows)
    command = ["compress", str(tmp_path / "llava"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text("[{technique: gptq, group_size: 16}]")
    assert main([*command, "--recipe", str(recipe), "--calibration", str(file), "--chat"]) == 0
    record = json.loads((tmp_path / "out" / "hf_optim.json").read_text())
    assert record["calibration"]["chat_column"] == "messages"
    assert record["calibration"]["samples"] == 4
    by_hand = hf_optim.optimize(build_processed("llava")[0], [GPTQ], str(file), tokenizer=processor)
    assert run_of(by_hand).record.calibration["sha256"] == record["calibration"]["sha256"]
    clip, processor = build_processed("clip")
    clip.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "words " * 200}) + "\n")
    command = ["compress", str(tmp_path / "clip"), "--output", str(tmp_path / "o2"), "--recipe", str(recipe)]
    assert main([*command, "--calibration", str(tmp_path / "texts.jsonl"), "--samples", "2"]) == 2
    assert "the model also reads pixel_values: give rows with an image and a text" in capsys.readouterr().err
