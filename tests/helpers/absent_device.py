"""What is launched on a CUDA device, on a machine that has none: tensors without data, and launches that are noted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import launch_recorder
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_optim_kernels.common import launch as launching


@contextmanager
def launches_on(*modules: ModuleType, processors: int = 132, shared_memory: int = 232_448) -> Iterator[list[dict]]:
    """Note the launches of ``modules`` on tensors that are made within with ``device="cuda"``; an H200 by default.

    Yields a list of the launches so far: ``module`` and ``name`` of the kernel, ``args`` and all ``constants`` as
    ``launch_recorder`` writes them, ``warps``, ``stages``, and the ``key``. Nothing is run.
    """
    found: list[dict[str, Any]] = []
    properties = SimpleNamespace(multi_processor_count=processors, shared_memory_per_block_optin=shared_memory)

    def note(
        kernel: Any, grid: Any, args: tuple, constants: dict, *, num_warps: int, num_stages: int, key: tuple, **_: Any
    ) -> None:
        function = getattr(kernel, "fn", kernel)
        found.append(
            {
                "module": function.__module__, "name": function.__name__, "key": key, "warps": num_warps,
                "args": [launch_recorder.kind_of(each) for each in args], "stages": num_stages,
                "constants": launching._all_of(kernel, args, constants),
            }
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "a device that is not there")
        for module in modules:
            patch.setattr(module, "launch", note)
            patch.setattr(module, "is_aligned", lambda *_: True)
            # What is remembered of a device is not that of this one.
            for name in ("_processors", "_has_room"):
                if hasattr(remembered := getattr(module, name, None), "__wrapped__"):
                    patch.setattr(module, name, remembered.__wrapped__)
            if hasattr(module, "begins_early"):
                patch.setattr(module, "begins_early", lambda tensor: tensor.is_cuda)
        yield found
