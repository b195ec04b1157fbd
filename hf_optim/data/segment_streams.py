"""A corpus as streams of segments, for models that carry a memory from one batch to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import DataError


class SegmentStreams(IterableDataset[dict[str, Tensor]]):
    """A corpus cut into a number of contiguous streams, and each stream into segments, one a batch.

    Batch t holds segment t of each stream, in the order of the streams, so that row b of a batch continues row b of
    the batch before. Give the ``Trainer`` this dataset with ``per_device_train_batch_size`` = ``streams`` (divided by
    the number of processes). An iterable dataset is not shuffled. A model with a memory checks the order by the column
    ``stream`` (the technique ``transformer_xl``), and begins a document with an empty memory.

    Each row is a dict of tensors: ``input_ids`` and ``attention_mask`` int64 ``[segment]``; ``labels``, the tokens,
    and -100 for padding; ``stream`` int64 ``[2]``: the number of the document, and the place of the first token in it.
    As labels are shifted inside of a row, the first token of a segment is not predicted.

    Attributes:
        streams: rows of a batch.
        segment: tokens of a row.
        joined: documents are joined to one text, as the authors of Transformer-XL do; memory is never reset.
        left_out: tokens that no batch has: those left when the first stream ends.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        streams: int,
        segment: int,
        *,
        joined: bool = False,
        pad_token_id: int = 0,
    ) -> None:
        """Plan the streams.

        Args:
            documents: token ids of each document. Not joined, a stream takes the next document when one ends, and the
                last segment of a document is padded at the end.
            streams, segment, joined: see above.
            pad_token_id: of padding, which no token sees and no loss counts.

        Raises ``DataError`` for fewer documents (joined: segments) than streams, and for numbers below 1.
        """
        for name, value, low in (("streams", streams, 1), ("segment", segment, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise DataError(f"{name} must be a whole number of at least {low}, not {str(value)[:40]}")
        texts = [torch.as_tensor(document, dtype=torch.int64) for document in documents if len(document)]
        if joined and texts:
            whole = torch.cat(texts)
            each = len(whole) // streams // segment * segment
            texts = list(whole[: each * streams].view(streams, each)) if each else []
        if len(texts) < streams:
            raise DataError(
                f"{streams} streams need {streams} " + ("segments" if joined else "documents") + " at least, and there "
                f"are {len(texts)}: take fewer streams" + ("" if joined else ", or joined=True")
            )
        self.streams, self.segment, self.joined = streams, segment, joined
        self._texts, self._pad = texts, pad_token_id
        self._plan = _plan([len(text) for text in texts], streams, segment)
        used = sum(min(segment, len(texts[one]) - at) for row in self._plan for one, at in row)
        self.left_out = sum(map(len, documents)) - used

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return len(self._plan) * self.streams

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the rows, batch by batch. Raises ``DataError`` in one of several workers."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise DataError("segments come in the order of their streams, which workers mix: dataloader_num_workers=1")
        for row in self._plan:
            for document, at in row:
                yield self._row(document, at)

    def _row(self, document: int, at: int) -> dict[str, Tensor]:
        tokens = self._texts[document][at : at + self.segment]
        missing = self.segment - len(tokens)
        real = torch.nn.functional.pad(torch.ones_like(tokens), (0, missing))
        ids: Any = torch.nn.functional.pad(tokens, (0, missing), value=self._pad)
        labels = ids.masked_fill(real == 0, -100)
        return {"input_ids": ids, "attention_mask": real, "labels": labels, "stream": torch.tensor([document, at])}


def _plan(lengths: list[int], streams: int, segment: int) -> list[list[tuple[int, int]]]:
    """Return for each batch the document and the place of each row; it ends when a stream has no more documents."""
    waiting = iter(range(len(lengths)))
    at = [(next(waiting), 0) for _ in range(streams)]
    found = [list(at)]
    while True:
        for row, (document, place) in enumerate(at):
            following = (document, place + segment)
            if following[1] >= lengths[document]:
                another = next(waiting, None)
                if another is None:
                    return found
                following = (another, 0)
            at[row] = following
        found.append(list(at))
