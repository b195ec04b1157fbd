"""The distillation loss: on the Triton kernel for logits on a CUDA device, in chunks of PyTorch elsewhere."""

from __future__ import annotations

from importlib import util
from typing import Any

import torch
from torch import Tensor

from hf_optim.toolkit.distillation import losses


def kd_loss(student: Tensor, teacher: Tensor, *, head: losses.Head = "classes", **options: Any) -> Tensor:
    """Compute ``hf_optim.toolkit.distillation.losses.head_loss``, with the same options.

    The teacher's logits are consumed: on the kernel, the backward may write the gradient into their memory.
    """
    if head != "classes":
        return losses.head_loss(head, student, teacher, **options)
    if not _kernel_supports(student, teacher):
        return losses.kd_loss(student, teacher, **options)
    from hf_optim_kernels.kd_loss import op

    return op.kd_loss(student, teacher, overwrite_teacher=True, **options)


def _kernel_supports(student: Tensor, teacher: Tensor) -> bool:
    both = student.is_cuda and student.device == teacher.device
    return both and student.dtype != torch.float64 and util.find_spec("triton") is not None
