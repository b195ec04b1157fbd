"""The time and the memory of calls on a GPU."""

from __future__ import annotations

import functools

import torch

from hf_optim_kernels.common import benchmark


def time_and_bytes(run, inputs):
    """Microseconds of a call over the inputs in turn, and the bytes that it allocates at most; or why there are none.

    ``inputs`` is a function that returns them: memory may not do for these.
    """
    try:
        given = inputs()
        run(*given[0])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run(*given[0])
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
        return {"us": benchmark.graph_time([functools.partial(run, *each) for each in given], 9).us, "bytes": peak}
    except Exception as problem:
        torch.cuda.synchronize()
        return {"failed": f"{type(problem).__name__}: {str(problem)[:150]}"}
