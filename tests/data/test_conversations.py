"""Conversations as calibration data: rendered by the chat template, cut, padded, and named in the record."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tiny_models import tiny_llama, tiny_t5
from tiny_tokenizer import tiny_tokenizer

import hf_optim
from hf_optim import DataConfig, DataError, RecipeError, run_of
from hf_optim.data.calibration_set import build_calibration_data

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
CHATS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}],
    [
        {"role": "system", "content": "Be short"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
    ],
    [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}],
]
TEXT = ["<s>[user]Hi</s>[assistant]Hello there</s>", "<s>[system]Be short</s>[user]2+2</s>[assistant]4</s>"]


def chat_tokenizer(template=TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def model():
    made = tiny_llama()
    torch.manual_seed(0)
    made.resize_token_embeddings(300)
    return made


def build(rows, tokenizer=None, **fields):
    config = DataConfig(**{"samples": None, "seq_len": 48, **fields})
    made = model()
    return build_calibration_data(
        rows, model_config=made.config, tokenizer=tokenizer or chat_tokenizer(), data=config, model=made
    )


def dataset(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def test_every_conversation_is_one_row_by_the_template_cut_and_padded(caplog):
    with caplog.at_level(logging.INFO, "hf_optim"):
        made = build(dataset(messages=CHATS))
    assert "column 'messages' holds conversations, which the chat template renders" in caplog.text
    (batch,) = made.batches
    tokenizer = chat_tokenizer()
    for row, text in enumerate(TEXT):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (48 - len(ids))
        assert set(batch["input_ids"][row, len(ids) :].tolist()) <= {tokenizer.pad_token_id}
        assert ids.count(tokenizer.bos_token_id) == 1
    assert int(batch["attention_mask"][2].sum()) == 48  # the long one is cut
    real = int(batch["attention_mask"].sum())
    assert {k: made.description[k] for k in ("chat_column", "samples", "seq_len", "tokens")} == {
        "chat_column": "messages", "samples": 3, "seq_len": 48, "tokens": real,
    }  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        {"conversations": [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]]},
        {"messages": [[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHATS[0][1]]]},
    ],
)
def test_other_forms_of_messages_give_the_same_tokens(rows):
    file = [{"messages": CHATS[0]}]
    from datasets import Dataset

    rows = [{key: value[0]} for key, value in rows.items()]

    class Rows(list):
        features, column_names, info = {}, [], None

    found, expected = build(Rows(rows)), build(Dataset.from_list(file))
    assert torch.equal(found.batches[0]["input_ids"], expected.batches[0]["input_ids"])


def test_a_file_of_conversations_is_read_with_and_without_the_flag(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"id": i, "messages": chat}) + "\n" for i, chat in enumerate(CHATS)))
    ids = [build(str(file), chat=chat).batches[0]["input_ids"] for chat in (None, True)]
    assert torch.equal(*ids)
    assert len(build(str(file), samples=2).batches[0]["input_ids"]) == 2


def test_a_column_of_texts_comes_first_unless_chat_is_asked_for():
    rows = dataset(messages=CHATS, text=["plain text " * 20] * 3)
    assert "chat_column" not in build(rows, samples=2).description
    assert build(rows, chat=True).description["chat_column"] == "messages"
    named = dataset(turns=CHATS, text=["plain"] * 3)
    assert build(named, chat=True, text_column="turns").description["chat_column"] == "turns"
    with pytest.raises(DataError, match="'messages' holds conversations, which calibration reads"):
        build(dataset(messages=CHATS), chat=False)


def test_padding_does_not_change_what_a_step_sees():
    """Hessians count the real tokens alone: conversations of a batch, and one by one, give equal codes."""
    rows, made = dataset(messages=CHATS), []
    for batch_size in (3, 1):
        config = DataConfig(samples=None, seq_len=48, batch_size=batch_size)
        base = model()
        data = build_calibration_data(
            rows, model_config=base.config, tokenizer=chat_tokenizer(), data=config, model=base
        )
        step = {"technique": "gptq", "group_size": 32, "precision": "float64"}
        made.append(hf_optim.optimize(base.double(), step, data).state_dict())
    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name], rtol=0, atol=1e-9, msg=name)


def test_a_recipe_may_ask_for_conversations(tmp_path):
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": "t", "messages": chat}) + "\n" for chat in CHATS))
    calibration = {"dataset": str(tmp_path / "c.jsonl"), "chat": True, "samples": 3, "seq_len": 32}
    recipe = {"steps": [{"technique": "nm", "score": "activation"}], "calibration": calibration}
    done = hf_optim.optimize(model(), recipe, tokenizer=chat_tokenizer())
    assert run_of(done).record.calibration["chat_column"] == "messages"
    with pytest.raises(RecipeError, match="calibration: chat must be true or false, not 'yes'"):
        hf_optim.OptimConfig.parse({**recipe, "calibration": {**calibration, "chat": "yes"}})


def test_an_encoder_decoder_gets_masked_decoder_inputs():
    made = tiny_t5()
    made.resize_token_embeddings(300)
    data = build_calibration_data(
        dataset(messages=CHATS),
        model_config=made.config,
        tokenizer=chat_tokenizer(),
        data=DataConfig(samples=None, seq_len=40),
        model=made,
    )
    assert {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"} == set(data.batches[0])


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ({"text": ["a"]}, {"chat": True}, r"no conversation in 'messages' or 'conversations' \(columns: text\)"),
        ({"messages": [[{"role": "user", "content": "a"}], [{"content": "b"}]]}, {}, r"row 1.*role"),
        ({"messages": [[{"role": "user", "content": 3}]]}, {}, "the content is 3, neither text nor a list"),
        ({"messages": [[{"role": "user", "content": [{"type": "video"}]}]]}, {}, "text and images are read"),
        ({"messages": [[{"role": "user", "content": [{"type": "image"}]}]]}, {}, "holds an image, and the model's"),
    ],
)
def test_wrong_rows_are_refused_by_name(rows, fields, message):
    with pytest.raises(DataError, match=message):
        build(dataset(**rows), **fields)


def test_a_missing_or_broken_template_says_what_to_do():
    with pytest.raises(DataError, match="has no chat template: take that of a model trained on conv"):
        build(dataset(messages=CHATS), tokenizer=chat_tokenizer(None))
    with pytest.raises(DataError, match="roles must alternate"):
        build(dataset(messages=CHATS), tokenizer=chat_tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(DataError, match="cannot read the data"):
        build(dataset(messages=CHATS), tokenizer=chat_tokenizer("{{ ''.__class__.__mro__ }}"))
