"""Streams of segments: every token once, in the order of its document, on one row of the batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from hf_optim import DataError, SegmentStreams

DOCUMENTS = [list(range(100 * k, 100 * k + length)) for k, length in enumerate((13, 4, 9, 1, 8, 21), 1)]


def batches(data):
    return list(DataLoader(data, batch_size=data.streams))


def test_a_row_continues_the_row_before():
    data = SegmentStreams(DOCUMENTS, streams=2, segment=4, pad_token_id=7)
    found = batches(data)
    assert len(found) * 2 == len(data)
    read: dict[int, list[int]] = {}
    held = [None, None]
    for batch in found:
        for row, (document, place) in enumerate(batch["stream"].tolist()):
            assert place == 0 or held[row] == (document, place)
            real = batch["attention_mask"][row].bool()
            assert len(read.setdefault(document, [])) == place
            read[document] += batch["input_ids"][row][real].tolist()
            assert (batch["input_ids"][row][~real] == 7).all()
            assert torch.equal(batch["labels"][row], batch["input_ids"][row].masked_fill(~real, -100))
            held[row] = (document, place + int(real.sum()))
    assert all(tokens == DOCUMENTS[document][: len(tokens)] for document, tokens in read.items())
    assert sum(map(len, read.values())) + data.left_out == sum(map(len, DOCUMENTS))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, batches(data), strict=True))


def test_joined_documents_are_one_text_in_equal_parts():
    data = SegmentStreams(DOCUMENTS, streams=3, segment=4, joined=True)
    found = torch.stack([batch["input_ids"] for batch in batches(data)], 1).flatten(1)
    text = [token for document in DOCUMENTS for token in document]
    assert found.tolist() == [text[begin : begin + 16] for begin in (0, 16, 32)]
    assert data.left_out == 56 - 48
    places = torch.stack([batch["stream"] for batch in batches(data)])
    assert places[:, :, 0].tolist() == [[0, 1, 2]] * 4
    assert places[:, 0, 1].tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("documents", "fields", "message"),
    [
        (DOCUMENTS, {"streams": 0, "segment": 4}, "streams must be a whole number of at least 1, not 0"),
        (DOCUMENTS, {"streams": 2, "segment": 1}, "segment must be a whole number of at least 2, not 1"),
        (
            DOCUMENTS,
            {"streams": 7, "segment": 4},
            r"7 streams need 7 documents at least, and there are 6: .* joined=True",
        ),
        (DOCUMENTS, {"streams": 20, "segment": 4, "joined": True}, "20 streams need 20 segments at least"),
        ([], {"streams": 1, "segment": 4, "joined": True}, "there are 0"),
    ],
)
def test_too_little_is_refused(documents, fields, message):
    with pytest.raises(DataError, match=message):
        SegmentStreams(documents, **fields)


def test_workers_do_not_mix_the_streams(monkeypatch):
    data = SegmentStreams(DOCUMENTS, streams=2, segment=4)
    module = __import__("hf_optim.data.segment_streams", fromlist=["get_worker_info"])
    monkeypatch.setattr(module, "get_worker_info", lambda: type("Worker", (), {"num_workers": 2}))
    with pytest.raises(DataError, match="dataloader_num_workers=1"):
        next(iter(data))
