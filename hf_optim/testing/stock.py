"""A child process with transformers but without hf_optim, which loads checkpoints as users without hf_optim do."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_WORKER = """
import json, sys
for name in ("hf_optim", "hf_optim_plugins", "hf_optim_kernels"):
    sys.modules[name] = None
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
for line in sys.stdin:
    job = json.loads(line)
    try:
        cls = getattr(transformers, job["class"])
        model = cls.from_pretrained(job["directory"], trust_remote_code=job["trust"]).eval()
        # Tensors of a mapped file may be unaligned, and on some processors unaligned sums round differently.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        with torch.no_grad():
            output = model(**{key: value.clone() for key, value in load_file(job["inputs"]).items()})
        logits = output.logits if "logits" in output else output[0]
        save_file({"logits": logits.contiguous()}, job["logits"])
        answer = {"class": type(model).__name__}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class StockTransformers:
    """Loads checkpoints in one long-lived child process that cannot import hf_optim. Use as a context manager."""

    def __enter__(self) -> StockTransformers:
        self._folder = tempfile.TemporaryDirectory()
        self._child = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait(timeout=60)
        self._child.stdout.close()
        self._folder.cleanup()

    def logits(
        self, directory: Path, auto_class: str, inputs: Mapping[str, torch.Tensor], trust_remote_code: bool = False
    ) -> tuple[str, torch.Tensor]:
        """Load a checkpoint with stock transformers; return the name of its class, and its logits.

        For a bare encoder, which has no logits, return the last hidden states. Raises ``OSError`` if loading or the
        forward fails.
        """
        home = Path(self._folder.name)
        save_file({key: value.contiguous() for key, value in inputs.items()}, home / "inputs.safetensors")
        job: dict[str, Any] = {
            "directory": str(directory),
            "class": auto_class,
            "trust": trust_remote_code,
            "inputs": str(home / "inputs.safetensors"),
            "logits": str(home / "logits.safetensors"),
        }
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(job) + "\n")
        self._child.stdin.flush()
        answer = json.loads(self._child.stdout.readline())
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["class"], load_file(home / "logits.safetensors")["logits"]
