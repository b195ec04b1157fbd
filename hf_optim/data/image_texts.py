"""Images with texts or conversations, as inputs of a multimodal model, by the model's own processor.

Models that put the image into the text (LLaVA, Qwen2-VL) get the image's token where the text has it, where the chat
template puts it, or before the text. Models that compare texts with images (CLIP) get both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DataError
from ..trust.bounds import shown
from .conversations import Messages, messages_of, rendered, require_template
from .forward_inputs import processed
from .images import images_in
from .processor_errors import processor_errors


def is_multimodal(processor: Any) -> bool:
    """Return True if a processor reads texts and images."""
    return getattr(processor, "image_processor", None) is not None and getattr(processor, "tokenizer", None) is not None


@dataclass(frozen=True)
class ImageTexts:
    """Rows with images, made into batches.

    Attributes:
        processor: of the model, for texts and images.
        name: of the data, for messages.
        folder: where files of images are; None reads no files.
        length: tokens to which the text of a model like CLIP is cut. A text with an image in it is not cut.
    """

    processor: Any
    name: str
    folder: Path | None
    length: int

    def batches(
        self,
        rows: Sequence[tuple[int, Mapping[str, Any]]],
        images: str | None,
        text: str | None,
        chat: str | None,
        batch_size: int,
        accepted: Collection[str] | None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield batches of model inputs. Raises ``DataError``, which names the row.

        Args:
            rows: numbered examples.
            images: the column with the image or images, or None if the messages have them.
            text, chat: the column with the text, or with the conversation.
            batch_size: examples in a batch; batches are padded, so it is 1 without a padding token.
            accepted: names of the inputs that the model takes; None if unknown.
        """
        if chat is not None:
            require_template(self.processor, self.name)
        size = batch_size if self.processor.tokenizer.pad_token_id is not None else 1
        for start in range(0, len(rows), size):
            part = [self._example(number, row, images, text, chat) for number, row in rows[start : start + size]]
            yield self._batch(part, accepted)

    @property
    def token(self) -> str | None:
        """The text that stands for an image, for models that put images into the text."""
        token = getattr(self.processor, "image_token", None)
        return token if isinstance(token, str) and token else None

    def _example(
        self, number: int, row: Mapping[str, Any], images: str | None, text: str | None, chat: str | None
    ) -> tuple[str, list[Any]]:
        where = f"{self.name}: row {number}"
        found = images_in(row.get(images), self.folder, where) if images is not None else []
        if chat is not None:
            return self._conversation(messages_of(row.get(chat), where), found, where)
        value = row.get(text) if text is not None else ""
        if not isinstance(value, str):
            raise DataError(f"{where}: column {text!r} holds {shown(value)}, not text")
        if not found:
            raise DataError(f"{where} has no image in column {images!r}")
        if self.token is None or self.token in value:
            return value, found
        if getattr(self.processor, "chat_template", None):
            content = [*({"type": "image"} for _ in found), {"type": "text", "text": value}]
            return rendered(self.processor, [{"role": "user", "content": content}]), found
        return f"{self.token * len(found)}\n{value}", found

    def _conversation(self, messages: Messages, images: list[Any], where: str) -> tuple[str, list[Any]]:
        """Return a conversation as text, and its images in the order in which it mentions them."""
        own: list[Any] = []
        places = 0
        for message in messages:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
            for part in message["content"]:
                if part["type"] != "text":
                    places += 1
                    value = _image_of(part)
                    own += images_in(value, self.folder, where)
                    part.clear()
                    part["type"] = "image"
        if own and images:
            raise DataError(f"{where} has images both in its messages and in a column: keep one of them")
        found = own or images
        if found and not places:
            messages[_first_user(messages)]["content"][:0] = [{"type": "image"} for _ in found]
        elif places != len(found):
            raise DataError(f"{where} mentions {places} images, and has {len(found)}")
        return rendered(self.processor, messages), found

    def _batch(self, part: list[tuple[str, list[Any]]], accepted: Collection[str] | None) -> dict[str, Tensor]:
        texts = [text for text, _ in part]
        options: dict[str, Any] = {"padding": len(part) > 1, "return_tensors": "pt"}
        if self.token is None:
            options |= {"images": [image for _, images in part for image in images], "truncation": True}
            options["max_length"] = self.length
        elif any(images for _, images in part):
            options["images"] = [images for _, images in part]
        start = self.processor.tokenizer.bos_token
        if start and all(text.startswith(start) for text in texts):
            options["add_special_tokens"] = False  # the chat template has written it
        with processor_errors(self.processor):
            made = self.processor(text=texts, **options)
        batch = processed(made, accepted)
        # The first input has one row for each example; patches of images may follow one another.
        return {key: batch[key] for key in sorted(batch, key=lambda key: key != "input_ids")}


def _image_of(part: Mapping[str, Any]) -> Any:
    """Return the image of a part of a message, whichever key has it; None if it only says where an image is."""
    for key in ("image", "path", "url", "image_url", "base64"):
        value = part.get(key)
        if value is not None:
            return value.get("url") if key == "image_url" and isinstance(value, Mapping) else value
    return None


def _first_user(messages: Messages) -> int:
    return next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
