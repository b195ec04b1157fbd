"""Configurations that stock classes refuse: part of the configuration class of every model with code of its own.

`AutoModel` refuses a checkpoint of an unknown `model_type`. A stock class that is asked for by name only warns, and
would leave at random what it does not know. On disk the layers therefore have a type that no release of transformers
knows, so that the configuration class of the stock model raises.

This file is stored beside checkpoints, so it imports only transformers.
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
    """Part of a configuration class: it writes `config.json` with layer types of its own, and reads them back.

    transformers looks at layer types where a configuration has a number of layers. That number is put aside on disk,
    with the layer types that the architecture has: stock classes have one by themselves and raise, but the bare
    `PreTrainedConfig`, by which `AutoTokenizer` reads a checkpoint whose code it may not run, has none and does not. A
    configuration that has no number of layers (of several towers) gets one on disk.
    """

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write the configuration, marked. `use_diff`: only what differs from the defaults."""
        fields = json.loads(self.to_json_string(use_diff=use_diff))
        count = getattr(self, COUNT, None)
        fields[ASIDE] = {key: fields.pop(key) for key in (TYPES, COUNT) if key in fields}
        fields |= {TYPES: [FOREIGN] * count} if count else {TYPES: [FOREIGN], COUNT: 1}
        Path(json_file_path).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of what `to_json_file` wrote, or of any dictionary without marks."""
        fields = dict(config_dict)
        if FOREIGN in (fields.get(TYPES) or ()):
            aside = fields.pop(ASIDE, {})
            fields = {key: value for key, value in fields.items() if key not in (TYPES, COUNT)} | aside
        return super().from_dict(fields, **kwargs)
