"""Calibration batches of rows that are not cut out of one long text: conversations, images, images with texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from ..errors import DataError
from ..recipes.config import DataConfig
from ..toolkit.topology.fake_inputs import pairs_text_and_images
from . import datasets
from .batches import count_tokens
from .conversations import conversation_batches, messages_of, plain_messages, rendered, require_template
from .forward_inputs import processed
from .image_texts import ImageTexts, is_multimodal
from .images import is_image, load_image
from .processor_errors import no_image_processor, processor_errors
from .token_sequences import reservoir, sequence_length

log = logging.getLogger(__name__)

Built = tuple[list[dict[str, Tensor]], dict[str, Any]]


@dataclass(frozen=True)
class RowBatches:
    """Builds batches of rows and their description, with one method per kind of row.

    Attributes:
        config: of the model.
        tokenizer: the tokenizer, image processor or processor of the model.
        load_processor: returns the model's processor for texts and images, if ``tokenizer`` is not one; or None.
        data: how much to take, and the seed.
        batch_size: rows in a batch.
        accepted: names of the inputs that the model takes, or None if its class is unknown.
    """

    config: PretrainedConfig
    tokenizer: Any
    load_processor: Callable[[], Any] | None
    data: DataConfig
    batch_size: int
    accepted: frozenset[str] | None

    def takes(self, *inputs: str) -> bool:
        """Return True if the model takes all of these inputs, as far as its class is known."""
        return self.accepted is None or self.accepted.issuperset(inputs)

    @cached_property
    def processor(self) -> Any:
        """The model's processor for texts and images, or None."""
        if is_multimodal(self.tokenizer):
            return self.tokenizer
        found = self.load_processor() if self.load_processor is not None else None
        return found if is_multimodal(found) else None

    def conversations(self, examples: Iterable[Any], column: str, name: str, shuffle_buffer: int | None) -> Built:
        """Sample conversations and render them by the chat template, one row each. Raises ``DataError``."""
        tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        if tokenizer is None:
            raise DataError(f"{name} holds conversations, which need the model's tokenizer: its folder has none")
        require_template(tokenizer, name)
        length = sequence_length(self.config, tokenizer, self.data.seq_len)
        texts = []
        for number, row in self._sample(examples, column, shuffle_buffer):
            where = f"{name}: row {number}"
            texts.append(rendered(tokenizer, plain_messages(messages_of(row[column], where), where)))
        batches = conversation_batches(texts, tokenizer, length, self.batch_size if self.takes("attention_mask") else 1)
        if not batches:
            raise DataError(f"{name}: no row of column {column!r} holds a conversation")
        if not self.takes("attention_mask"):
            batches = [{"input_ids": batch["input_ids"]} for batch in batches]
        return batches, {**_counts(batches), "dataset": name, "chat_column": column}

    def images(self, examples: Iterable[Any], column: str, name: str, shuffle_buffer: int | None) -> Built:
        """Sample images and run them through the model's image processor."""
        processor = getattr(self.tokenizer, "image_processor", self.tokenizer)
        if "pixel_values" not in getattr(processor, "model_input_names", ()):
            raise no_image_processor(f"{name}: images (column {column!r}) need")
        chosen = self._sample(examples, column, shuffle_buffer)
        folder = datasets.folder_of(self.data)
        batches = []
        for start in range(0, len(chosen), self.batch_size):
            part = chosen[start : start + self.batch_size]
            images = [load_image(row[column], folder, f"{name}: row {number}") for number, row in part]
            with processor_errors(processor):
                made = processor(images, return_tensors="pt")
            batches.append(processed(made, self.accepted))
        return batches, {"dataset": name, "image_column": column, "samples": len(chosen)}

    def image_texts(
        self,
        examples: Iterable[Any],
        columns: Mapping[str, str | None],
        name: str,
        shuffle_buffer: int | None,
    ) -> Built:
        """Sample rows with images, and run them through the model's processor.

        Args:
            examples: the rows.
            columns: the names of the columns ``image``, ``text`` and ``chat``, or None.
            name: of the data.
            shuffle_buffer: number of rows to draw from; None reads all.
        """
        if self.processor is None:
            raise DataError(
                f"{name} holds images with texts, which need the model's processor, and its folder has none that can "
                "be read: pass tokenizer=AutoProcessor.from_pretrained(...)"
            )
        length = sequence_length(self.config, self.processor.tokenizer, self.data.seq_len)
        made = ImageTexts(self.processor, name, datasets.folder_of(self.data), length)
        needed = columns["chat"] or columns["image"]
        chosen = self._sample(examples, str(needed), shuffle_buffer)
        found = made.batches(chosen, columns["image"], columns["text"], columns["chat"], self.batch_size, self.accepted)
        batches = list(found)
        used = {f"{kind}_column": column for kind, column in columns.items() if column is not None}
        return batches, {**_counts(batches), "dataset": name, **used, "samples": len(chosen)}

    def mentions_images(self, row: Mapping[str, Any], column: str) -> bool:
        """Return True if a conversation has parts that are images."""
        parts = [message["content"] for message in messages_of(row[column], "the first row")]
        return any(part["type"] != "text" for content in parts if isinstance(content, list) for part in content)

    def require_no_images(self, name: str) -> None:
        """Raise ``DataError`` if the model compares texts with images, for data of texts alone."""
        if self.accepted is not None and self.takes("pixel_values") and pairs_text_and_images(self.config):
            raise DataError(
                f"{name} holds texts alone, and the model also reads pixel_values: give rows with an image and a text "
                "(columns `image` and `text`; the names of image files beside the data will do), or batches with both, "
                "calibration=[{...}]"
            )

    def _sample(
        self, examples: Iterable[Any], column: str, shuffle_buffer: int | None
    ) -> list[tuple[int, Mapping[str, Any]]]:
        """Return the numbered rows that have a value in a column, or ``data.samples`` of them."""
        rows = ((number, row) for number, row in enumerate(islice(examples, shuffle_buffer)) if _has(row, column))
        chosen = reservoir(rows, self.data.samples, self.data.seed)
        if not chosen:
            raise DataError(f"no row has a value in column {column!r}")
        return chosen


def _has(row: Any, column: str) -> bool:
    value = row.get(column)
    return value is not None and (is_image(value) or bool(value))


def _counts(batches: list[dict[str, Tensor]]) -> dict[str, int]:
    """Return the rows, tokens and longest row of batches, without padding."""
    longest = max((batch["input_ids"].shape[-1] for batch in batches if "input_ids" in batch), default=0)
    rows = sum(len(batch["input_ids"]) for batch in batches if "input_ids" in batch)
    return {"samples": rows, "seq_len": longest, "tokens": sum(map(count_tokens, batches))}
