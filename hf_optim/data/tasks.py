"""The task of a model class, as named by the Hub and by the auto classes of transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A task that a model class is made for.

    Attributes:
        tag: pipeline tag of the Hub.
        auto_class: the auto class whose ``from_pretrained`` loads such a model.
    """

    tag: str
    auto_class: str


# Mappings of transformers.models.auto.modeling_auto, by precedence: a class may be in several.
_MAPPINGS = (
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", Task("text-generation", "AutoModelForCausalLM")),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", Task("text2text-generation", "AutoModelForSeq2SeqLM")),
    (
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        Task("text-classification", "AutoModelForSequenceClassification"),
    ),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", Task("fill-mask", "AutoModelForMaskedLM")),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", Task("image-classification", "AutoModelForImageClassification")),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", Task("token-classification", "AutoModelForTokenClassification")),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", Task("question-answering", "AutoModelForQuestionAnswering")),
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", Task("image-text-to-text", "AutoModelForImageTextToText")),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", Task("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq")),
)
BASE = Task("feature-extraction", "AutoModel")


def task_of(class_name: str) -> Task:
    """Return the task of a transformers model class, given its name; ``BASE`` for a class without a head."""
    from transformers.models.auto import modeling_auto

    for mapping, task in _MAPPINGS:
        for known in getattr(modeling_auto, mapping, {}).values():
            if class_name == known or (isinstance(known, (tuple, list)) and class_name in known):
                return task
    return BASE


def task_of_auto_class(name: str) -> Task:
    """Return the task whose auto class has this name; ``BASE`` for another name."""
    return next((task for _, task in _MAPPINGS if task.auto_class == name), BASE)


def task_of_model(model: object) -> Task:
    """Return the task of a model. A subclass of a transformers class has the task of its parent."""
    found = (task_of(cls.__name__) for cls in type(model).__mro__)
    return next((task for task in found if task is not BASE), BASE)
