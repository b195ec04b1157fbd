"""Refuse models that can have no code of their own saved with them, before any work."""

from __future__ import annotations

from transformers import PreTrainedModel

from hf_optim import ModelError
from hf_optim.checkpoints.remote_code import RemoteCode, generate


def require_own_code(model: PreTrainedModel, remote_code: RemoteCode, label: str) -> None:
    """Raise ``ModelError`` unless code can be generated for the configuration and the class of a model."""
    try:
        code = generate(remote_code, type(model.config))  # type: ignore[arg-type]
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error
    if not hasattr(code, remote_code.prefix + type(model).__name__):
        raise ModelError(
            f"{label}: {type(model).__name__} is not among the classes that transformers' AutoModel classes "
            "support, so no code can be saved with it"
        )
