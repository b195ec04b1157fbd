"""The classes that the installed transformers lists under the auto classes of the sweep."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = {
    "CausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "SequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "Seq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "ImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "ImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "SpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
"""Auto class (without ``AutoModelFor``) -> the mapping of transformers from model types to its classes."""


@dataclass(frozen=True, order=True)
class Architecture:
    """One row of the table: a class under one task. A class may have several tasks.

    Attributes:
        task: a key of ``TASKS``.
        name: of the class.
    """

    task: str
    name: str


def architectures() -> list[Architecture]:
    """Return the classes of every task, in the order of ``TASKS``, each once per task."""
    from transformers.models.auto import modeling_auto

    found: dict[Architecture, None] = {}
    for task, mapping in TASKS.items():
        for names in getattr(modeling_auto, mapping).values():
            for name in [names] if isinstance(names, str) else names:
                found[Architecture(task, name)] = None
    return list(found)
