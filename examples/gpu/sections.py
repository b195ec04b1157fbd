"""Sections of a script for a GPU: each printed, kept in a JSON file under $OUT, and none the end of the others."""

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
    """Runs functions as they are decorated; those that the command line names, or all.

    Attributes:
        result: name -> what the function returned, beside the device and versions.
    """

    def __init__(self, file: str) -> None:
        self.path = Path(os.environ.get("OUT", ".")) / file
        self.result: dict[str, Any] = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }

    def __call__(self, name: str) -> Callable[[Callable[[], Any]], None]:
        """Decorates the function of section ``name``."""

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
            self.path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")

        return run
