"""Examples, token sequences and calibration batches: every source, and the errors for bad ones."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
import torch
from tiny_models import tiny_bert, tiny_llama, tiny_t5, tiny_vit
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer, BertTokenizer

from hf_optim import DataConfig, DataError
from hf_optim.data import datasets as datasets_module
from hf_optim.data.calibration_set import build_calibration_data
from hf_optim.data.datasets import load_examples, load_texts
from hf_optim.data.token_sequences import TokenSequences, random_tokens, reservoir, sample_sequences, sequence_length

STORIES = ["One day, a cat sat.", "", "Two dogs ran home.", "   ", 'He said "no" and left; NA is a word.']
LLAMA = tiny_llama(vocab_size=259).config


def write(path, kind: str):
    """The stories in a file of that kind."""
    file = path / f"stories.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(STORIES)))
    elif kind == "json":
        file.write_text(json.dumps([{"id": i, "text": t} for i, t in enumerate(STORIES)]))
    elif kind == "csv":
        quoted = ('"' + t.replace('"', '""') + '"' for t in STORIES)
        file.write_text("id,text\n" + "".join(f"{i},{t}\n" for i, t in enumerate(quoted)))
    elif kind == "tsv":
        file.write_text("id\ttext\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(STORIES)))
    else:
        from datasets import Dataset

        Dataset.from_dict({"id": list(range(len(STORIES))), "text": STORIES}).to_parquet(file)
    return file


@pytest.fixture(autouse=True)
def no_progress_bars():
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_texts(tmp_path, kind):
    config = DataConfig(str(write(tmp_path, kind)))
    assert [row["text"] for row in load_examples(config)] == STORIES
    assert list(load_texts(config)) == [t for t in STORIES if t.strip()]
    assert [row["id"] for row in load_examples(config, limit=2)] == [0, 1]


def test_a_text_file_is_one_text_and_a_large_one_is_read_by_paragraphs(tmp_path, monkeypatch):
    file = tmp_path / "book.txt"
    file.write_text("first line\nsecond line\n\nsecond paragraph\n")
    assert list(load_texts(DataConfig(str(file)))) == ["first line\nsecond line\n\nsecond paragraph\n"]
    monkeypatch.setattr(datasets_module, "STREAMED_ABOVE", 8)
    assert [t.strip() for t in load_texts(DataConfig(str(file)))] == ["first line\nsecond line", "second paragraph"]


def test_the_column_is_found_or_the_error_lists_the_columns(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"en": "a cat", "de": "eine Katze", "n": 1}\n')
    assert list(load_texts(DataConfig(str(file), text_column="de"))) == ["eine Katze"]
    with pytest.raises(DataError, match=r"several columns hold text \(columns: en, de, n\).*text_column"):
        list(load_texts(DataConfig(str(file))))
    with pytest.raises(DataError, match=r"no column 'fr' \(it has en, de, n\)"):
        list(load_texts(DataConfig(str(file), text_column="fr")))
    with pytest.raises(DataError, match="column 'n' of row 0 holds a int"):
        list(load_texts(DataConfig(str(file), text_column="n")))
    file.write_text('{"de": "eine Katze", "n": 1}\n')
    assert list(load_texts(DataConfig(str(file)))) == ["eine Katze"]


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".bin"])
def test_pickles_are_refused_even_when_they_exist(tmp_path, suffix):
    file = tmp_path / f"data{suffix}"
    file.write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match="can run code"):
        load_examples(DataConfig(str(file)))


def test_errors_name_the_bad_file(tmp_path):
    with pytest.raises(DataError, match="no data file"):
        load_examples(DataConfig(str(tmp_path / "absent.jsonl")))
    with pytest.raises(DataError, match="is a folder"):
        load_examples(DataConfig(str(tmp_path)))
    odd = tmp_path / "data.xyz"
    odd.write_text("text")
    with pytest.raises(DataError, match=r"unknown file format '\.xyz'"):
        load_examples(DataConfig(str(odd)))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="is empty"):
        load_examples(DataConfig(str(empty)))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl: cannot be read"):
        list(load_examples(DataConfig(str(broken))))


def test_a_hub_dataset_offline_is_an_error():
    with pytest.raises(DataError, match="offline: HF_HUB_OFFLINE"):
        load_examples(DataConfig("some-owner/some-dataset-that-is-not-cached"))


def test_sequences_have_bos_before_every_text():
    tokenizer = tiny_tokenizer()
    stream = [i for t in ("ab", "cde") for i in [1, *tokenizer(t, add_special_tokens=False)["input_ids"]]]
    assert sample_sequences(["ab", "cde"], tokenizer, 3, None).tolist() == [stream[:3], stream[3:6]]
    sequences = TokenSequences(["ab", "cdé"], tokenizer, 3)
    assert len(list(sequences)) == 2
    assert (sequences.tokens, sequences.bytes, len(sequences.remainder)) == (8, 6, 2)


def test_without_bos_every_text_is_followed_by_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    a, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("ab", "c"))
    assert sample_sequences(["ab", "c"], tokenizer, 5, None).tolist() == [[*a, 2, *b, 2]]


def test_an_encoder_gets_sequences_between_cls_and_sep(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    tokenizer = BertTokenizer(str(vocabulary))
    assert sample_sequences(["a b", "c a b"], tokenizer, 5, None).tolist() == [[2, 5, 6, 3, 3], [2, 7, 5, 6, 3]]


def test_samples_are_random_by_seed_and_equally_likely():
    tokenizer = tiny_tokenizer()
    text = ["".join(chr(97 + i % 26) for i in range(400))]
    every = sample_sequences(text, tokenizer, 8, None).tolist()
    first, again, other = (sample_sequences(text, tokenizer, 8, 10, seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert all(w in every for w in first)
    counts = torch.zeros(20)
    for seed in range(2000):
        for item in reservoir(range(20), 5, seed):
            counts[item] += 1
    # 500 expected each; five standard deviations of a binomial are 97.
    assert (counts - 500).abs().max() < 97


def test_the_error_for_too_short_data_has_the_tokens_and_those_needed():
    with pytest.raises(DataError, match=r"has 101 tokens, but 4 sequences of 50 tokens need 200: .*samples=2 or less"):
        sample_sequences(["x" * 100], tiny_tokenizer(), 50, 4)
    with pytest.raises(DataError, match="has 101 tokens, but 1 sequence of 128 tokens need 128"):
        sample_sequences(["x" * 100], tiny_tokenizer(), 128, None)


def test_a_shuffle_buffer_bounds_what_is_read_of_a_stream():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "abcdefgh" * 4

    chosen = sample_sequences(endless(), tiny_tokenizer(), 8, 3, shuffle_buffer=100)
    assert chosen.shape == (3, 8)
    assert read <= 128


def test_the_default_sequence_length_is_the_context():
    assert sequence_length(LLAMA) == 64
    assert sequence_length(LLAMA, tiny_tokenizer(32)) == 32
    assert sequence_length(LLAMA, None, 16) == 16
    with pytest.raises(DataError, match="seq_len 65 is longer than the model's context of 64"):
        sequence_length(LLAMA, None, 65)
    assert sequence_length(tiny_llama(max_position_embeddings=1_000_000).config) == 2048


def test_the_description_of_a_file_has_no_path(tmp_path):
    file = write(tmp_path, "jsonl")
    data = DataConfig(str(file), samples=3, seq_len=16, seed=7)
    made = build_calibration_data(None, model_config=LLAMA, tokenizer=tiny_tokenizer(), data=data)
    ids = torch.cat([batch["input_ids"] for batch in made])
    assert len(made) == 1
    assert made.description == {
        "dataset": "stories.jsonl",
        "text_column": "text",
        "samples": 3,
        "seq_len": 16,
        "tokens": 48,
        "seed": 7,
        "sha256": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    same = build_calibration_data(str(file), model_config=LLAMA, tokenizer=tiny_tokenizer(), data=data, batch_size=2)
    assert [len(batch["input_ids"]) for batch in same] == [2, 1]
    assert same.description["sha256"] == made.description["sha256"]
    assert build_calibration_data(made, model_config=LLAMA) is made


def sources():
    ids = torch.arange(60).reshape(6, 10)
    from datasets import Dataset

    loader = torch.utils.data.DataLoader(
        [{"input_ids": row, "attention_mask": row * 0 + 1} for row in ids], batch_size=4
    )
    return {
        "tensor": ids,
        "batches": [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}],
        "loader": loader,
        "dataset": Dataset.from_dict({"input_ids": ids.tolist(), "note": ["x"] * 6}),
    }


@pytest.mark.parametrize("kind", ["tensor", "batches", "loader", "dataset"])
def test_token_ids_in_every_container(kind):
    made = build_calibration_data(sources()[kind], model_config=LLAMA, data=DataConfig(samples=5))
    assert made.description["samples"] == sum(len(batch["input_ids"]) for batch in made) == 5
    assert made.description["seq_len"] == 10
    assert {tuple(row) for batch in made for row in batch["input_ids"].tolist()} <= {
        tuple(row) for row in torch.arange(60).reshape(6, 10).tolist()
    }
    tiny_llama(vocab_size=259)(**made.batches[0])


def test_texts_and_datasets_of_texts_need_a_tokenizer():
    from datasets import Dataset

    for source in (["a story"] * 9, Dataset.from_dict({"text": ["a story"] * 9})):
        made = build_calibration_data(
            source, model_config=LLAMA, tokenizer=tiny_tokenizer(), data=DataConfig(samples=2, seq_len=8)
        )
        assert made.batches[0]["input_ids"].shape == (2, 8)
        with pytest.raises(DataError, match="pass tokenizer=AutoTokenizer"):
            build_calibration_data(source, model_config=LLAMA)


def test_the_tokenizer_of_another_model_is_refused():
    with pytest.raises(
        DataError, match="the vocabulary of the model has 64: pass the tokenizer that belongs to the model"
    ):
        build_calibration_data(
            ["xyz" * 99], model_config=tiny_llama().config, tokenizer=tiny_tokenizer(), data=DataConfig(samples=1)
        )


def test_an_encoder_decoder_gets_decoder_inputs():
    model = tiny_t5()
    ids = torch.arange(2, 22).reshape(2, 10)
    made = build_calibration_data(ids, model_config=model.config)
    batch = made.batches[0]
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    assert (batch["decoder_input_ids"][:, 0] == model.config.decoder_start_token_id).all()
    model(**batch)
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    shifted = build_calibration_data([{"input_ids": ids, "labels": labels}], model_config=model.config).batches[0]
    assert "labels" not in shifted
    assert shifted["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 7, 0]]


def picture(colour: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (20, 20), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_images_go_through_the_processor(tmp_path):
    from datasets import Dataset
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    file = tmp_path / "images.parquet"
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(12)], "label": list(range(12))}
    Dataset.from_dict(rows).to_parquet(file)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    model = tiny_vit()
    made = build_calibration_data(
        str(file), model_config=model.config, tokenizer=processor, data=DataConfig(samples=10)
    )
    assert [tuple(b["pixel_values"].shape) for b in made] == [(8, 3, 16, 16), (2, 3, 16, 16)]
    assert made.description["image_column"] == "image"
    model(**made.batches[0])
    with pytest.raises(DataError, match="need the model's image processor"):
        build_calibration_data(str(file), model_config=model.config)


def test_random_inputs_by_name():
    made = build_calibration_data("random", model_config=LLAMA, data=DataConfig(samples=3, seq_len=5, seed=2))
    assert torch.equal(made.batches[0]["input_ids"], random_tokens(259, 3, 5, 2))
    assert made.description["dataset"] == "random"
    pixels = build_calibration_data("random", model_config=tiny_vit().config, data=DataConfig(samples=2))
    assert pixels.batches[0]["pixel_values"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "needs calibration data"),
        ([], "is empty"),
        ([3, 4], "cannot calibrate on a list of int"),
        (7, "cannot calibrate on a value of type int"),
        (torch.zeros(3, 4), "LongTensor"),
        (torch.zeros(4, dtype=torch.long), "LongTensor"),
        ({"train": 1}, "mapping with keys train"),
        (["text", 5], "item 1 of the calibration texts is a int"),
        ([{"input_ids": [1, 2]}], "'input_ids' is a list, not a tensor"),
    ],
)
def test_other_sources_are_refused(source, message):
    with pytest.raises(DataError, match=message):
        build_calibration_data(source, model_config=LLAMA, tokenizer=tiny_tokenizer(), data=DataConfig(samples=1))


def test_the_real_files_load(shared_data):
    assert len(list(load_examples(DataConfig(str(shared_data / "stsb/dev.tsv"))))) == 1500
    assert len(list(load_examples(DataConfig(str(shared_data / "cifar10/test.parquet"), samples=None), limit=5))) == 5
    assert next(load_texts(DataConfig(str(shared_data / "sst2/dev.tsv")))).startswith("it 's a charming")


def test_real_stories_make_calibration_sequences(shared_data, shared_models):
    model = shared_models / "stories260k"
    config = tiny_llama(vocab_size=512, max_position_embeddings=512).config
    data = DataConfig(str(shared_data / "tinystories/calibration.jsonl"), samples=16)
    made = build_calibration_data(model_config=config, tokenizer=AutoTokenizer.from_pretrained(model), data=data)
    assert made.description["tokens"] == 16 * 512
    assert (torch.cat([b["input_ids"] for b in made]) == 1).sum() > 8


def test_bert_calibrates_on_sentences(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    model = tiny_bert()
    data = DataConfig(samples=2, seq_len=6)
    tokenizer = BertTokenizer(str(vocabulary))
    made = build_calibration_data(["a b a b a"] * 4, model_config=model.config, tokenizer=tokenizer, data=data)
    assert made.batches[0]["input_ids"][:, 0].tolist() == [2, 2]
    model(**made.batches[0])
