"""What ``experts.py`` times beside its own kernels: transformers' functions for experts and torch's grouped product."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from hf_optim_kernels.common import benchmark


def transformers_module(shape, given):
    """transformers' module of experts of a shape, with these matrices."""
    from torch import nn
    from transformers import GptOssConfig, MixtralConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    cls, config = (GptOssExperts, GptOssConfig) if shape.bias else (MixtralExperts, MixtralConfig)
    settings = config(hidden_size=shape.d, intermediate_size=shape.inner, num_local_experts=shape.experts)
    with torch.device("meta"):
        module = cls(settings)
    names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    for key, value in zip(names, given[:4], strict=True):
        if value is not None:
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    module.num_experts = shape.experts
    return module


def transformers_call(shape, key, given, *rest, module=None):
    """A call of one of transformers' functions for experts."""
    module = module or transformers_module(shape, given)
    module.config._experts_implementation = key

    def call(*args):
        module.config._experts_implementation = key
        return module(*(args or rest))

    return call


def grouped_mm(shape, given, hidden, chosen, weights):
    """torch's grouped product for sorted tokens with the activation between, without sorting and combining."""
    ordered, order = chosen.reshape(-1).sort()
    ends = torch.searchsorted(ordered, torch.arange(shape.experts, device="cuda"), right=True).to(torch.int32)
    rows = hidden[order // shape.top_k]
    up, down = (m.transpose(1, 2) for m in given.matrices)

    def call():
        inner = F.grouped_mm(rows, up, offs=ends)
        first, second = inner.chunk(2, dim=-1)
        return F.grouped_mm(F.silu(first) * second, down, offs=ends)

    return call


def timed(calls, captured=True):
    """Microseconds, or why there are none."""
    try:
        with torch.set_grad_enabled(not captured and torch.is_grad_enabled()):
            if captured:
                return benchmark.graph_time(calls).us
            for call in calls:
                call()
            torch.cuda.synchronize()
            times = []
            for _ in range(5):
                start = time.perf_counter()
                for call in calls:
                    call()
                torch.cuda.synchronize()
                times.append((time.perf_counter() - start) * 1e6 / len(calls))
            return sorted(times)[2]
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:80]}"
