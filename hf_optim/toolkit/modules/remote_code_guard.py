"""Guard against stock classes: the configuration of a model with remote code cannot be loaded without that code.

``AutoModel`` rejects a checkpoint of an unknown ``model_type``. A stock class that is used directly only warns, and
would leave unknown parameters at random. On disk the layers therefore have a type that no release of transformers
supports, so that the configuration class of the stock model raises.

This file is stored with checkpoints, so it imports only transformers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

FOREIGN = "needs_trust_remote_code"
TYPES, COUNT, ASIDE = "layer_types", "num_hidden_layers", "stock_layers"


class RefusedByStock(PreTrainedConfig):
    """Mixin of a configuration class: writes ``config.json`` with foreign layer types, and restores the true ones.

    transformers checks layer types if a configuration has a number of layers. On disk that number is moved aside,
    together with the layer types of the architecture: stock classes have a default number and raise, but the bare
    ``PreTrainedConfig``, with which ``AutoTokenizer`` reads a checkpoint whose code it may not run, has none and does
    not raise. A configuration without a number of layers (of several towers) gets one on disk.
    """

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the configuration with the guard. With ``use_diff`` only what differs from the defaults."""
        fields = json.loads(self.to_json_string(use_diff=use_diff))
        count = getattr(self, COUNT, None)
        fields[ASIDE] = {key: fields.pop(key) for key in (TYPES, COUNT) if key in fields}
        fields |= {TYPES: [FOREIGN] * count} if count else {TYPES: [FOREIGN], COUNT: 1}
        Path(json_file_path).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from the output of ``to_json_file``, or from a dictionary without the guard."""
        fields = dict(config_dict)
        if FOREIGN in (fields.get(TYPES) or ()):
            aside = fields.pop(ASIDE, {})
            fields = {key: value for key, value in fields.items() if key not in (TYPES, COUNT)} | aside
        return super().from_dict(fields, **kwargs)
