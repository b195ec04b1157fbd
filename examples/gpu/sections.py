"""Sections of a benchmark script: results are kept in a JSON file in ``$OUT``, and a failure does not stop the rest."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton


class Sections:
    """A decorator that runs each function where it is defined.

    Words on the command line select the sections that have one of them in their names; without words, all run.

    Attributes:
        result: name -> the returned value of the function; also the device and versions.
    """

    def __init__(self, file: str) -> None:
        self.path = Path(os.environ.get("OUT", ".")) / file
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    def __call__(self, name: str) -> Callable[[Callable[[], Any]], None]:
        """Return the decorator of section ``name``."""

        def run(function: Callable[[], Any]) -> None:
            if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
                return
            print(f"== {name}", flush=True)
            try:
                self.result[name] = function()
            except Exception:
                traceback.print_exc()
                self.result[name] = {"failed": traceback.format_exc()[-800:]}
            gc.collect()
            torch.cuda.empty_cache()
            self.keep(name, self.result[name])

        return run

    def keep(self, name: str, value: Any) -> None:
        """Write what a section has found so far: a limit of time may end the script before the section ends."""
        self.result[name] = value
        self.path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
