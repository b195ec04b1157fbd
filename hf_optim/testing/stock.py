"""A child process with transformers but without hf_optim, which loads checkpoints as users without hf_optim do."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_WORKER = """
import json, os, sys
for name in ("hf_optim", "hf_optim_plugins", "hf_optim_kernels"):
    sys.modules[name] = None
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
def answer(job):
    try:
        cls = getattr(transformers, job["class"])
        model, info = cls.from_pretrained(
            job["directory"], trust_remote_code=job["trust"], output_loading_info=True
        )
        model.eval()
        # Tensors of a mapped file may be unaligned, and on some processors unaligned sums round differently.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        torch.manual_seed(0)
        with torch.no_grad():
            output = model(**{key: value.clone() for key, value in load_file(job["inputs"]).items()})
        logits = output.logits if "logits" in output else output[0]
        save_file({"logits": logits.contiguous()}, job["logits"])
        missing = sorted([*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])])
        return {"class": type(model).__name__, "missing": missing}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
ready = False
for line in sys.stdin:
    job = json.loads(line)
    if job["fork"] and not ready:  # what every class needs is imported once
        import compressed_tensors.compressors, compressed_tensors.quantization
        from transformers import AutoModel, LlamaForCausalLM
        from transformers.quantizers import quantizer_compressed_tensors
        ready = True
    if not job["fork"]:
        print(json.dumps(answer(job)), flush=True)
        continue
    child = os.fork()
    if not child:
        print(json.dumps(answer(job)), flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps({"error": f"the process ended with status {status}"}), flush=True)
"""


@dataclass(frozen=True)
class Reloaded:
    """What stock transformers made of a checkpoint.

    Attributes:
        class_name: of the model.
        output: its logits, or what it returns first.
        missing: the tensors of the model that the checkpoint does not have, or has in another shape.
    """

    class_name: str
    output: torch.Tensor
    missing: tuple[str, ...]


def first_output(output: Any) -> torch.Tensor:
    """Return the logits of a model's output, or what it returns first."""
    found: torch.Tensor = output.logits if "logits" in output else output[0]
    return found


class StockTransformers:
    """Loads checkpoints in one long-lived child process that cannot import hf_optim. Use as a context manager.

    Args:
        fork: True to load each checkpoint in a process of its own, forked from the child process: an error that ends a
            process ends only that one, and memory is returned.
    """

    def __init__(self, fork: bool = False) -> None:
        self._fork = fork

    def __enter__(self) -> StockTransformers:
        self._folder = tempfile.TemporaryDirectory()
        self._child = self.start(_WORKER)
        return self

    def start(self, code: str) -> subprocess.Popen[str]:
        """Start the child process, which executes ``code``, with pipes for standard input and output."""
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

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
        reloaded = self.load(directory, auto_class, inputs, trust_remote_code)
        return reloaded.class_name, reloaded.output

    def load(
        self, directory: Path, auto_class: str, inputs: Mapping[str, torch.Tensor], trust_remote_code: bool = False
    ) -> Reloaded:
        """Load a checkpoint with stock transformers and run it. Raises ``OSError`` if loading or the forward fails.

        Args:
            directory: of the checkpoint.
            auto_class: the name of the class to load it with.
            inputs: of the forward, which is run with the random seed 0.
            trust_remote_code: as in ``from_pretrained``.
        """
        home = Path(self._folder.name)
        save_file({key: value.contiguous() for key, value in inputs.items()}, home / "inputs.safetensors")
        job: dict[str, Any] = {
            "directory": str(directory),
            "class": auto_class,
            "trust": trust_remote_code,
            "fork": self._fork,
            "inputs": str(home / "inputs.safetensors"),
            "logits": str(home / "logits.safetensors"),
        }
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps(job) + "\n")
        self._child.stdin.flush()
        answer = json.loads(self._child.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            raise OSError(answer["error"])
        output = load_file(home / "logits.safetensors")["logits"]
        return Reloaded(answer["class"], output, tuple(answer["missing"]))
