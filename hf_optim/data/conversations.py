"""Conversations of a dataset, rendered by the chat template of the model, one sequence each.

A row has a list of messages, ``[{"role": "user", "content": "..."}, ...]``, or in the older form ``[{"from": "human",
"value": "..."}, ...]``. The content of a message is text, or a list of parts: ``{"type": "text", "text": ...}`` and
``{"type": "image"}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..recipes.config import DataConfig
from ..trust.bounds import shown
from .datasets import TEXT_COLUMNS
from .processor_errors import processor_errors

CHAT_COLUMNS = ("messages", "conversations")
# Names of speakers in the older form, as roles of a chat template.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}

Messages = list[dict[str, Any]]


def find_chat_column(example: Mapping[str, Any], config: DataConfig) -> str | None:
    """Return the column of an example with a conversation, or None to read texts.

    Without ``config.chat`` a conversation is found in ``messages`` or ``conversations``, unless there is a text column.
    Raises ``DataError``, which lists the columns, if ``config.chat`` is set and no column holds one.
    """
    if config.chat is False:
        return None
    if config.chat is None and (config.text_column is not None or any(name in example for name in TEXT_COLUMNS)):
        return None
    names = (config.text_column,) if config.chat and config.text_column else CHAT_COLUMNS
    for name in names:
        if is_conversation(example.get(name)):
            return name
    if config.chat:
        raise DataError(
            f"{config.dataset or 'the data'}: no conversation in {' or '.join(map(repr, names))} (columns: "
            f"{', '.join(map(str, example))}); a row holds a list of messages such as "
            '[{"role": "user", "content": "..."}], in a column that text_column may name'
        )
    return None


def is_conversation(value: Any) -> bool:
    """Return True if a value is a list of messages with a role or a speaker."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and len(value) > 0
        and all(isinstance(message, Mapping) and ("role" in message or "from" in message) for message in value)
    )


def messages_of(value: Any, where: str) -> Messages:
    """Return a conversation in the form that chat templates take.

    Args:
        value: the value of a chat column.
        where: the data and the row, for messages of errors.

    Raises ``DataError`` for a value that is not a conversation.
    """
    if not is_conversation(value):
        raise DataError(f"{where} holds no list of messages with a role, but {shown(value)}")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    rest = {str(key): value for key, value in message.items() if value is not None}
    speaker = rest.pop("role", None) or rest.pop("from", None)
    content = rest.pop("content", None) if "content" in rest else rest.pop("value", None)
    if not isinstance(speaker, str):
        raise DataError(f"{where}: the role is {shown(speaker)}, not text")
    content = "" if content is None else content
    if not isinstance(content, str):
        if not isinstance(content, Sequence) or not all(isinstance(part, (Mapping, str)) for part in content):
            raise DataError(f"{where}: the content is {shown(content)}, neither text nor a list of parts")
        content = [_part(part, where) for part in content]
    return {**rest, "role": ROLES.get(speaker, speaker), "content": content}


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    # Tables have all keys in every row, with null where a part has no such key.
    found = {str(key): value for key, value in part.items() if value is not None}
    kind = found.get("type") or ("text" if "text" in found else "image" if "image" in found else None)
    if kind == "text" and isinstance(found.get("text"), str):
        return {"type": "text", "text": found["text"]}
    if kind in ("image", "image_url"):
        return {**found, "type": kind}
    raise DataError(f"{where}: a part of the content is {shown(part)}; text and images are read")


def plain_messages(messages: Messages, where: str) -> Messages:
    """Return messages with parts of text joined. Raises ``DataError`` for an image, which a text model cannot read."""
    plain = []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            if any(part["type"] != "text" for part in content):
                raise DataError(f"{where} holds an image, and the model's folder has no processor for images")
            content = "\n".join(part["text"] for part in content)
        plain.append({**message, "content": content})
    return plain


def require_template(processor: Any, name: str) -> None:
    """Raise ``DataError`` unless a tokenizer or processor has a chat template."""
    if not hasattr(processor, "apply_chat_template") or not getattr(processor, "chat_template", None):
        raise DataError(
            f"{name} holds conversations, and the model's tokenizer has no chat template: take that of a model trained "
            "on conversations (set tokenizer.chat_template, or copy its chat_template.jinja into the model's folder), "
            "or use data with a column of plain texts"
        )


def rendered(processor: Any, messages: Messages) -> str:
    """Return a conversation as the text that the chat template makes of it. Raises ``DataError`` if it cannot."""
    with processor_errors(processor):
        text = processor.apply_chat_template(messages, tokenize=False)
    if not isinstance(text, str):
        raise DataError(f"the chat template of {type(processor).__name__} makes no text of a conversation")
    return text


def conversation_batches(
    conversations: Iterable[str], tokenizer: Any, length: int, batch_size: int
) -> list[dict[str, Tensor]]:
    """Return batches ``input_ids`` and ``attention_mask`` ``[b, t]`` (int64) of rendered conversations.

    Each conversation is one row, cut to ``length`` tokens and padded at the end to the longest of its batch; padding is
    0 in the mask. The template has written the special tokens, so the tokenizer adds none.
    """
    with processor_errors(tokenizer):
        rows = [
            tokenizer(text, add_special_tokens=False, truncation=True, max_length=length, verbose=False)["input_ids"]
            for text in conversations
        ]
    rows = [row for row in rows if row]
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((token for token in known if token is not None), 0)
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(map(len, part))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches
