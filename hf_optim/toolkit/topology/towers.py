"""Towers and what joins them to a language model: vision and audio encoders, projectors, poolers, by class and name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

MEDIA_INPUTS = ("pixel_values", "pixel_values_videos", "input_features", "input_values", "audio_values")
VISION, AUDIO = "vision", "audio"
_PROJECTOR = re.compile(
    r"projector|connector|merger|resampler|perceiver|multi_?modal|\bmm_|aligner|abstractor"
    r"|(text|visual|vision|image|audio|speech)_(projection|proj)\b|embed_(vision|audio)"
)


def media_of(module: nn.Module) -> str:
    """Return ``"vision"`` or ``"audio"`` for a model that takes nothing else, ``""`` for any other module."""
    modalities = getattr(module, "input_modalities", None)
    main = getattr(module, "main_input_name", None)
    taken = {modalities} if isinstance(modalities, str) else set(modalities or ())
    if main not in MEDIA_INPUTS and not taken:
        return ""
    if taken and taken <= {"image", "video"}:
        return VISION
    if taken == {"audio"}:
        return AUDIO
    if "text" in taken or main not in MEDIA_INPUTS:
        return ""
    return VISION if str(main).startswith("pixel") else AUDIO


def towers(model: nn.Module, main_blocks: Iterable[str]) -> dict[str, str]:
    """Return the vision and audio towers of a model: name -> ``"vision"`` or ``"audio"``, only the outermost.

    A part that contains one of ``main_blocks`` (names of the blocks that a forward of the model on its main input runs)
    is not a tower: both halves of CLIP run, and so does the encoder of Whisper.
    """
    blocks = list(main_blocks)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        media = media_of(module)
        if media and not any(block.startswith(f"{name}.") for block in blocks):
            found[name] = media
    return found


def media_parts(model: nn.Module, main_blocks: Iterable[str]) -> dict[str, list[str]]:
    """Return the parts of a model that turn images or sound into hidden states: name -> names inside it to leave out.

    These are, for each tower, the members of its module lists (without those inside another), then the whole tower
    without them, and the projectors beside the towers, in the order of registration.
    """
    blocks = list(main_blocks)
    parts: dict[str, list[str]] = {}
    found = towers(model, blocks)
    for tower in found:
        members: list[str] = []
        for name, module in model.get_submodule(tower).named_modules(prefix=tower):
            if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{done}.") for done in members):
                members += [f"{name}.{key}" for key in module._modules]
        parts |= {member: [] for member in members}
        parts[tower] = members
    for name, _ in model.named_modules():
        outside = not any(_overlap(name, other) for other in (*found, *blocks))
        if found and name and outside and is_projector(model, name) and not any(_overlap(name, p) for p in parts):
            parts[name] = []
    return parts


def _overlap(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


def tower_of(found: dict[str, str], name: str) -> str:
    """Return ``"vision"`` or ``"audio"`` if the module or parameter ``name`` lies in a tower, else ``""``."""
    return next((media for tower, media in found.items() if name.startswith(f"{tower}.")), "")


def is_pooler(model: nn.Module, name: str) -> bool:
    """Return True if a module or parameter outside the blocks belongs to a pooler, by its names and classes."""
    return "pool" in _described(model, name)


def is_projector(model: nn.Module, name: str) -> bool:
    """Return True if a module or parameter outside the blocks projects one modality, by its names and classes."""
    return bool(_PROJECTOR.search(_described(model, name)))


def _described(model: nn.Module, name: str) -> str:
    """Return the components of a name, with the classes of the modules around it that are not models."""
    from transformers import PreTrainedModel

    words, module = [], model
    for part in name.split("."):
        words.append(part)
        child = module._modules.get(part)
        if child is None:
            break
        if not isinstance(child, PreTrainedModel):
            words.append(type(child).__name__)
        module = child
    return " ".join(words).lower()
